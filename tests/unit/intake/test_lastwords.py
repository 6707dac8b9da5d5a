"""Why a daemon ended, beside its socket: whole or as if it were not there, and believed of nobody but whom the socket's place trusts. F19, S10"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.errors import BadConfig, CatalogFault, CkptdError
from ckptd.intake import lastwords
from ckptd_client import places
from tests.support.node import eventually
from tests.support.strangers import SOMEBODY, need_root

ERROR = CatalogFault("the catalog is damaged", hint="move it aside")


@pytest.fixture
def socket(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A socket's path; the user's home for words is in the same directory."""
    monkeypatch.setenv("CKPTD_DIR", str(short_dir / "home"))
    (short_dir / "home").mkdir()
    (short_dir / "run").mkdir()
    return str(short_dir / "run" / "ckptd.sock")


@pytest.fixture
def beside(socket: str) -> Path:
    return Path(socket + ".error")


@pytest.fixture
def at_home(short_dir: Path) -> Path:
    return short_dir / "home" / "daemon.error"


def found(socket: str) -> lastwords.LastWords | None:
    return lastwords.find(places.named_place(socket))


def test_what_is_left_is_found_by_whoever_knows_the_socket(socket: str, beside: Path, at_home: Path) -> None:
    lastwords.leave(socket, ERROR)
    words = found(socket)
    assert words is not None
    assert isinstance(words.error, CatalogFault)
    assert (words.error.code, words.error.message, words.error.hint) == (ERROR.code, ERROR.message, ERROR.hint)
    assert words.at.endswith("+00:00")
    assert stat.S_IMODE(beside.stat().st_mode) == 0o600
    assert not at_home.exists()


def test_the_last_words_are_the_ones_that_count_until_they_are_taken_back(socket: str, beside: Path) -> None:
    lastwords.leave(socket, ERROR)
    lastwords.leave(socket, BadConfig("a typo"))
    words = found(socket)
    assert words is not None
    assert words.error.code == "bad_config"
    lastwords.clear(socket)
    assert found(socket) is None
    assert not beside.exists()
    lastwords.clear(socket)


def test_words_that_were_cut_off_anywhere_are_as_if_they_were_not_there(socket: str, beside: Path) -> None:
    """A kill or a full disk between the first byte and the last."""
    lastwords.leave(socket, ERROR)
    whole = beside.read_bytes()
    for size in range(len(whole) - 1):  # the last byte is the end of the line
        beside.write_bytes(whole[:size])
        assert found(socket) is None, size
    beside.write_bytes(whole)
    assert found(socket) is not None


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"error": 1, "at": 2}',
        b'{"error": {"code": "x"}}',
        b"[" * 9000,
        b"0" * (1 << 20),
    ],
    ids=["empty", "no text", "list", "nothing", "wrong types", "no time", "deep", "endless"],
)
def test_what_is_no_word_of_a_daemon_is_no_word(socket: str, beside: Path, noise: bytes) -> None:
    beside.write_bytes(noise)
    assert found(socket) is None


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "dangling link"])
def test_neither_reader_nor_writer_goes_through_what_lies_in_the_way(
    socket: str, beside: Path, short_dir: Path, kind: str
) -> None:
    """S10. In a directory like /tmp the name may be taken by anybody: nothing is opened, written or removed behind it."""
    other = short_dir / "diary"
    if kind == "directory":
        beside.mkdir()
    elif kind == "fifo":
        os.mkfifo(beside)
    else:
        if kind == "link":
            lastwords.leave(socket, ERROR)
            beside.rename(other)
        beside.symlink_to(other)
    before = other.read_bytes() if other.exists() else None
    assert found(socket) is None
    lastwords.leave(socket, BadConfig("a typo"))
    assert (other.read_bytes() if other.exists() else None) == before
    words = found(socket)
    assert words is not None
    assert words.error.code == "bad_config"


def test_another_users_words_are_not_believed(socket: str, beside: Path) -> None:
    """S10. He may make a file of that name in /tmp, and would have a hint of his own for whoever reads it."""
    need_root()
    lastwords.leave(socket, ERROR)
    os.chown(beside, SOMEBODY, SOMEBODY)
    assert found(socket) is None


def test_who_may_not_read_the_reason_hears_that_there_is_one_and_for_whom(socket: str, beside: Path) -> None:
    """All users' daemon: its messages may quote its configuration, which is root's."""
    need_root()
    lastwords.leave(socket, ERROR)
    for directory in (beside.parent, beside.parent.parent):
        directory.chmod(0o755)
    code = (
        "import os, sys\n"
        "from ckptd.intake import lastwords\n"
        "from ckptd_client.places import SocketPlace\n"
        f"os.setgid({SOMEBODY}); os.setuid({SOMEBODY})\n"
        f"words = lastwords.find(SocketPlace({socket!r}, ({SOMEBODY}, 0), own=False))\n"
        "print(words.error.code, words.error.message, words.error.hint)\n"
        f"print(lastwords.find(SocketPlace({socket!r}, ({SOMEBODY},), own=True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    told, untrusted = done.stdout.splitlines()
    assert told.startswith(f"denied why is in {beside}, for uid 0 to read")
    assert ERROR.message not in told
    assert untrusted == "None"


def test_a_directory_that_is_not_the_daemons_to_write_leaves_the_words_in_the_users_own(
    socket: str, beside: Path, at_home: Path
) -> None:
    """ckptd@.service: the socket lies in a directory of root's."""
    beside.parent.rmdir()
    lastwords.leave(socket, ERROR)
    assert at_home.exists()
    assert found(socket) is not None
    assert found(socket + "2") is None, "another daemon of this user did not say that"
    lastwords.clear(socket + "2")
    assert at_home.exists()
    lastwords.clear(socket)
    assert not at_home.exists()


def test_a_container_that_has_the_directory_under_another_name_finds_the_words(socket: str, beside: Path) -> None:
    lastwords.leave(socket, ERROR)
    elsewhere = beside.parent.rename(beside.parent.parent / "mounted")
    assert found(str(elsewhere / "ckptd.sock")) is not None


def test_with_no_place_at_all_the_daemon_ends_as_it_would_have(socket: str, beside: Path, at_home: Path) -> None:
    beside.parent.rmdir()
    at_home.parent.rmdir()
    lastwords.leave(socket, ERROR)
    assert found(socket) is None


def test_the_longest_words_still_fit(socket: str, beside: Path) -> None:
    """A list of all that is wrong with a configuration, in characters that JSON writes with twelve bytes."""
    lastwords.leave(socket, BadConfig("\U0001f40c" * 50_000, hint="\U0001f40c" * 50_000))
    words = found(socket)
    assert words is not None
    assert words.error.message == "\U0001f40c" * lastwords.TEXT_CHARS_MAX
    assert beside.stat().st_size < lastwords.FILE_BYTES_MAX


def test_the_keeper_is_named_only_while_that_number_is_a_ckptds(socket: str, beside: Path) -> None:
    """A person is told to end it: the number of another program would be a trap."""
    lastwords.leave(socket, ERROR)
    told = json.loads(beside.read_bytes())
    assert told["keeper"] == os.getppid()
    with subprocess.Popen(["sh", "-c", "read line", "ckptd"], stdin=subprocess.PIPE) as keeper:
        eventually(Path(f"/proc/{keeper.pid}/cmdline").read_bytes, "its command line, which exec sets last")
        for pid, named in ((keeper.pid, keeper.pid), (os.getpid(), None), (-1, None), ("1", None), (True, None)):
            beside.write_text(json.dumps({**told, "keeper": pid}))
            words = found(socket)
            assert words is not None
            assert words.keeper == named, pid
        keeper.communicate(b"\n")


def test_a_supervisor_that_speaks_for_a_daemon_names_itself_and_one_that_has_ended_nobody(
    socket: str, beside: Path
) -> None:
    """Its parent may be the first process of a container: to end that is not what anybody meant."""
    for keeper in (os.getpid(), 0):
        lastwords.leave(socket, ERROR, keeper=keeper)
        assert json.loads(beside.read_bytes())["keeper"] == keeper
    words = found(socket)
    assert words is not None
    assert words.keeper is None


def test_words_at_home_about_a_path_that_can_be_none_are_about_no_socket(
    socket: str, beside: Path, at_home: Path
) -> None:
    beside.parent.rmdir()
    lastwords.leave(socket, ERROR)
    at_home.write_text(json.dumps({**json.loads(at_home.read_bytes()), "socket": "a\0b"}))
    assert found(socket) is None


def test_whatever_ends_a_daemon_leaves_word_and_goes_on_its_way(socket: str) -> None:
    with pytest.raises(CatalogFault), lastwords.left(socket):
        raise ERROR
    words = found(socket)
    assert words is not None
    assert words.error.message == ERROR.message
    with pytest.raises(ZeroDivisionError), lastwords.left(socket):
        1 / 0  # noqa: B018 - a defect
    words = found(socket)
    assert words is not None
    assert (words.error.code, words.error.message) == ("internal", "ZeroDivisionError: division by zero")


def test_of_several_errors_the_one_that_a_person_can_act_on_is_told() -> None:
    group = BaseExceptionGroup("", [KeyError("x"), BaseExceptionGroup("", [SystemExit(1), ERROR])])
    assert lastwords.cause(group) is ERROR
    assert isinstance(lastwords.cause(ExceptionGroup("", [KeyError("x")])), CkptdError)


def test_a_daemon_whose_door_nobody_holds_leaves_nothing(socket: str, beside: Path, at_home: Path) -> None:
    """Whoever started it by hand reads its standard error; a second one must not speak for the first."""
    with pytest.raises(CatalogFault), lastwords.left(None):
        raise ERROR
    assert not beside.exists()
    assert not at_home.exists()

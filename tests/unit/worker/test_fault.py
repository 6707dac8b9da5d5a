"""What the kernel's error numbers mean for people. F9"""

import errno

import pytest

from ckptd.errors import Bug, Operator, Weather
from ckptd.worker.fault import coded

MEANINGS = {
    errno.ENOSPC: ("no_space", Operator),
    errno.EDQUOT: ("no_space", Operator),
    errno.EFBIG: ("no_space", Operator),
    errno.EIO: ("disk_fault", Operator),
    errno.ESTALE: ("disk_fault", Operator),
    errno.EROFS: ("denied", Operator),
    errno.EACCES: ("denied", Operator),
    errno.EMFILE: ("busy", Weather),
    errno.ENFILE: ("busy", Weather),
    errno.ENOMEM: ("busy", Weather),
    errno.EINTR: ("busy", Weather),
}


@pytest.mark.parametrize("number", MEANINGS, ids=errno.errorcode.get)
def test_an_error_number_is_the_error_of_who_must_act(number: int) -> None:
    """What passes by itself is tried again, the rest waits for a person; the number stays readable."""
    code, kind = MEANINGS[number]
    found = coded(OSError(number, "why", "/data/x"))
    assert found is not None
    assert isinstance(found, kind)
    assert not isinstance(found, Bug)
    assert (found.code, found.details) == (code, {"errno": errno.errorcode[number], "path": "/data/x"})


def test_a_number_that_blames_nobody_is_a_bug_of_ours() -> None:
    assert coded(OSError(errno.EBADF, "why")) is None

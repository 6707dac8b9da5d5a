"""cleanup: shown first, done by id and state, each for itself; what stays says why."""

import json
from datetime import timedelta

import pytest

from ckptd.clock import SystemClock
from ckptd.errors import Changed, Held, RootDegraded, Vetoed

IDS = {state: f"{number}" * 32 for number, state in enumerate(("corrupt", "missing", "failed", "pending"), start=1)}
WHOLE = "a" * 32
DAMAGE = {"file": "model.safetensors", "kind": "size", "detail": "7 bytes, recorded were 9", "mib": [], "tensors": []}
ERRORS = {
    "corrupt": {"code": "corrupt", "message": "damaged: model.safetensors", "damage": [DAMAGE]},
    "missing": {"code": "missing", "message": "its files are gone"},
    "failed": {"code": "no_space", "message": "the disk was full"},
    "pending": None,
}


def ago(**span: float) -> str:
    return (SystemClock().now() - timedelta(**span)).isoformat()


@pytest.fixture
def spoiled(daemon):
    """A catalog with one checkpoint in each state that is none, and a whole one beside it. Tests change `rows`."""
    [row] = daemon.replies["list"]["checkpoints"]
    old = {"created_at": ago(days=1), "staged_at": ago(days=1), "durable_at": None, "holds": [], "hot": False}
    daemon.rows = {
        state: {**row, **old, "checkpoint": IDS[state], "state": state, "level": "none", "error": ERRORS[state]}
        for state in IDS
    }
    daemon.rows["live"] = {**row, "checkpoint": WHOLE}

    def listed(request):
        found = daemon.rows.get(request["state"])
        return {"checkpoints": [found] if found else [], "next": None}

    def removed(request):
        action = "trash" if request["selector"] == IDS["corrupt"] else "forget"
        return {"checkpoint": request["selector"], "action": action}

    daemon.replies |= {"list": listed, "remove": removed, "roots": {"roots": []}}
    return daemon


def stays(ran) -> dict[str, str]:
    """Why each is left alone."""
    return {one["state"]: one["left"] for one in ran.json["found"] if one["left"]}


def test_cleanup_shows_what_is_wrong_and_what_would_become_of_it_and_changes_nothing(run, spoiled):
    """M082, M099, M159: dry by default, with the reason of each."""
    ran = run("cleanup", "imagenet")
    assert ran.code == 0
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert [(line[0], line[5], line[6]) for line in lines] == [
        (IDS["corrupt"], "trash", "model.safetensors: size: 7 bytes, recorded were 9"),
        (IDS["missing"], "forget", "its files are gone"),
        (IDS["failed"], "forget", "the disk was full"),
        (IDS["pending"], "leave", lines[3][6]),
    ]
    assert "not whole yet" in lines[3][6]
    assert "would clean up 3 checkpoints: 1 to the trash, 97.7 MiB, 2 out of the lists; 1 left alone" in ran.err
    assert "--confirm" in ran.err
    assert all(asked["dry_run"] for asked in spoiled.asked("remove"))
    assert {asked["project"] for asked in spoiled.asked("list")} == {"imagenet"}
    assert run("cleanup", "-q").out.split() == [IDS["corrupt"], IDS["missing"], IDS["failed"]]


def test_on_a_terminal_each_has_a_line_for_every_reason(run, spoiled, on_terminal):
    out = run("cleanup").out
    assert "trash   imagenet/resnet50 step 1000 (111111111111" in out
    assert "        model.safetensors: size: 7 bytes, recorded were 9\n" in out
    assert "        stays: it may still be written to" in out


def test_confirmed_each_is_removed_by_its_id_while_it_is_in_the_state_that_was_shown(run, spoiled):
    """M082, M159: no question is asked; ids come one by one."""
    ran = run("cleanup", "--confirm", "-q")
    assert (ran.code, ran.out.split()) == (0, [IDS["corrupt"], IDS["missing"], IDS["failed"]])
    done = [(asked["selector"], asked["state"]) for asked in spoiled.asked("remove") if not asked["dry_run"]]
    assert done == [(IDS[state], state) for state in ("corrupt", "missing", "failed")]
    assert "cleaned up 3 checkpoints" in ran.err
    assert "ckpt restore" in ran.err


def test_one_that_can_not_be_removed_stops_no_other_and_shows_in_the_exit_code(run, spoiled):
    """M159: whoever runs it again goes on with the rest."""
    removed = spoiled.replies["remove"]

    def changing(request):
        if not request["dry_run"] and request["selector"] == IDS["corrupt"]:
            return Vetoed("a hook objects")
        return removed(request)

    spoiled.replies["remove"] = changing
    ran = run("cleanup", "--confirm", "--jsonl")
    assert ran.code == 1
    told = {line["state"]: line for line in map(json.loads, ran.out.splitlines())}
    assert (told["corrupt"]["done"], told["corrupt"]["error"]["code"]) == (False, "vetoed")
    assert (told["missing"]["done"], told["failed"]["done"], told["pending"]["done"]) == (True, True, False)
    assert "1 could not be" in ran.err
    assert "a hook objects" in ran.err


def test_nothing_to_clean_up_is_no_failure(run, spoiled):
    spoiled.rows = {}
    ran = run("cleanup", "--json")
    assert (ran.code, ran.json) == (0, {"v": 1, "dry_run": True, "found": []})
    assert "nothing to clean up" in ran.err


def test_what_is_young_held_or_the_last_of_its_kind_stays_and_says_why(run, spoiled):
    """M082: and nothing is asked about what is young."""
    for row in spoiled.rows.values():
        row["durable_at"] = ago(minutes=50)
    assert set(stays(run("cleanup", "--json")).values()) == {"younger than 1h"}
    assert spoiled.asked("remove") == []
    spoiled.rows["missing"]["holds"] = ["pin"]
    del spoiled.rows["live"]
    left = stays(run("cleanup", "--json", "--younger-than", "10m"))
    assert left["missing"] == "held: pin"
    assert "no other is whole" in left["corrupt"]
    assert "failed" not in left
    spoiled.rows["corrupt"]["hot"] = True
    assert "memory still holds it" in stays(run("cleanup", "--json", "--younger-than", "10m"))["corrupt"]


def test_what_the_daemon_holds_stays_with_its_words_and_what_it_can_not_look_at_is_a_failure(run, spoiled):
    spoiled.replies["remove"] = [
        Held(f"checkpoint {IDS['corrupt']} is kept: lease of 7", hint="wait for its reader", holds=["lease"]),
        Changed("it is live now"),
        RootDegraded("the disk does not answer"),
    ]
    ran = run("cleanup", "--json")
    assert stays(ran)["corrupt"] == "kept: lease of 7; wait for its reader"
    assert stays(ran)["missing"].startswith("it is live now")
    [failed] = [one for one in ran.json["found"] if one["error"]]
    assert (ran.code, failed["state"], failed["action"]) == (1, "failed", "leave")


def test_what_is_missing_under_a_root_that_can_not_be_looked_at_is_not_forgotten(run, spoiled):
    """M082: a disk that is not mounted is no reason to give its checkpoints up."""
    root = spoiled.rows["missing"]["root"]
    spoiled.replies["roots"] = {"roots": [{"path": root, "problem": "is its disk mounted?"}]}
    assert stays(run("cleanup", "--json"))["missing"] == "its root has a problem: is its disk mounted?"

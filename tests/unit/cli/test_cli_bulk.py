"""bulk, tag, restore, retention explain: many at once, counted first, each for itself."""

import io

import pytest

from ckptd.errors import Held, NotFound

ID = "6f1c0e3a9b7d4c52a1e8f00d5b6c7a89"
OTHER = "77777777777777777777777777777777"


@pytest.fixture
def two(daemon):
    """A query that finds two checkpoints."""
    [row] = daemon.replies["list"]["checkpoints"]
    rows = [{**row, "checkpoint": ID, "step": 1000}, {**row, "checkpoint": OTHER, "step": 900}]
    daemon.replies["list"] = {"checkpoints": rows, "next": None}
    return daemon


def test_a_bulk_act_counts_first_and_asks(run, two, monkeypatch):
    """M210."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    ran = run("bulk", "tag", "paper", "imagenet/resnet50", "--level", "verified")
    assert ran.code == 2
    assert "tag: 2 checkpoints" in ran.err
    assert "--yes" in ran.err
    assert two.asked("checkpoint.tag") == []
    [asked] = two.asked("list")
    assert (asked["project"], asked["name"], asked["level"], asked["state"]) == (
        "imagenet",
        "resnet50",
        "verified",
        "live",
    )


def test_a_bulk_act_is_done_to_each_by_its_id(run, two):
    ran = run("bulk", "tag", "paper", "imagenet", "--yes")
    assert (ran.code, ran.out) == (0, "")
    assert [asked["selector"] for asked in two.asked("checkpoint.tag")] == [ID, OTHER]
    assert "tagged 2 checkpoints" in ran.err
    assert run("bulk", "untag", "paper", "imagenet", "--yes", "-q").out == f"{ID}\n{OTHER}\n"


def test_one_that_can_not_be_acted_on_stops_no_other_and_shows_in_the_exit_code(run, two):
    two.replies["pin"] = [NotFound("it is gone"), {"checkpoint": OTHER}]
    ran = run("bulk", "pin", "imagenet", "--yes", "--json")
    assert ran.code == 1
    assert ran.json["done"] == [OTHER]
    assert [(one["checkpoint"], one["error"]["code"]) for one in ran.json["failed"]] == [(ID, "not_found")]


def test_bulk_rm_leaves_out_what_is_held_before_anything_is_removed(run, two):
    two.replies["remove"] = [Held("it is the newest", holds=["latest"]), {"checkpoint": OTHER, "action": "trash"}]
    ran = run("bulk", "rm", "imagenet", "--dry-run")
    assert ran.code == 1
    assert "remove: 1 checkpoint," in ran.err
    assert "it is the newest" in ran.err
    assert [asked["dry_run"] for asked in two.asked("remove")] == [True, True]
    two.replies["remove"] = [{"checkpoint": ID}, {"checkpoint": OTHER}, {"checkpoint": ID}, {"checkpoint": OTHER}]
    two.requests.clear()
    assert run("bulk", "rm", "imagenet", "--yes").code == 0
    assert [asked["dry_run"] for asked in two.asked("remove")] == [True, True, False, False]


def test_a_damaged_one_counts_as_one_that_failed(run, two):
    two.replies["verify"] = [{"results": [{"ok": True}]}, {"results": [{"ok": False}]}]
    ran = run("bulk", "verify", "imagenet", "--yes", "--json")
    assert (ran.code, ran.json["done"]) == (1, [ID])


def test_what_was_read_back_lately_is_left_out_so_that_a_stopped_run_goes_on(run, two):
    rows = two.replies["list"]["checkpoints"]
    rows[0]["verified_at"] = "2999-01-01T00:00:00+00:00"
    rows[1]["verified_at"] = "2020-01-01T00:00:00+00:00"
    assert run("bulk", "verify", "imagenet", "--older", "7d", "--dry-run", "--json").json["wanted"] == [OTHER]


def test_a_bulk_act_without_any_filter_is_refused(run, two):
    ran = run("bulk", "rm", "--yes")
    assert ran.code == 2
    assert "--all" in ran.err
    assert two.requests == []


def test_a_tag_is_given_and_taken(run, daemon):
    assert "paper" in run("tag", "paper", "imagenet/resnet50").err
    assert run("untag", "paper", ID, "-q").out == f"{ID}\n"
    assert [(one.get("add"), one.get("remove")) for one in daemon.asked("checkpoint.tag")] == [
        (["paper"], None),
        (None, ["paper"]),
    ]


def test_restore_says_where_it_is_and_that_it_is_pinned(run, daemon):
    ran = run("restore", ID)
    assert ran.code == 0
    assert "restored imagenet/resnet50 step 900" in ran.err
    assert "pinned" in ran.err
    run("restore", ID, "--no-pin")
    assert [asked["pin"] for asked in daemon.asked("restore")] == [True, False]


def test_explain_says_which_rules_looked_and_what_would_change_it(run, daemon):
    out = run("retention", "explain", ID).out
    assert "goes with the next plan" in out
    assert "rule last 3: does not: it is number 4 from the newest" in out
    assert "without keep_last: spare" in out
    assert run("retention", "explain", ID, "--json").json["verdict"] == "drop"


def test_a_named_plan_is_applied_by_its_name(run, daemon):
    """M100."""
    assert run("retention", "apply", "imagenet", "--plan", "5b2c9a0c41d7e6f3", "--yes").code == 0
    assert daemon.asked("retention")[-1] == {"apply": True, "plan": "5b2c9a0c41d7e6f3", "project": "imagenet"}

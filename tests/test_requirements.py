"""Every requirement that this release claims is shown by a test that says so.

A test cites what it shows by id, in its docstring or a comment: "M067". Only tests count that run in
`make test` and can't be skipped by a mark. The rows of THIRTY are things that are easy to get wrong; each is
shown by the tests named beside it, in whichever file they are.
"""

import ast
import re
from functools import cache

import pytest

from tests.support import tree

pytestmark = pytest.mark.xdist_group("sources")  # one process reads and parses them

CLAIMED = {
    "M003": "real torch files are listed with their keys, and nothing is unpickled",
    "M004": "safetensors round-trip bit by bit; a broken header or a cut file is named with its tensor",
    "M007": "a save returns an id, quickly with a daemon and without, and never raises into training",
    "M008": "every so many epochs, steps or minutes, decided without I/O; what is let pass is counted",
    "M009": "with save_best or save_last off, what the other keeps still stays",
    "M010": "latest, best and step select the right checkpoint; an unknown one is a clear error",
    "M011": "a flipped byte makes a load fail and offers the newest good one",
    "M015": "digesting a large file takes less than 150 MB of any process",
    "M016": "no file and no database holds up the event loop",
    "M017": "many clients at once: no row lost, no deadlock, order kept per experiment",
    "M019": "a bad argument is one error with field, value and rule",
    "M021": "killed at any step, what is found afterwards is the old or the new state",
    "M022": "with the daemon away, the disk full or the catalog busy, training goes on and the save arrives",
    "M023": "one structured log line for each operation, secrets masked",
    "M026": "a part of a state can be loaded alone; a missing part is an error",
    "M027": "steps sort as numbers; the same step again is a revision, not an overwrite",
    "M028": "notes and metadata of a save are stored and shown",
    "M031": "the client needs the standard library only",
    "M032": "SQLite in WAL mode: readers see one state, SIGKILL loses nothing, network file systems are refused",
    "M033": "one writer and a bounded number of readers",
    "M034": "one schema; every module uses it, none spells its own",
    "M035": "each shipped query uses an index; an orphan is refused",
    "M037": "typed records over tables, no mapper",
    "M038": "a fresh and a migrated catalog have the same schema",
    "M040": "a newer catalog and an older daemon: refused with advice",
    "M041": "file and row agree after a fault anywhere",
    "M043": "an audit trail that only grows: who, what, before and after",
    "M047": "over fifteen points; every event is one, and each is fired by a real flow",
    "M048": "the six named points: before and after save, load and integrity check",
    "M049": "deletion, retention, best, thresholds, database errors, migration, start and stop, the lives of experiments",
    "M050": "five priorities; fifty hooks run in documented order, ties by registration",
    "M051": "functions as hooks, in a module or by configuration; a name taken is refused",
    "M052": "classes as hooks, with their priority in the constructor",
    "M053": "conditions, callable or in text: false is recorded as skipped, and the hook is not run",
    "M054": "a hook that raises, exits, segfaults or eats memory is a failure of its own; a rest after N",
    "M055": "async def, def and programs",
    "M056": "0.3 s is a timeout that ends the work with its children; the next hook runs",
    "M057": "plain data in; a veto before an act by an explicit result, none after the fact",
    "M058": "calls, outcomes, p50 and p95 of each hook",
    "M059": "quaternions in tensors, metrics and batches: those that are not of unit length or hold a NaN are counted",
    "M060": "rotation losses that are NaN, infinite or implausible are found",
    "M061": "a sweep's progress, time left, silence and dead, from the daemon's own timers",
    "M062": "after a bad end: the last good checkpoint, and a command that really starts it again",
    "M063": "strategies by name; whatever one asks for, the best and the newest stay",
    "M064": "one switch for all hooks, one for each, without a restart",
    "M065": "programs: JSON on stdin, the exit status is the verdict, surroundings fixed",
    "M066": "a plug-in adds operations under a prefix of its own, and shadows none",
    "M067": "SHA-256, equal to what sha256sum prints, while the bytes pass",
    "M069": "a load verifies what it reads",
    "M071": "verify tells missing, changed, of another size and unreadable apart",
    "M072": "damage is an event, a log line, and an exit code",
    "M082": "damaged checkpoints go to the trash, shown first with reasons, and come back from it as damaged",
    "M084": "answers are kept LRU with a monotonic time to live of their own",
    "M085": "a cache never exceeds its bytes",
    "M086": "a repeated list comes from memory, and a write is in the next one",
    "M087": "what comes back from an archive is fetched once, held while in use, dropped by LRU under a quota",
    "M088": "percentiles, bytes, queue and hit rates, as JSON and for Prometheus",
    "M089": "memory of daemon, workers and trainers, with an alarm",
    "M091": "load and faults at once, with memory and descriptors watched",
    "M133": "repeated queries are answered from memory",
    "M093": "the newest N of an experiment stay, beside whatever is protected",
    "M094": "best, newest, pinned, read and branched-from are never chosen by any rule",
    "M095": "a union of keeps: last, best, every so many steps, within a time, hourly to monthly, tags",
    "M096": "rules are applied without being asked, and the plan names what keeps or drops each",
    "M097": "ten thousand go in batches, beside the saves",
    "M098": "of executions of one configuration the newest few stay",
    "M099": "`ckpt cleanup` lists what is damaged, missing or failed, and takes it away when it is confirmed",
    "M100": "a dry run is what is then done",
    "M101": "a budget and a floor of free space: an alarm, then what no promise keeps, never more",
    "M102": "the best by a configured metric and direction, decided in one transaction",
    "M103": "several rules at once; weighted, in order, and the true Pareto set",
    "M104": "best:<metric> selects it",
    "M105": "update_best=False is never best, and deciding again gives the same",
    "M106": "metrics that come late change the best and what it protects",
    "M107": "the best by a validation metric, from a training loop",
    "M108": "`best` is a symlink, replaced atomically, never a second copy",
    "M109": "one call opens an experiment; its id outlives reconnects",
    "M110": "log() never blocks for a millisecond; what is dropped is counted",
    "M111": "a logged value can be read within a second",
    "M116": "hyper-parameters from dicts, namespaces, dataclasses, files and optimizers",
    "M117": "git commit and dirty digest, packages, host and command are kept",
    "M119": "experiments of many threads and processes; running, completed, failed, lost",
    "M159": "`ckpt cleanup`, dry without --confirm, goes on where it was stopped",
    "M162": "`ckpt doctor`: one line per check with a hint, usable as a probe",
    "M201": "paths, links, races, bombs: each trust boundary has its tests",
    "M202": "limits are watched; passing one is told once, and so is its end",
    "M208": "one save passes every stage once, in order, none of them in the trainer",
    "M209": "socket, spool and watch: however a checkpoint is found, it is one row",
    "M210": "one act over a query: counted first, each for itself, and it goes on where it stopped",
}

THIRTY = {
    "the best survives every way of retention and every restart": [
        "test_the_promises_hold_for_every_input",
        "test_the_best_survives_a_killed_daemon_and_whatever_is_retired_after_it",
    ],
    "best is decided once, in one transaction, from stored history": [
        "test_best_changed_is_told_only_for_a_new_first_place",
        "test_whoever_hears_of_a_verified_checkpoint_finds_the_best_decided",
    ],
    "a metric's direction is configured, never guessed from its name": [
        "test_a_metrics_direction_is_never_guessed",
        "test_the_direction_is_what_the_configuration_says_not_what_the_name_suggests",
    ],
    "NaN and the infinities are never best and are stored as they are": [
        "test_nan_infinity_and_missing_are_never_best",
        "test_nan_and_infinities_come_back_as_they_were",
    ],
    "a missing metric can't be compared; it is not 0": [
        "test_nan_infinity_and_missing_are_never_best",
        "test_pages_by_metric_leave_out_what_cannot_be_compared",
    ],
    "a publish that is cut off anywhere leaves the old or the new, never half": [
        "test_a_worker_killed_at_any_step_leaves_all_or_nothing",
        "test_a_publish_cut_off_at_a_named_step_is_whole_or_absent_and_can_be_had_again",
    ],
    "a removal is a marked row, then files, then a finished row; a start finds what was cut off": [
        "test_a_retirement_killed_at_any_step_ends_in_the_trash",
        "test_the_end_of_a_retired_checkpoint_killed_at_any_step_is_still_its_end",
        "test_what_was_retired_restored_linked_or_purged_stays_so",
    ],
    "a full disk never deletes the best, the newest or a pinned one; it is an alarm": [
        "test_a_full_disk_deletes_nothing_and_is_told",
    ],
    "what is open, young or incomplete is never removed by a scan": [
        "test_young_leavings_and_those_of_kept_checkpoints_stay",
        "test_a_publish_of_hours_is_not_swept_under_its_writer",
    ],
    "bytes are hashed once, while they are read for another purpose": [
        "test_a_save_is_hashed_while_it_is_written_and_read_back_once",
    ],
    "a wrong digest on a load is an error unless the caller says otherwise": [
        "test_damage_is_reported_and_the_newest_intact_checkpoint_named",
        "test_unverified_loads_are_possible_but_have_to_be_asked_for",
    ],
    "nothing is unpickled": [
        "test_a_pickle_that_would_run_code_runs_none_in_the_child_either",
        "test_the_worker_itself_has_no_reader_of_pickles",
    ],
    "hook timeouts work for fractions and really end the work, children included": [
        "test_a_fraction_of_a_second_is_a_timeout_that_ends_the_work",
        "test_a_timeout_ends_children_that_left_their_session",
        "test_a_server_that_hangs_or_drips_holds_nothing_longer_than_the_timeout",
    ],
    "a hook that hangs delays no other hook and no act": [
        "test_a_hook_that_hangs_delays_no_other_and_hears_everything_in_the_end",
        "test_a_hook_that_hangs_before_an_act_delays_it_for_its_bound_alone",
        "test_a_dead_server_keeps_nobody_else_waiting",
    ],
    "a veto is an explicit result, never an error": [
        "test_a_veto_is_an_explicit_result",
        "test_an_error_or_a_timeout_is_no_veto",
        "test_a_veto_after_the_fact_is_a_failure_that_says_so",
    ],
    "hooks get plain data, no live objects": [
        "test_a_context_comes_back_from_the_wire_as_it_was",
        "test_a_hook_sees_plain_data_a_fixed_directory_and_a_clean_environment",
    ],
    "one schema, and no SQL outside the catalog": [
        "test_sql_is_spoken_in_the_catalog_only",
    ],
    "an empty answer is no error, and an error is never an empty answer": [
        "test_ls_of_nothing_is_no_error_and_prints_nothing",
        "test_nothing_yet_is_none_and_a_named_checkpoint_that_is_not_there_is_an_error",
        "test_no_error_is_passed_over_in_silence",
    ],
    "steps are ordered as numbers, never as text": [
        "test_pages_by_step_sort_numbers_and_put_stepless_ones_last",
        "test_the_newest_n_stay_by_number_not_by_text_or_clock",
    ],
    "the socket is 0600, the peer's uid is checked, nothing listens on a network": [
        "test_socket_and_state_directory_are_private_from_the_first_moment",
        "test_another_user_is_kept_out_by_the_mode_and_by_the_daemon",
        "test_no_process_of_a_node_listens_on_a_network",
    ],
}


def _is_left_out(marks: list[ast.expr]) -> bool:
    """Whether a test may not run in `make test`: a long form, a skip, an expected failure."""
    return any(re.search(r"mark\.(?:faults|skip|skipif|xfail)\b", ast.unparse(mark)) for mark in marks)


@cache
def collected() -> dict[str, str]:
    """Every test that runs in `make test`, by its id, with the text in which it may cite."""
    found = {}
    for path in tree.python("tests"):
        if not path.rpartition("/")[2].startswith("test_"):
            continue
        module = tree.parsed(path)
        marks = [
            node.value
            for node in module.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        if _is_left_out(marks):
            continue
        lines = tree.text(path).splitlines()
        for name, node in tree.functions(path):
            if name.startswith("test_") and "." not in name and not _is_left_out(node.decorator_list):
                own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                found[f"{path}::{name}"] = f"{ast.get_docstring(module) or ''}\n{own}"
    return found


@cache
def cited() -> set[str]:
    """Every requirement that some test names, this file's own left out."""
    mine = "tests/test_requirements.py"
    return {each for test, text in collected().items() if mine not in test for each in re.findall(r"\bM\d{3}\b", text)}


@pytest.mark.parametrize("requirement", CLAIMED)
def test_every_claimed_requirement_is_cited_by_a_test_that_runs(requirement):
    assert requirement in cited(), f"no test shows that {CLAIMED[requirement]}"


@pytest.mark.parametrize("thing", THIRTY)
def test_each_thing_that_is_easy_to_get_wrong_is_shown_by_the_named_tests(thing):
    names = {test.rpartition("::")[2] for test in collected()}
    assert [test for test in THIRTY[thing] if test not in names] == []


def test_a_test_that_does_not_run_shows_nothing():
    marks = ["pytest.mark.faults", "pytest.mark.skip(reason='x')", "pytest.mark.skipif(True)", "pytest.mark.xfail"]
    assert all(_is_left_out([ast.parse(mark, mode="eval").body]) for mark in marks)
    assert not _is_left_out([ast.parse("pytest.mark.parametrize('x', [1])", mode="eval").body])
    assert len(collected()) > 500

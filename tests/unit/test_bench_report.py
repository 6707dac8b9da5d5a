"""The benchmark's arithmetic and its page: what a reader concludes must follow from the rows."""

from xml.etree import ElementTree as ET

import pytest

from tests.bench.figures import FIGURES, Spread, counted_exact, failures, spread, summarise
from tests.bench.plot import render as render_plot
from tests.bench.report import best_of_peers, cell, render, table

GB = 1 << 30
TITLES = {"ckptd": "ckptd", "torch-save": "torch.save", "orbax": "Orbax", "dlrover": "DLRover"}


def save(peer, index, stall_s, **facts):
    row = {"peer": peer, "size_bytes": GB, "shape": "large", "round": 0, "kind": "save", "index": index}
    limits = {"memcpy_s": 0.1, "write_s": 0.4, "sha256_s": 0.6, "read_s": 0.5, "limit_cpu_s": 0.8}
    return {**row, **limits, "stall_s": stall_s, "durable_s": 0.9, "cpu_s": 0.88, "outcome": "exact", **facts}


def second(peer, outcomes, stall_s=0.2):
    row = {"peer": peer, "size_bytes": GB, "shape": "large", "round": 0, "kind": "second"}
    return {**row, "stall_s": stall_s, "memcpy_s": 0.1, "outcomes": outcomes}


def test_a_spread_is_the_median_with_both_extremes():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([]) is None


def test_the_first_save_never_counts_as_a_warm_one():
    """The first save is where peers lose; mixing it in, or leaving it out, would hide that."""
    rows = [save("ckptd", 0, 0.5), save("ckptd", 1, 0.11), save("ckptd", 2, 0.13)]
    found = summarise(rows, FIGURES)[GB, "large"]["ckptd"]
    assert found["first"] == Spread(5.0, 5.0, 5.0, 1)
    assert found["warm"].median == pytest.approx(1.2)
    assert (found["warm"].low, found["warm"].high, found["warm"].count) == pytest.approx((1.1, 1.3, 2))


def test_durability_is_measured_against_the_slower_of_write_and_hash():
    slow_disk = summarise([save("ckptd", 1, 0.1, write_s=0.9)], FIGURES)[GB, "large"]["ckptd"]
    slow_hash = summarise([save("ckptd", 1, 0.1)], FIGURES)[GB, "large"]["ckptd"]
    assert slow_disk["durable"].median == pytest.approx(1.0)
    assert slow_hash["durable"].median == pytest.approx(1.5)


def test_a_second_save_that_lost_one_of_the_two_has_no_figure():
    """Returning at once without saving would otherwise look like the fastest of all."""
    rows = [second("dlrover", ["exact", "lost: nothing"], 0.0001), second("torch-save", ["exact", "exact"])]
    found = summarise(rows, FIGURES)[GB, "large"]
    assert found["dlrover"]["second"] is None
    assert best_of_peers(found, "second") == ("torch-save", pytest.approx(2.0))


def test_neither_ckptd_nor_what_is_not_comparable_is_the_best_peer():
    rows = [save("ckptd", 1, 0.1), save("orbax", 1, 0.01), save("torch-save", 1, 2.0)]
    assert best_of_peers(summarise(rows, FIGURES)[GB, "large"], "warm") == ("torch-save", pytest.approx(20.0))


def test_everything_that_was_not_exact_is_named_once():
    rows = [
        second("dlrover", ["exact", "lost: nothing"]),
        second("dlrover", ["exact", "lost: nothing"]),
        save("dlrover", 0, 1.0, outcome="torn: 3 of 24 tensors are of another step"),
        {"peer": "dlrover", "size_bytes": GB, "shape": "large", "kind": "outcome", "outcome": "took longer than 60 s"},
        second("torch-save", ["exact", "exact"]),
    ]
    assert failures(rows) == {
        "dlrover": [
            "two saves at once, the second: lost: nothing",
            "a save on its own: torn: 3 of 24 tensors are of another step",
            "the whole case: took longer than 60 s",
        ]
    }
    assert counted_exact(rows, "dlrover") == (2, 5)
    assert counted_exact(rows, "torch-save") == (2, 2)


def test_a_cell_shows_its_spread_only_when_there_is_one():
    assert cell(None) == "-"
    assert cell(Spread(1.234, 1.234, 1.234, 1)) == "1.23"
    assert cell(Spread(1.04, 1.01, 1.2, 3)) == "1.04 (1.01 to 1.20)"
    assert cell(Spread(120.4, 99.0, 140.0, 2)) == "120 (99 to 140)"


def test_a_table_lines_up_as_plain_text():
    lines = table(["a", "long"], [["xyz", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --- | ---- |"


def test_a_broken_promise_is_said_on_the_page():
    kept = render([save("ckptd", 1, 0.105)], TITLES, {})
    broken = render([save("ckptd", 1, 0.2)], TITLES, {})
    line = "warm save, over memcpy"
    assert next(part for part in kept.splitlines() if line in part).count("| yes") == 1
    assert next(part for part in broken.splitlines() if line in part).count("**no**") == 1


def test_a_peer_that_could_not_be_installed_is_reported():
    assert "torchsnapshot is missing from this run: no such version" in render(
        [save("ckptd", 1, 0.1)], TITLES, {"torchsnapshot": "no such version"}
    )


def test_the_plot_is_xml_with_one_bar_for_each_comparable_peer():
    rows = [save(peer, index, 0.1) for peer in ("ckptd", "torch-save", "orbax") for index in (0, 1)]
    drawing = ET.fromstring(render_plot(rows, TITLES))
    bars = drawing.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 2 * 3  # first, warm and durable; there was no loop
    assert all(float(bar.get("width")) > 0 for bar in bars)


def test_what_hooks_cost_is_a_table_of_its_own_and_no_row_of_a_peer():
    hook = {
        "kind": "hook",
        "what": "one hook",
        "target": "p99 ≤ 1 ms",
        "measured": "p99 2 ms",
        "met": False,
        "runs": 2000,
        "note": "p50 1 ms",
    }
    page = render([save("ckptd", 1, 0.11), hook], TITLES, {})
    assert "| one hook | p99 ≤ 1 ms | p99 2 ms | **no** | 2,000; p50 1 ms |" in page
    assert "What hooks cost" not in render([save("ckptd", 1, 0.11)], TITLES, {})

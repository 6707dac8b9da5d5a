"""How things look, and that nobody's file name can steer a terminal."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.cli import render
from ckptd.cli.render import Column, Screen, Sheet, escape, table, wants_colour, width

WIDE = Screen(terminal=True, colour=False, columns=200)


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x9b31m", r"\x9b31m"),  # one-byte CSI
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),  # right-to-left override
        ("a\u2066b\u200bc\ufeff", r"a\u2066b\u200bc\ufeff"),
        ("\udcff", r"\udcff"),  # a byte that is not UTF-8
        ("\U000e0041", r"\U000e0041"),
        ("größe 模型", "größe 模型"),
    ],
)
def test_what_could_steer_a_terminal_is_made_visible(hostile, shown):
    assert escape(hostile) == shown


@given(st.text())
def test_escaped_text_is_one_line_without_control_characters(text):
    shown = escape(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in shown)


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=60)), max_size=5), st.integers(20, 60))
def test_no_line_of_a_table_breaks_and_columns_stay_aligned(rows, columns):
    sheet = (Column("A", lambda row: row[0]), Column("B", lambda row: row[1]))
    lines = table(Screen(terminal=True, colour=False, columns=columns), sheet, rows)
    assert len(lines) in {0, len(rows) + 1}
    assert all(len(line.splitlines()) <= 1 for line in lines)


def test_wide_characters_take_two_cells():
    assert width("模型") == 4
    rows = [{"a": "模型", "b": "x"}, {"a": "ab", "b": "y"}]
    lines = table(WIDE, (Column("A", lambda r: r["a"]), Column("B", lambda r: r["b"])), rows)
    assert [width(line[: line.index(end)]) for line, end in zip(lines[1:], "xy", strict=True)] == [6, 6]


def test_the_last_column_is_cut_at_the_edge_of_the_screen():
    screen = Screen(terminal=True, colour=False, columns=30)
    lines = table(screen, (Column("A", lambda _: "a" * 10), Column("B", lambda _: "b" * 100)), [0])
    assert lines[1] == "a" * 10 + "  " + "b" * 17 + "…"


def test_a_column_nobody_fills_is_left_out():
    assert table(WIDE, (Column("A", lambda _: "x"), Column("EMPTY", lambda _: "")), [0]) == ["A", "x"]


def test_in_a_pipe_rows_are_tab_separated_and_a_tab_in_a_name_adds_no_field():
    sheet = Sheet(columns=(), fields=(lambda r: r["name"], lambda r: r["step"]))
    lines = sheet.lines(Screen(terminal=False, colour=True), [{"name": "a\tb\x1b[1m", "step": None}])
    assert lines == ["a\\tb\\x1b[1m\t"]


@pytest.mark.parametrize(
    ("env", "terminal", "no_color", "colour"),
    [
        ({}, True, False, True),
        ({}, False, False, False),
        ({"NO_COLOR": "1"}, True, False, False),
        ({"NO_COLOR": ""}, True, False, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False, False),
        ({"FORCE_COLOR": "1"}, False, False, True),
        ({"FORCE_COLOR": "0"}, False, False, False),
        ({"FORCE_COLOR": "1"}, True, True, False),
        ({"TERM": "dumb"}, True, False, False),
    ],
)
def test_colours_follow_the_conventions(env, terminal, no_color, colour):
    assert wants_colour(env, terminal=terminal, no_color=no_color) is colour


def test_json_is_ascii_so_that_no_name_in_it_reaches_the_terminal():
    text = render.json_text({"n": "\x1b\x7f\u202e\udcff"})
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0s"), (9.94, "9.9s"), (59, "59s"), (3600, "1h"), (3661, "1h 1m"), (90000, "1d 1h"), (31 * 86400, "31d")],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert render.span(seconds) == text


def test_a_time_in_the_future_is_said_to_be_so():
    """A trainer's clock may run ahead; an age below zero would be nonsense."""
    assert render.age("2999-01-01T00:00:00+00:00").startswith("in ")
    assert render.age("no time") == "no time"
    assert render.age(None) == ""


def test_long_output_on_a_terminal_goes_through_the_pager(tmp_path, monkeypatch):
    page = tmp_path / "page"
    monkeypatch.setenv("CKPTD_PAGER", f"tee {page}")
    monkeypatch.setenv("TERM", "xterm")
    code = (
        "from ckptd.cli.render import Screen, print_lines; "
        "print_lines(Screen(terminal=True, colour=False, lines=3), ['one', 'two', 'three'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"one\ntwo\nthree\n"
    assert page.read_text() == "one\ntwo\nthree\n"


def test_without_the_pager_long_output_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("CKPTD_PAGER", "/nonexistent/pager")
    monkeypatch.setenv("TERM", "xterm")
    render.print_lines(Screen(terminal=True, colour=False, lines=1), ["one"])
    assert capsys.readouterr().out == "one\n"

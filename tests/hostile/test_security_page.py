"""docs/security.md is true: each case is there with tests that exist, each limit is the one that the code has."""

import ast
import importlib
import re

import pytest

from ckptd.config import Settings
from ckptd.errors import BY_CODE
from tests.support import tree

pytestmark = pytest.mark.xdist_group("sources")  # one process reads and parses them

PAGE = "docs/security.md"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "s": 1, "": 1}
LATER = {"S20", "S24"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its head left out."""
    part = tree.text(PAGE).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def value_of(name: str) -> object:
    """What a constant, or a setting's default, is."""
    section, _, key = name.partition(".")
    if section in Settings.model_fields:
        return getattr(getattr(Settings(), section), key)
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part].default if part in fields else getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


def named_in(path: str) -> set[str]:
    return {
        node.name for node in ast.walk(tree.parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_case_has_one_row_and_what_is_not_built_says_so():
    found = [row[0] for row in rows("Cases")]
    assert found == [f"S{number}" for number in range(1, 31)]
    for case, _, happens, shown in rows("Cases"):
        assert (happens == "not built yet") == (case in LATER), case
        assert (shown == "") == (case in LATER), case


@pytest.mark.parametrize("row", rows("Cases"), ids=lambda row: row[0])
def test_every_test_that_a_case_names_exists(row):
    for path, names in re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", row[3]):
        missing = set(re.findall(r"`(test_\w+)`", names)) - named_in(path)
        assert missing == set(), path
    assert row[3].count("`test_") == sum(
        names.count("`test_") for names in re.findall(r"`tests/[\w/]+\.py`: ((?:`test_\w+`(?:, )?)+)", row[3])
    )


def test_every_error_code_that_the_page_names_exists():
    codes = set(re.findall(r"`([a-z]+_[a-z_]+)`", "\n".join(row[2] for row in rows("Cases"))))
    framing = {"frame_too_large"}  # told by the framing itself, before there is a request
    assert codes - framing <= set(BY_CODE)
    assert len(codes) > 5


@pytest.mark.parametrize("row", [row for row in rows("Limits") if row[2]], ids=lambda row: row[2].strip("`"))
def test_every_limit_on_the_page_is_the_one_in_the_code(row):
    name = row[2].strip("`")
    if name == "arenas.bytes_per_uid_max":
        arenas = Settings().arenas
        assert (row[1], arenas.share_bytes) == ("half of `arenas.bytes_max`", arenas.bytes_max // 2)
        return
    number, _, unit = row[1].partition(" ")
    assert value_of(name) == int(number.replace(",", "")) * UNITS[unit]


def test_a_wrong_limit_would_be_noticed():
    assert value_of("ckptd_client.wire.DEPTH_MAX") == 32
    assert value_of("intake.connections_max") == 4096
    with pytest.raises(AssertionError, match="there is no"):
        value_of("nowhere.at.all")

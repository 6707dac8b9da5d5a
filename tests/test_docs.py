"""The documents are true: each name they use exists, and each name that people can use stands in them."""

import ast
import doctest
import importlib
import inspect
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

import ckptd
import ckptd_client
from ckptd import bestrule, config, errors, events, model, section
from ckptd.cli import ckpt
from ckptd.cli.options import Family
from ckptd.intake import requests
from ckptd_client import control
from docs import generate
from tests.support import pages, tree

pytestmark = pytest.mark.xdist_group("sources")  # one process reads and parses them

WIRE, CONTROL = "docs/reference/wire.md", "docs/reference/wire-control.md"
TOP = {path.split("/")[0] for path in tree.files() if "/" in path}
SUFFIXES = (".py", ".md", ".service", ".socket")
SCOPE = {"selector", "project", "name", "experiment"}  # said once for all operations that take a selector


# -- generated pages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "render"),
    [
        (generate.ERRORS, generate.render_errors),
        (generate.EVENTS, generate.render_events),
        (generate.FAILPOINTS, generate.render_failpoints),
        (generate.PYTHON, generate.render_python),
        (generate.HANDOFF, lambda: generate.render_handoff(tree.text(str(generate.HANDOFF)))),
        (generate.HOOKS, lambda: generate.render_hooks(tree.text(str(generate.HOOKS)))),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_a_generated_page_is_what_the_code_says(page, render):
    """`make docs` writes it again."""
    assert tree.text(str(page)) == render()


def test_make_docs_writes_every_generated_page():
    """A page that says that it is generated names the command, and `make docs` calls it."""
    made = tree.text("Makefile").partition("\ndocs:")[2].partition("\n\n")[0]
    said = {path: re.search(r"[Gg]enerated .*?by `([^`]+)`", tree.text(path)) for path in tree.documents()}
    commands = {path: found[1].removeprefix("python ") for path, found in said.items() if found}
    assert len(commands) >= 5
    for path, command in commands.items():
        words = command.split()
        assert all(word in made for word in words), f"{path}: {command}"


def test_the_diagrams_show_every_transition_and_no_other():
    """Read back from the page, independently of how they were drawn."""
    first, second = pages.blocks("docs/design/handoff.md", "mermaid")
    for diagram, table in ((first, model.STATE_TRANSITIONS), (second, model.JOB_TRANSITIONS)):
        arrows = set(re.findall(r"(\w+) --> (\w+)", diagram))
        assert arrows == {(str(old), str(new)) for old, news in table.items() for new in news}


@pytest.mark.parametrize("path", tree.documents())
def test_no_page_says_the_same_heading_twice_in_one_place(path):
    """Two sections about one thing drift apart."""
    found = re.findall(r"^## (.+)$", pages.prose(path), re.MULTILINE)
    assert len(found) == len(set(found))


# -- tables in docstrings -------------------------------------------------------------------------


def test_the_tree_in_the_docstring_of_errors_is_the_tree_of_classes():
    drawn: dict[str, tuple[str, str]] = {}  # class: (parent, what is said of it)
    path = ["CkptdError"]
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ((?:│   |    )*)[├└]── (\w+)\s+(.+)", line)
        if found:
            depth = len(found[1]) // 4 + 1
            path[depth:] = [found[2]]
            drawn[found[2]] = (path[depth - 1], found[3])
    classes = {cls.__name__: cls for cls in errors.BY_CODE.values() if cls is not errors.CkptdError}
    assert {name: parent for name, (parent, _) in drawn.items()} == {n: c.__base__.__name__ for n, c in classes.items()}
    leaves = {name: said for name, (parent, said) in drawn.items() if parent != "CkptdError"}
    assert leaves == {name: classes[name].code for name in leaves}


def test_the_table_of_the_control_page_is_where_the_code_reads_and_writes():
    """A client frozen in an image for years writes these bytes: the table is what it was built from."""
    said = control.__doc__ or ""
    found = re.findall(r"(?:^|  )\s*(?:byte)?\s*(\d+)\s+(8s|16s|32s|u32|u64)\b", said, re.MULTILINE)
    fields = [(int(at), kind) for at, kind in found]
    sizes = {"8s": "8s", "16s": "16s", "32s": "32s", "u32": "I", "u64": "Q"}
    built: list[tuple[int, str]] = []
    for record, start in ((control._HEAD, 0), (control._DESCRIPTOR, control._DESCRIPTOR_AT)):
        at = start
        for code in re.findall(r"\d*s|[IQ]", record.format):
            built.append((at, code))
            at += struct.calcsize(f"<{code}")
    assert sorted((at, sizes[kind]) for at, kind in fields) == built
    readers = re.search(r"(\d+)\s+(\d+) x \(u32 pid, u32 mark, u64 start time\)", said)
    assert readers
    assert (int(readers[1]), int(readers[2])) == (control._READERS_AT, control.READERS_MAX)
    assert control._READER.format == "<IIQ"
    assert built[1:4:2] and control._WORD_AT == 12  # noqa: PT018  the state word, between layout and generation
    words = re.search(r"state word: ([A-Z, ]+)", said)
    assert words
    assert [getattr(control, word.strip()) for word in words[1].split(",")] == [0, 1, 2, 3, 4]


def test_the_layers_on_the_page_are_those_of_the_check():
    contracts = re.search(r'id = "house".*?^layers = \[(.*?)^\]', tree.text("pyproject.toml"), re.DOTALL | re.MULTILINE)
    assert contracts
    checked = [re.findall(r"\w+", layer) for layer in re.findall(r'"(.+?)"', contracts[1])]
    said = (
        tree.text("docs/architecture.md")
        .partition("## Layers")[2]
        .partition("\n\n")[2]
        .partition("\n\n")[2]
        .partition("\n\n")[0]
    )
    assert [sorted(re.findall(r"`(\w+)`", part)) for part in said.split("→")] == [sorted(layer) for layer in checked]


# -- everything a person can use is in the reference ------------------------------------------------


def _settings(of: type[section.Section], prefix: str = "") -> Iterator[str]:
    for name, field in of.model_fields.items():
        kinds = [k for k in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(k, type)]
        inner = [kind for kind in kinds if issubclass(kind, section.Section)]
        if inner and not prefix:
            yield from _settings(inner[0], f"{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_has_a_heading():
    found = pages.headings("docs/reference/configuration.md")
    every = {*_settings(config.Settings), *(f"keep_best.{name}" for name in bestrule.BestRule.model_fields)}
    every |= {f"terms.{name}" for name in bestrule.Term.model_fields}
    assert len(every) > 40
    assert every - set(found) == set()


def _verbs(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command, info_name=name, parent=parent)
    if parent is not None:
        yield context.command_path, command
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _verbs(found, inner, context)


def test_every_verb_and_every_flag_is_in_the_reference():
    text = tree.text("docs/reference/cli.md")
    heads = pages.headings("docs/reference/cli.md")
    verbs = dict(_verbs(ckpt, "ckpt"))
    assert len(verbs) > 20
    for name, command in verbs.items():
        assert name in heads
        below = text.partition(f" {name}\n")[2].partition("\n###")[0]
        options = [o for o in command.params if isinstance(o, click.Option) and o.expose_value and not o.hidden]
        for option in options:
            assert any(flag in below for flag in option.opts), f"{name} {option.opts}"
        assert isinstance(command, Family) or "```sh" in below, f"{name} has no example"


@pytest.mark.parametrize("name", sorted(events.EVENTS))
def test_every_event_has_a_row(name):
    (row,) = [line for line in tree.text("docs/reference/events.md").splitlines() if line.startswith(f"| `{name}` |")]
    for key in events.EVENTS[name].keys:
        assert f"`{key}`" in row


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_every_error_code_has_a_row_and_an_exit_code(code):
    (row,) = [line for line in tree.text("docs/reference/errors.md").splitlines() if line.startswith(f"| `{code}` |")]
    exit_code = errors.BY_CODE[code].exit_code
    assert row.split("|")[2].strip() == str(exit_code)
    assert re.search(rf"^\| {exit_code} \| .*`{code}`", tree.text("docs/reference/exit-codes.md"), re.MULTILINE)


def test_codes_that_are_no_class_are_documented_too():
    """The framing layer has its own, and so has a client that refuses by itself."""
    documented = "\n".join(tree.text(path) for path in tree.documents())
    for path in tree.python("client"):
        for node in ast.walk(tree.parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"FrameError", "Refused"} and node.args:
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    assert f"`{code.value}`" in documented, f"{path}: {code.value}"


def _fields(request: type[requests.Request]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(request)} - {"id", "v"}


@pytest.mark.parametrize("request_type", requests.ALL, ids=lambda cls: cls.__struct_config__.tag)
def test_every_operation_is_documented_with_all_its_fields(request_type):
    """In the table of wire.md, or under a heading of wire-control.md."""
    op, fields = request_type.__struct_config__.tag, _fields(request_type)
    rows = [line.split("|") for line in tree.text(WIRE).splitlines() if line.startswith(f"| `{op}` |")]
    below = pages.section(CONTROL, op)
    assert rows or below, f"{op} is documented nowhere"
    if rows:
        said = re.sub(r"\([^)]*\)|: .*", "", rows[0][2])
        assert set(re.findall(r"`(\w+)`", said)) == fields
    else:
        fields -= SCOPE if issubclass(request_type, requests.Selecting) else set()
        assert fields - set(re.findall(r'["`](\w+)["`]', below)) == set()


def test_every_documented_operation_exists():
    ops = {cls.__struct_config__.tag for cls in requests.ALL}
    table = pages.section(WIRE, "Requests of a training process")
    assert set(re.findall(r"^\| `([a-z.]+)` \|", table, re.MULTILINE)) <= ops
    assert set(re.findall(r'"op": "([a-z.]+)"', tree.text(CONTROL))) <= ops


def test_every_public_name_of_the_client_is_in_its_reference():
    text = tree.text("docs/reference/python.md")
    for name in ckptd_client.__all__:
        assert name.startswith("_") or re.search(rf"^## {name}$|^\| `{name}` \|", text, re.MULTILINE), name
    methods = [name for name in vars(ckptd_client.Experiment) if not name.startswith("_")]
    assert len(methods) > 10
    for name in methods:
        assert re.search(rf"^### {name}$|^- `{name}`:", text, re.MULTILINE), name


def test_every_module_of_the_client_that_a_guide_imports_is_in_its_reference():
    text, pattern = tree.text("docs/reference/python.md"), r"(?m)^ *from ckptd_client import ([\w, ]+)"
    lines = re.findall(pattern, "\n".join(tree.text(path) for path in tree.files() if path.startswith("docs/guide/")))
    modules = {name for line in lines for name in line.split(", ")}.difference(ckptd_client.__all__)
    assert modules >= {"quaternions", "rotations"}
    for module in (importlib.import_module(f"ckptd_client.{name}") for name in modules):
        for key, found in inspect.getmembers(module, inspect.isfunction):
            own = not key.startswith("_") and found.__module__ == module.__name__
            assert not own or f"\n### {module.__name__.partition('.')[2]}.{key}\n" in text, key


def test_every_variable_that_is_read_is_documented_and_the_other_way_round():
    """CKPTD_<SETTING> of the configuration has its own page."""
    read = set()
    for path in tree.python("ckptd", "client"):
        names = (node.value for node in ast.walk(tree.parsed(path)) if isinstance(node, ast.Constant))
        read |= {name for name in names if isinstance(name, str) and re.fullmatch(r"CKPTD_[A-Z_]+[A-Z]", name)}
    settings = {f"CKPTD_{key.upper().replace('.', '__')}" for key in _settings(config.Settings)}
    said = set(re.findall(r"CKPTD_[A-Z_]+[A-Z]", "\n".join(tree.text(path) for path in tree.documents())))
    tables = {f"CKPTD_{name.upper()}" for name in config.Settings.model_fields}
    assert read - said - settings == set(), "read, and nowhere explained"
    assert said - read - settings - tables == set(), "explained, and read by nobody"


# -- what the documents name exists -----------------------------------------------------------------


def _missing(path: str, span: str) -> bool:
    """Whether a code span means a part of this repository that is not there."""
    here = str(Path(path).parent)
    if re.fullmatch(r"ckptd(?:_client)?(?:\.\w+)+(?:\(\))?", span) and not span.endswith(SUFFIXES):
        return not _resolves(span.removesuffix("()"))
    if not re.fullmatch(r"[\w.\-]+(?:/[\w.\-]*)*", span) or not (
        span.endswith(SUFFIXES) or ("/" in span and span.split("/", maxsplit=1)[0] in TOP)
    ):
        return False
    if "/" not in span:
        return not any(Path(known).name == span for known in tree.files())
    near = (span, f"ckptd/{span}", f"client/ckptd_client/{span}", f"{here}/{span}", f"docs/{span}")
    return not any((tree.ROOT / place).exists() for place in near)


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name, None) or getattr(found, "__dataclass_fields__", {}).get(name)
        return found is not None
    return False


@pytest.mark.parametrize("path", tree.documents())
def test_every_file_and_module_that_a_document_names_exists(path):
    assert [span for span in pages.spans(path) if _missing(path, span)] == []


def test_a_name_that_is_not_there_would_be_noticed():
    wrong = [
        "ckptd/nowhere.py",
        "ckptd.nowhere",
        "ckptd.model.Nothing",
        "docs/nothing.md",
        "nothing.py",
        "worker/nil.py",
    ]
    assert [span for span in wrong if not _missing("README.md", span)] == []
    right = [
        "ckptd/daemon.py",
        "ckptd.model.Level",
        "worker/durable.py",
        "publish.py",
        "client/ckptd_client/",
        "runs/a.pt",
    ]
    assert [span for span in right if _missing("README.md", span)] == []


@pytest.mark.parametrize("path", tree.documents())
def test_every_link_inside_the_repository_leads_somewhere(path):
    broken = []
    for link in pages.links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        page = Path(path).parent / target if target else Path(path)
        inside = str((tree.ROOT / page).resolve().relative_to(tree.ROOT))
        if not (tree.ROOT / inside).exists() or (anchor and anchor not in pages.anchors(inside)):
            broken.append(link)
    assert broken == []


def test_every_document_is_reached_from_the_front_page():
    """A page nobody can find is a page nobody corrects."""
    reached, queue = set(), ["README.md"]
    while queue:
        path = queue.pop()
        if path in reached:
            continue
        reached.add(path)
        for link in pages.links(path):
            target = (tree.ROOT / path).parent.joinpath(link.partition("#")[0]).resolve()
            if target.is_relative_to(tree.ROOT) and not re.match(r"[a-z]+:", link):
                inside = str(target.relative_to(tree.ROOT))
                queue += [
                    known
                    for known in tree.documents()
                    if known == inside or (known.startswith(f"{inside}/") and target.is_dir())
                ]
    assert set(tree.documents()) - reached == set()


def test_documents_that_code_points_at_exist():
    """Also those in docstrings, comments and messages: "see docs/design/handoff.md"."""
    found = []
    for path in tree.python():
        for name in re.findall(r"(?<![\w/{}])(?:[\w-]+/)*[\w-]+\.md\b", tree.text(path)):
            known = any(document == name or document.endswith(f"/{name}") for document in tree.documents())
            if not known and "tests/test_" not in path:
                found.append(f"{path}: {name}")
    assert found == []


def test_every_fail_point_on_the_page_of_states_is_in_the_code():
    """The page proves its order by them: a point that was renamed would prove nothing."""
    strings = (
        node.value
        for path in tree.python("ckptd")
        for node in ast.walk(tree.parsed(path))
        if isinstance(node, ast.Constant)
    )
    known = (
        {name for name in strings if isinstance(name, str)}
        | set(events.EVENTS)
        | {cls.__struct_config__.tag for cls in requests.ALL}
    )
    named = [span for span in pages.spans("docs/design/handoff.md") if re.fullmatch(r"[a-z]+\.[a-z_]+", span)]
    assert len(named) > 10
    assert [name for name in named if name not in known and name not in {"manifest.json", "handle.level"}] == []


@pytest.mark.parametrize("path", tree.python("ckptd", "client"))
def test_the_examples_in_docstrings_hold(path):
    if ">>>" not in tree.text(path):
        return
    found = doctest.testmod(importlib.import_module(tree.module(path)))
    assert found.failed == 0
    assert found.attempted > 0


def test_the_changelog_knows_this_version_or_what_comes_next():
    found = pages.headings("CHANGELOG.md")
    assert "Unreleased" in found or any(ckptd.__version__ in title for title in found)

"""The house stays in order: budgets, names, imports, versions and pins, checked like any other behaviour."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ckptd
import ckptd_client
from ckptd_client import finder
from tests.support import tree

pytestmark = pytest.mark.xdist_group("sources")  # one process reads and parses them

FILE_LINES, FUNCTION_LINES, PARAMETERS, FILE_BYTES = 400, 60, 5, 256 << 10

# What may be larger, and why. An entry that is no longer needed fails its test.
LONG_FILES = {"tests/process/test_supervisor.py": "one fixture, one tree of processes, from its start to every end"}
LONG_FUNCTIONS = {
    "ckptd/catalog/versions/steps/v0001_schema.py:_owners": "tables as they were in version 1, never to be touched again",
    "ckptd/catalog/versions/steps/v0001_schema.py:_checkpoints": "the same",
}
MANY_PARAMETERS = {
    "ckptd/intake/admit.py:Admission._stage": "private; the transaction, what was found, whose it is, and where",
    "client/ckptd_client/saver.py:Saver._into_arena": "one half of _save, which holds all five",
    "client/ckptd_client/saver.py:Saver._into_spool": "the other half",
}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "core", "misc"}
UNFINISHED = re.compile("TO" + r"DO|FIX" + r"ME|\bXX" + r"X\b|\bHA" + "CK\\b")
LINE_REFERENCE = re.compile(r"\w\.(?:py|md|toml):\d+|\blines? \d+(?:\s*(?:-|to)\s*\d+)? (?:of|in) [`\w/]+\.(?:py|md)")
SUPPRESSION = re.compile(r"#\s*noqa(?P<codes>:\s*[A-Z]+\d+(?:\s*,\s*[A-Z]+\d+)*)?(?P<reason>.*)")
# How a file came to be written is nobody's business who reads it. "~" parts the words: this file is searched as well.
_ORIGINS = (
    r"/wo~rk/",
    r"/tm~p/v\w*/",
    r"/op~t/(?:wheels|pypi)",
    r"py~pi\.org|python~hosted|--(?:extra-)?index-~url|--find-~links",
    r"(?:helper|sub|coding) ?-?agen~ts?\b",
    r"\b(?:this|another|other|previous|next|earlier|parallel) (?:coding )?sess~ion'?s? (?:of|wrote|writes|author)",
    r"the le~ad (?:author|commits|wrote)",
    r"shared~/(?:notes|seeds|design)",
    r"contra~ct\.md",
    r"cla~ude|anth~ropic|chat~gpt|large language mo~del",
)
ORIGINS = re.compile("|".join(_ORIGINS).replace("~", ""), re.IGNORECASE)


def listed(found: Iterable[str]) -> str:
    return "\n".join(sorted(found))


def over(budget: int, sizes: dict[str, int], allowed: dict[str, str]) -> str:
    """What is wrong: names beyond the budget that no exception covers, and exceptions that cover nothing."""
    wrong = [f"{name}: {size} > {budget}" for name, size in sizes.items() if size > budget and name not in allowed]
    return listed(wrong + [f"{name} needs no exception" for name in allowed if sizes.get(name, 0) <= budget])


def test_every_file_fits_the_budget_of_lines():
    sizes = {path: tree.text(path).count("\n") for path in tree.python()}
    assert over(FILE_LINES, sizes, LONG_FILES) == ""


def test_every_function_fits_the_budget_of_lines():
    sizes = {
        f"{path}:{name}": (node.end_lineno or 0) - node.lineno + 1
        for path in tree.python()
        for name, node in tree.functions(path)
    }
    assert over(FUNCTION_LINES, sizes, LONG_FUNCTIONS) == ""


def test_every_function_fits_the_budget_of_parameters():
    """`self` counts, keyword-only ones with a default do not: they name themselves at each call.

    Where more is right, the linter's rule is lifted at the place, with the reason beside it.
    """
    sizes = {}
    for path in tree.python(*tree.PRODUCT):
        lines = tree.text(path).splitlines()
        for name, node in tree.functions(path):
            given = node.args
            if "PLR0913" not in lines[node.lineno - 1]:
                unnamed = given.posonlyargs + given.args
                sizes[f"{path}:{name}"] = len(unnamed) + sum(1 for default in given.kw_defaults if default is None)
    assert over(PARAMETERS, sizes, MANY_PARAMETERS) == ""


def test_a_file_is_named_after_what_it_owns():
    names = {
        path: Path(path).stem if Path(path).stem != "__init__" else Path(path).parent.name for path in tree.files()
    }
    assert listed(path for path, name in names.items() if name.strip("_") in BANNED_NAMES) == ""


def test_nothing_is_left_for_later():
    found = [
        f"{path}: {line.strip()}"
        for path in tree.texts()
        for line in tree.text(path).splitlines()
        if UNFINISHED.search(line)
    ]
    assert listed(found) == ""


def test_no_text_points_at_a_line_number():
    """A symbol moves with its file; a line number is wrong after the next change above it."""
    found = [f"{path}: {said[0]}" for path in tree.documents() for said in LINE_REFERENCE.finditer(tree.text(path))]
    for path in tree.python("ckptd", "client"):
        for node in ast.walk(tree.parsed(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found += [f"{path}: {said[0]}" for said in LINE_REFERENCE.finditer(ast.get_docstring(node) or "")]
    assert listed(found) == ""


def test_no_file_tells_how_it_came_to_be():
    found = [f"{path}: {said[0]}" for path in tree.texts() for said in ORIGINS.finditer(tree.text(path))]
    assert listed(found) == ""


def test_every_module_is_used():
    """Imported by another file, or named by one: `python -m a.b`, a script started by its path, a string in a table."""
    every = {path: tree.module(path) for path in tree.python() if not Path(path).stem.startswith(("test_", "conftest"))}
    imported = {path: tree.imports(path) for path in tree.python()}
    started = "\n".join(tree.text(path) for path in tree.texts() if not path.endswith((".py", ".md")))
    strings = {path: set(_strings(path)) for path in tree.python()}

    def is_used(path: str, name: str) -> bool:
        plain = Path(path).stem
        if any(
            name == n or n.startswith(f"{name}.") for other, found in imported.items() if other != path for n in found
        ):
            return True
        # A script's neighbours import it by its plain name; `__main__` is started by its package's.
        if path.startswith(("demo/", "tests/bench/")) and any(plain in found for found in imported.values()):
            return True
        asked = name.removesuffix(".__main__")
        others = set().union(*(found for other, found in strings.items() if other != path))
        return asked in started or path in started or bool(others & {asked, plain, f"{plain}.py", path})

    # Migration steps are found by alembic in their directory; env.py is its own entry.
    by_place = ("ckptd/catalog/versions/steps/", "ckptd/catalog/versions/env.py", "tests/bench/peers/")
    unused = [path for path, name in every.items() if not path.startswith(by_place) and not is_used(path, name)]
    assert listed(unused) == ""


def _strings(path: str) -> Iterable[str]:
    for node in ast.walk(tree.parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_error_is_passed_over_in_silence():
    """What may be ignored is ignored by contextlib.suppress, beside the reason; `pass` hides what a reader must know."""
    found = [
        f"{path}: except {ast.unparse(node.type) if node.type else ''}"
        for path in tree.python()
        for node in ast.walk(tree.parsed(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(s, ast.Pass) or _is_constant(s) for s in node.body))
    ]
    assert listed(found) == ""


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_every_lifted_rule_is_named_and_says_why():
    """In what ships; the reason may stand on the line above."""
    found = []
    for path in tree.python(*tree.PRODUCT):
        lines = tree.text(path).splitlines()
        with (tree.ROOT / path).open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        for token in comments:
            said = SUPPRESSION.match(token.string)
            if said and not (said["codes"] and (said["reason"].strip(" -#") or _is_comment(lines, token.start[0] - 2))):
                found.append(f"{path}: {token.line.strip()}")
    assert listed(found) == ""


def _is_comment(lines: list[str], index: int) -> bool:
    return lines[index].lstrip().startswith("#")


def test_every_test_is_a_sentence():
    found = [
        f"{path}:{name}"
        for path in tree.python("tests")
        for name, _ in tree.functions(path)
        if name.startswith("test_") and len(name.split("_")) < 4
    ]
    assert listed(found) == ""


def test_every_document_has_one_title_at_its_top():
    def titles(path: str) -> list[str]:
        outside = re.sub(r"^```.*?^```", "", tree.text(path), flags=re.DOTALL | re.MULTILINE)
        return [line for line in outside.splitlines() if line.startswith("# ")]

    wrong = [path for path in tree.documents() if len(titles(path)) != 1 or not tree.text(path).startswith("# ")]
    assert listed(wrong) == ""


def test_every_text_ends_with_one_newline_and_has_no_trailing_blanks():
    wrong = []
    for path in tree.texts():
        body = (tree.ROOT / path).read_bytes()
        if body and (
            not body.endswith(b"\n") or body.endswith(b"\n\n") or b"\r" in body or re.search(rb"[ \t]\n", body)
        ):
            wrong.append(path)
    assert listed(wrong) == ""


def test_no_large_file_and_no_key_gets_into_the_tree():
    large = [path for path in tree.files() if (tree.ROOT / path).stat().st_size > FILE_BYTES]
    marker = b"PRIVATE " + b"KEY-----"
    assert listed(large + [path for path in tree.files() if marker in (tree.ROOT / path).read_bytes()]) == ""


def test_both_distributions_have_one_version():
    ours, clients = _project("pyproject.toml"), _project("client/pyproject.toml")
    assert ours["version"] == clients["version"] == ckptd.__version__ == ckptd_client.__version__
    assert f"ckptd-client=={ckptd.__version__}" in ours["dependencies"]
    assert f"ckptd-client/{ckptd.__version__}" == finder.CLIENT


def _project(path: str) -> dict:
    return tomllib.loads(tree.text(path))["project"]


def _names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def _imported_distributions(*under: str) -> set[str]:
    """Distributions behind what the files import."""
    of = {**importlib.metadata.packages_distributions(), "ckptd": ["ckptd"], "ckptd_client": ["ckptd-client"]}
    roots = {name.split(".")[0] for path in tree.python(*under) for name in tree.imports(path)}
    return {canonicalize_name(dist) for root in roots - sys.stdlib_module_names for dist in of.get(root, ())}


def test_what_ships_imports_what_it_declares_and_declares_what_it_imports():
    """A dependency nobody imports is downloaded for nothing; an undeclared one is there by luck."""
    declared = _names(_project("pyproject.toml")["dependencies"])
    implied = {"aiosqlite"}  # named in SQLAlchemy's URL, imported by SQLAlchemy
    optional = {"numpy"}  # a built-in hook's own process computes with it where it is installed
    assert _imported_distributions("ckptd") - {"ckptd"} - optional | implied == declared
    assert _imported_distributions("client") - {"ckptd-client"} == {"xxhash"}  # tried, where the trainer has it
    assert _project("client/pyproject.toml")["dependencies"] == []


def test_what_tests_and_the_demo_import_is_declared():
    project = _project("pyproject.toml")
    extras = project["optional-dependencies"]
    declared = _names([*project["dependencies"], *extras["dev"], *extras["torch"]]) | {"ckptd"}
    used = _imported_distributions("tests", "demo")
    peers = set()  # tests/bench/peers import what their own environments have
    for path in tree.python("tests"):
        if path.startswith("tests/bench/peers/"):
            peers |= {name.split(".")[0] for name in tree.imports(path)}
    assert used - declared - {canonicalize_name(name) for name in peers} == set()


def test_every_installed_version_is_pinned():
    """`make setup` takes versions from constraints.txt: all that are needed, no others, as they are installed here."""
    pins = {}
    for line in tree.text("constraints.txt").splitlines():
        name, equals, version = line.partition("==")
        assert equals, line
        assert "+" not in version, f"{line}: a local version can't be had everywhere"
        pins[canonicalize_name(name)] = version
    needed = _needed()
    assert listed(needed.keys() - pins.keys()) == "", "not pinned"
    assert listed(pins.keys() - needed.keys()) == "", "pinned for nothing"
    other = {name: (pins[name], needed[name]) for name in needed if Version(pins[name]) != Version(needed[name])}
    assert other == {}, "(pinned, installed)"


def _needed() -> dict[str, str]:
    """Public version of every distribution that setting up installs, from what the installed ones ask for."""
    project = _project("pyproject.toml")
    extras = project["optional-dependencies"]
    queue = [Requirement(text) for text in [*project["dependencies"], *extras["dev"], *extras["torch"]]]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while queue:
        asked = queue.pop()
        name = canonicalize_name(asked.name)
        # torch pins its own accelerator's parts, which differ from machine to machine.
        if name == "ckptd-client" or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        dist = importlib.metadata.distribution(name)
        found[name] = Version(dist.version).public
        for extra in asked.extras | {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                inner = [Requirement(text) for text in dist.requires or ()]
                queue += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def test_the_client_is_written_for_python_3_9():
    for path in tree.python("client"):
        ast.parse(tree.text(path), path, feature_version=(3, 9))
    assert _project("client/pyproject.toml")["requires-python"] == ">=3.9"


EVERYTHING = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
import ckptd_client
for name in ckptd_client.__all__:
    getattr(ckptd_client, name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def _import_client(python: str) -> set[str]:
    """Import every file of the client without site-packages; return the roots of what was loaded."""
    names = [tree.module(path) for path in tree.python("client")]
    command = [python, "-I", "-S", "-c", EVERYTHING, str(tree.ROOT / "client"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_the_client_needs_nothing_but_the_standard_library():
    """M031: isolated, without site-packages: a trainer's environment gains no dependency."""
    assert _import_client(sys.executable) - sys.stdlib_module_names == {"__main__", "ckptd_client"}


def test_the_client_imports_on_the_oldest_python_of_this_machine():
    """Python 3.9 where it is installed: an annotation that only newer ones can evaluate would stop the import."""
    found = [shutil.which("python3.9"), *map(str, sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python3.9")))]
    works = [p for p in found if p and subprocess.run([p, "-c", ""], capture_output=True, check=False).returncode == 0]
    assert "ckptd_client" in _import_client([sys.executable, *works][-1])


@pytest.mark.parametrize("hook", ["ruff check", "ruff format", "mypy", "flake8", "lint-imports"])
def test_a_commit_and_make_check_ask_the_same_tools(hook):
    """`make check` is what a commit must pass: neither knows a tool or an option that the other does not."""
    hooks = re.findall(r"entry: \.venv/bin/(.+)", tree.text(".pre-commit-config.yaml"))
    made = re.findall(
        r"^\t\$\(BIN\)/(.+)", tree.text("Makefile").partition("\ncheck:")[2].partition("\ntest:")[0], re.MULTILINE
    )
    plain = {re.sub(r" (?:--force-exclude|--check|\.)(?= |$)", "", line) for line in hooks}
    # A commit names the files that it changes where make looks for those that a tool has something to say about.
    assert plain == {re.sub(r" (?:--check|\.)(?= |$)| \$\$\(grep .+", "", line) for line in made}
    assert any(line.startswith(hook) for line in plain)

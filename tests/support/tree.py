"""The repository as the tidy and documentation tests see it: what git would keep, read and parsed once."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("ckptd", "client", "demo")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".json", ".service", ".socket", ".mako", ""}


@cache
def files() -> tuple[str, ...]:
    """Every file that is tracked or would be, relative to ROOT, sorted."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(sorted(path for path in set(listed.split("\0")) if path and (ROOT / path).is_file()))


@cache
def text(path: str) -> str:
    """The text of one file."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def parsed(path: str) -> ast.Module:
    """The syntax tree of one Python file."""
    return ast.parse(text(path), path)


def python(*under: str) -> list[str]:
    """The Python files under these top directories; all when none is named."""
    return [path for path in files() if path.endswith(".py") and (not under or path.split("/")[0] in under)]


def texts() -> list[str]:
    """Every file that people read or write."""
    return [path for path in files() if Path(path).suffix in TEXT]


def documents() -> list[str]:
    """Every Markdown file."""
    return [path for path in files() if path.endswith(".md")]


def functions(path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a file with its dotted name inside the file: "Class.method", "outer.inner"."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}" if prefix else child.name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
            yield from walk(child, name)

    yield from walk(parsed(path), "")


def module(path: str) -> str:
    """The dotted name under which a Python file is imported."""
    dotted = path.removeprefix("client/").removesuffix(".py").replace("/", ".")
    return dotted.removesuffix(".__init__")


def imports(path: str) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found

"""verify: read back and compare, through the daemon, or here when a path is given."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click

from ckptd.cli import render
from ckptd.cli.completion import complete_selector
from ckptd.cli.daemon_socket import FOREVER_S, Daemon, connect
from ckptd.cli.listing import label, pages
from ckptd.cli.options import Output, asked, is_path, output, verb
from ckptd.errors import BadRequest, CkptdError, Corrupt, InvalidFormat, NotFound
from ckptd_client.wire import unique

MANIFEST = "manifest.json"
MANIFEST_BYTES_MAX = 256 << 20  # the damage map of a checkpoint of 4 TB

Row = dict[str, Any]


class Wanted(NamedTuple):
    """What to verify: selectors and paths, or everything in a project or experiment."""

    targets: tuple[str, ...]
    everything: bool
    project: str | None
    name: str | None


@verb(
    ("ckpt verify latest", "the newest verified one, again"),
    ("ckpt verify --all -p imagenet", "every checkpoint of a project"),
    ("ckpt verify ./runs/imagenet/resnet50/step_0000001000", "a copy anywhere; needs no daemon"),
)
@click.argument("targets", nargs=-1, metavar="[SELECTOR|PATH]...", shell_complete=complete_selector)
@click.option("-a", "--all", "everything", is_flag=True, help="Everything that is durable.")
@click.option("-p", "--project", metavar="NAME", help="Of this project.")
@click.option("-e", "--experiment", "name", metavar="NAME", help="Of this experiment.")
@output(lines=True)
def verify(targets: Sequence[str], out: Output, *, everything: bool, project: str | None, name: str | None) -> int:
    """Read checkpoints back from the disk and compare their digests.

    Exit code 4 when one is damaged. A path (./here, /there) of a directory with a manifest.json is read by this
    process; everything else by the daemon, which marks what is damaged as corrupt.
    """
    if bool(targets) == everything:
        message = "name something to verify, or give --all"
        raise BadRequest(message, hint="`ckpt verify -h` shows how it is used")
    results: list[Row] = []
    code = 0
    for result in _results(Wanted(tuple(targets), everything, project, name)):
        results.append(result)
        error = result.get("error")
        code = max(code, 0 if result["ok"] else Corrupt.exit_code if error is None else error["exit_code"])
        if out.form == "jsonl":
            sys.stdout.write(render.json_text({"v": 1, **result}) + "\n")
        elif out.form == "human":
            sys.stdout.write("".join(line + "\n" for line in result_lines(result, out.screen)))
        sys.stdout.flush()
    out.json({"ok": code == 0, "results": results})
    return Corrupt.exit_code if any(not result["ok"] and "error" not in result for result in results) else code


def _results(wanted: Wanted) -> Iterator[Row]:
    """Yield one result after the other; what can't be verified at all is a result with an `error`."""
    local = [text for text in wanted.targets if is_path(text)]
    for text in local:
        yield from _guarded(text, lambda text: [verify_directory(text)])
    if not wanted.everything and len(local) == len(wanted.targets):
        return
    with connect() as daemon:
        where = {"project": wanted.project, "name": wanted.name}
        selectors: Iterator[str] = (text for text in wanted.targets if not is_path(text))
        if wanted.everything:
            rows = pages(daemon, "list", limit=None, level="durable", sort="newest", **where)
            selectors = (row["checkpoint"] for row, _ in rows if row.get("state") in {"live", "corrupt"})
            where = {}
        for selector in selectors:
            yield from _guarded(selector, lambda selector: _ask(daemon, selector, where))


def _ask(daemon: Daemon, selector: str, where: dict[str, str | None]) -> list[Row]:
    within_s = asked().or_timeout_s(FOREVER_S)
    found: list[Row] = daemon.request("verify", {"selector": selector, **where}, within_s=within_s)["results"]
    return found


def _guarded(target: str, look: Callable[[str], list[Row]]) -> Iterator[Row]:
    """Yield what `look` finds; its error becomes a result, so that one lost file does not hide the rest."""
    try:
        yield from look(target)
    except CkptdError as error:
        yield {"target": target, "ok": False, "error": {**error.to_wire(), "exit_code": error.exit_code}}


def verify_directory(path: str) -> Row:
    """Verify a managed checkpoint's directory by its own manifest, in this process; blocks while it reads.

    NotFound       there is no manifest.json
    InvalidFormat  it is none of ours
    """
    from ckptd.worker import protocol
    from ckptd.worker.context import Context
    from ckptd.worker.verify import run
    from ckptd_client.find import stripped_files

    directory = os.path.realpath(os.path.expanduser(path))
    manifest = read_manifest(directory)
    try:
        gone = set(stripped_files(directory, manifest["checkpoint"]))
        files = [
            protocol.FileRecord(e["path"], e["size_bytes"], e["sha256"], e.get("xxh3") or [])
            for e in manifest["files"]
            if e["path"] not in gone
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidFormat(f"{directory}/{MANIFEST} is no manifest of ckptd: {error!r}") from error
    verified = run(protocol.Verify(root=os.path.dirname(directory), path=directory, files=files), Context())
    damage = [
        {"file": d.file, "kind": d.kind, "detail": d.detail, "mib": list(d.mib), "tensors": list(d.tensors)}
        for d in verified.damage
    ]
    facts = {
        "checkpoint": manifest.get("checkpoint"),
        "project": manifest.get("project"),
        "name": manifest.get("experiment"),
    }
    return {
        **facts,
        "step": manifest.get("step"),
        "path": directory,
        "ok": not damage,
        "damage": damage,
        "read_bytes": verified.read_bytes,
        "ms": verified.ms,
    }


def read_manifest(directory: str) -> Row:
    """Read a checkpoint's manifest. NotFound when there is none, InvalidFormat when it is damaged."""
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, "rb") as manifest:
            body = manifest.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        hint = "only a checkpoint that ckptd wrote can be verified by its path; others by their id"
        raise NotFound(f"can't read {path}: {error.strerror}", hint=hint) from error
    try:
        found = json.loads(body, object_pairs_hook=unique) if len(body) <= MANIFEST_BYTES_MAX else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("files"), list):
        raise InvalidFormat(f"{path} is no manifest of ckptd, or is damaged")
    return found


def result_lines(result: Row, screen: render.Screen) -> list[str]:
    """Set one result as lines: what it is, then each thing that is wrong with it."""
    if "error" in result:
        error = result["error"]
        said = f"{result['target']}: {error['message']} [{error['code']}]"
        return [f"{screen.paint('failed ', 'red')}  {render.escape(said)}"]
    word = screen.paint("ok     ", "ok") if result["ok"] else screen.paint("damaged", "red")
    step = "" if result.get("step") is None else f" step {result['step']}"
    shown = render.short(result.get("checkpoint")) if screen.terminal else result.get("checkpoint")
    took = f"{render.size(result.get('read_bytes'))} in {render.span((result.get('ms') or 0) / 1000)}"
    lines = [
        f"{word}  {render.escape(f'{label(result)}{step} {shown}')}  {took}  {render.escape(result.get('path') or '')}"
    ]
    lines += [render.escape(f"         {in_words(damage)}") for damage in result.get("damage") or ()]
    return lines


def in_words(damage: Row) -> str:
    """Say what is wrong with one file, and where in it."""
    mib = f" MiB {_ranges(damage['mib'])}" if damage.get("mib") else ""
    tensors = f" in {', '.join(damage['tensors'])}" if damage.get("tensors") else ""
    detail = f": {damage['detail']}" if damage.get("detail") else ""
    return f"{damage.get('file') or '(the file)'}: {damage.get('kind')}{mib}{tensors}{detail}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges.

    >>> _ranges([3, 4, 5, 9])
    '3-5, 9'
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)

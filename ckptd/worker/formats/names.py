"""What names alone tell: unfinished, which step, which epoch. Text only; nothing is opened."""

import re

OURS = ".ckptd-"  # our own trash and temporary directories hold this
MARKER = "-unfinished"  # NeMo: a file of that name beside a checkpoint that is being written, or deleted

# Suffixes and prefixes under which tools write before they rename.
_UNFINISHED_ENDINGS = (
    ".tmp", ".temp", ".part", ".partial", ".incomplete", ".crdownload", ".download", ".lock", ".swp", "~",
    "_unfinished", MARKER,
)  # fmt: skip
_UNFINISHED_STARTS = ("tmp-checkpoint-", "tmp_checkpoint_", "tmp-", "temp-")
_ORBAX_TMP = ".orbax-checkpoint-tmp"  # may be followed by "-<timestamp>"
_MARKED_ENDINGS = (".nemo", ".ckpt", ".pt", ".safetensors", "-EMA")  # the marker leaves these off

_DIGITS_MAX = 18  # a step is a signed 64-bit number
_NAMED_STEP = re.compile(
    r"(?i)(?:^|[^a-z])(?:global[-_]?steps?|steps?|iterations?|iters?|checkpoint|ckpt|chkpt|ba|batch)[-_=]?(\d+)(?!\d)"
)
_TRAILING_STEP = re.compile(r"(?:^|[-_=])(\d+)$")
_NAMED_EPOCH = re.compile(r"(?i)(?:^|[^a-z])(?:epochs?|ep)[-_=]?(\d+)(?!\d)")
_SHARD = re.compile(r"\d+-of-\d+")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*$")
_STEP_DIRECTORY = re.compile(
    r"(?i)(?:global[-_]?step|step|iter|iteration|checkpoint|ckpt|chkpt|epoch|ep)[-_=]?\d+"
    r"(?:[-_][a-z_]+=?\d[\d.]*)*(?:[-_]ckpt)?(?:-v\d+)?(?:\.ckpt)?"
)


def is_ours(name: str) -> bool:
    """Say whether `name` is one of our own temporary or trash directories."""
    return name.startswith(".") and OURS in name


def is_unfinished(name: str) -> bool:
    """Say whether `name` itself tells that its writer is not done, or that it is nobody's checkpoint."""
    return (
        name.startswith((".", *_UNFINISHED_STARTS))
        or name.endswith(_UNFINISHED_ENDINGS)
        or _ORBAX_TMP in name
        or ".tmp-" in name
        or ".tmp." in name
    )


def markers_of(name: str) -> list[str]:
    """Return the names beside `name` that would mark it as unfinished."""
    markers = [name + MARKER]
    while shorter := next((name.removesuffix(end) for end in _MARKED_ENDINGS if name.endswith(end)), ""):
        name = shorter
        markers.append(name + MARKER)
    return markers


def is_step_directory(name: str) -> bool:
    """Say whether a directory of this name is one checkpoint by custom: step_100, iter_0000500, epoch=1-step=9.ckpt."""
    return _STEP_DIRECTORY.fullmatch(name) is not None


def step_of(name: str) -> int | None:
    """Read a training step from a file's or directory's name; None when it has none.

    A number that is an epoch, a shard or part of a date is no step.

    >>> [step_of(name) for name in ("checkpoint-500", "epoch=2-step=10.ckpt", "model_12.pt", "epoch_3.pt")]
    [500, 10, 12, None]
    """
    plain = _SHARD.sub("", _DATE.sub("", name))
    if found := _NAMED_STEP.findall(plain):
        return _number(found[-1])
    stem = re.sub(r"-v\d+$", "", _stem(plain))
    if _NAMED_EPOCH.search(stem):
        return None
    trailing = _TRAILING_STEP.search(stem)
    return _number(trailing[1]) if trailing else None


def epoch_of(name: str) -> float | None:
    """Read an epoch from a name: epoch=2, epoch_3, ep4; None when it has none."""
    found = _NAMED_EPOCH.search(name)
    number = _number(found[1]) if found else None
    return None if number is None else float(number)


def _stem(name: str) -> str:
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return name


def _number(digits: str) -> int | None:
    return int(digits) if len(digits) <= _DIGITS_MAX else None

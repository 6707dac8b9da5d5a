"""Which format is this? By name and neighbours first, then by content; one table for each.

`detect_*` look at names only and are what a scan uses. `read_*` open the bytes and run in the
parser's own process: foreign bytes are never read anywhere else. Readers are loaded on first use.
"""

import re
from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

from ckptd.worker.formats.names import is_step_directory

if TYPE_CHECKING:
    from ckptd.worker.formats.ask import Ask
    from ckptd.worker.formats.source import Folder, Source
    from ckptd.worker.protocol import Inspected

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_OPAQUE_SUFFIXES = (
    ".npz", ".npy", ".keras", ".h5", ".hdf5", ".msgpack", ".flax", ".nemo", ".gguf", ".onnx", ".pt2",
    ".pdparams", ".pdopt", ".params", ".pkl", ".pickle", ".joblib", ".tflite",
)  # fmt: skip
FILE_FORMATS: dict[str, str] = {
    ".safetensors": "safetensors",
    **dict.fromkeys(_TORCH_SUFFIXES, "torch-zip"),
    **dict.fromkeys(_OPAQUE_SUFFIXES, "opaque"),
}

# What makes a directory one checkpoint whatever it is called, most telling first.
_MARKERS: tuple[tuple[str, str], ...] = (
    ("trainer_state.json", "hf-trainer"),
    ("commit_success.txt", "opaque"),
    ("_CHECKPOINT_METADATA", "opaque"),
    ("manifest.ocdbt", "opaque"),
    ("saved_model.pb", "opaque"),
)
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.(?:safetensors|bin)")
_TRAINER_NAME = re.compile(r"checkpoint-\d+")
_OUR_NAME = re.compile(r"step_\d{10,}(?:_r\d+)?|ckpt_[0-9a-f]{12}(?:_r\d+)?")

_TELLING = frozenset({marker for marker, _ in _MARKERS} | {"manifest.json", "late.json", "stripped.json", "state.json"})
_TELLING_ENDINGS = (*_INDEX_ENDINGS, ".distcp")

_FOLDER_READERS = {
    "hf-trainer": "hf_trainer",
    "dcp": "dcp",
    "safetensors-sharded": "safetensors_sharded",
    "ckptd": "ckptd_dir",
    "opaque": "opaque_dir",
}


def detect_file(name: str) -> str | None:
    """Return the format that a file's name promises, None when no reader would load it."""
    if name.startswith("."):
        return None
    _, dot, suffix = name.rpartition(".")
    if dot:
        return FILE_FORMATS.get(f".{suffix.lower()}")
    # flax and others write checkpoint_<step> without a suffix
    return "opaque" if name.startswith("checkpoint_") and name[11:].isdigit() else None


def detect_directory(name: str, files: Collection[str], directories: Collection[str] = ()) -> str | None:
    """Return the format of a directory that is ONE checkpoint, None when it is a place for checkpoints.

    name   the directory's own
    files, directories  what lies directly in it

    A directory that holds step directories is a place, whatever else it holds: a Trainer's output
    directory has its own trainer_state.json. (A DeepSpeed global_step within is part of a checkpoint.)
    """
    if "manifest.json" in files and (_OUR_NAME.fullmatch(name) or "state.json" in files):
        return "ckptd"
    if any(is_step_directory(child) and not child.startswith("global_step") for child in directories):
        return None
    for marker, found in _MARKERS:
        if marker in files:
            return found
    if "training_args.bin" in files and _TRAINER_NAME.fullmatch(name):
        return "hf-trainer"  # its trainer_state.json is still to come
    for file in files:
        if file.endswith(".distcp"):
            return "dcp"
        if file.endswith(_INDEX_ENDINGS) or _SHARD.fullmatch(file):
            return "safetensors-sharded"
    if is_step_directory(name) or name.endswith(".ckpt"):
        return "dcp" if ".metadata" in files else "opaque"
    return None


def tells(name: str) -> bool:
    """Say whether a file's name matters to a scan: as a checkpoint, or for what its directory is."""
    return detect_file(name) is not None or name in _TELLING or name.endswith(_TELLING_ENDINGS)


def load_readers() -> None:
    """Load every reader: for the parser's process, before it is asked. Later there may be no descriptor to open one with."""
    for name in {"opaque", "safetensors", "torch_legacy", "torch_zip", *_FOLDER_READERS.values()}:
        import_module(f"ckptd.worker.formats.{name}")


def read_file(source: "Source", name: str, ask: "Ask") -> "Inspected":
    """Look into a file, at `name`'s promise and at the bytes. InvalidFormat when they break the format's rules."""
    from ckptd.worker.formats import opaque, safetensors, torch_legacy, torch_zip  # noqa: PLC0415 - see the module

    promised = detect_file(name.rpartition("/")[2])
    if promised == "safetensors":
        return safetensors.read(source, ask)
    if promised != "torch-zip":
        return opaque.read(source, ask)
    head = source.head(len(torch_legacy.MAGIC))
    if head.startswith(b"PK"):
        return torch_zip.read(source, ask)
    if head.startswith(torch_legacy.MAGIC):
        return torch_legacy.read(source, ask)
    return opaque.read_named_torch(source, ask)


def read_folder(folder: "Folder", name: str, ask: "Ask") -> "Inspected":
    """Look into a directory checkpoint. InvalidFormat when its files break the format's rules."""
    files = [member.path for member in folder.members if "/" not in member.path]
    directories = {member.path.partition("/")[0] for member in folder.members if "/" in member.path}
    found = detect_directory(name, files, directories) or "opaque"
    reader = import_module(f"ckptd.worker.formats.{_FOLDER_READERS[found]}")
    answer: Inspected = reader.read(folder, ask)
    return answer

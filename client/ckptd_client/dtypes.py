"""Element types: what safetensors calls them, what torch and NumPy call them.

A type that safetensors has no name for is kept all the same: its bytes are stored as U8 and the
tree remembers the real type and shape ("raw"). So every tool can open the file.
"""

import functools
import importlib
import sys
from typing import Any, Dict, Optional

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
# torch.load_file of safetensors 0.8 knows no name for these, or they have no fixed meaning per byte
_TORCH_RAW = ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16")
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
    "C64": "<c8",
}
_NUMPY_NAMES = {code: name for name, code in _NUMPY.items()}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "C64": 8}
ITEM_BYTES.update({"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1})
ITEM_BYTES.update({name: 1 for name in _TORCH if name.startswith("F8_")})

# Further names that files of other writers may carry; read as torch types where torch has them.
_TORCH_FOREIGN = {"F8_E8M0": "float8_e8m0fnu"}


RAW = "raw:"


@functools.lru_cache(maxsize=2)
def torch_types(torch: Any) -> Dict[Any, str]:
    """Return how each torch dtype that can be kept is stored: safetensors' name, or RAW and torch's own."""
    found = {getattr(torch, name): stored for stored, name in _TORCH.items() if hasattr(torch, name)}
    found.update({getattr(torch, name): RAW + name for name in _TORCH_RAW if hasattr(torch, name)})
    return found


def numpy_type(dtype: Any) -> Optional[str]:
    """Return how a NumPy dtype is stored; None when its items can't be kept as bytes.

    Objects can't, structured types are not worth their syntax, and a foreign type (kind V) would
    come back without its name.
    """
    if dtype.kind in "OV" or dtype.names is not None or dtype.metadata:
        return None
    return _NUMPY_NAMES.get(dtype.str) or RAW + dtype.str


def item_bytes(kind: str, name: str) -> int:
    """Return the bytes of one element of a leaf of `kind` whose element type is `name`."""
    if not name.startswith(RAW):
        return ITEM_BYTES[name]
    raw = name[len(RAW) :]
    dtype = framework("numpy").dtype(raw) if kind == "array" else getattr(framework("torch"), raw)
    return int(dtype.itemsize)


def torch_dtype(stored: str, raw: Optional[str]) -> Any:
    """Return the torch dtype of a stored tensor; None when this torch has none."""
    torch = framework("torch")
    name = raw or _TORCH.get(stored) or _TORCH_FOREIGN.get(stored)
    return getattr(torch, name, None) if name else None


def numpy_dtype(stored: str, raw: Optional[str]) -> Any:
    """Return the NumPy dtype of a stored array; None when NumPy has none (BF16, F8)."""
    code = raw or _NUMPY.get(stored)
    return framework("numpy").dtype(code) if code else None


def framework(name: str) -> Any:
    """Return torch or NumPy for a checkpoint that holds its objects; ImportError when it is not installed."""
    return sys.modules.get(name) or importlib.import_module(name)

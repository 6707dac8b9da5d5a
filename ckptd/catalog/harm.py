"""What is known to be wrong with a checkpoint's bytes, as its row keeps it: in `error`, wherever the bytes are.

It stays there while they lie in the trash or are missing, and goes when they were read and found good.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row

from ckptd.model import Damage


def to_wire(damage: Sequence[Damage]) -> list[dict[str, Any]]:
    """Return damage as rows and events have it."""
    return [{**asdict(one), "mib": list(one.mib), "tensors": list(one.tensors)} for one in damage]


def error(path: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the error of a row that is CORRUPT."""
    what = ", ".join(sorted({one["file"] or path for one in found}))
    return {"code": "corrupt", "message": f"damaged: {what}", "damage": list(found)}


def known(row: Row[Any]) -> list[dict[str, Any]]:
    """Return the damage that a row knows of, [] for none."""
    return list((row.error or {}).get("damage") or ())

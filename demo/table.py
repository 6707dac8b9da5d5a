"""The table at the end: what became of each checkpoint, and what it cost the training."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Stall:
    """How long one save stopped the training, and how long torch.save + fsync of the same state did."""

    ckptd_s: float
    plain_s: float


@dataclass(frozen=True)
class Fate:
    """What became of one checkpoint."""

    step: int
    level: str
    val_loss: float | None
    best: bool
    kept: bool
    why: str


def fates(rows: list[dict[str, Any]], plan: dict[str, Any], events: list[dict[str, Any]]) -> list[Fate]:
    """Join `ckpt ls`, `ckpt retention plan` and, for what is gone, `ckpt log`; in order of steps."""
    keep = {entry["checkpoint"]: entry["why"] for entry in plan["keep"]}
    gone = {event["checkpoint"]: event["data"]["why"] for event in events if "why" in event["data"]}
    found = []
    for row in rows:
        reasons = keep.get(row["checkpoint"])
        why = gone.get(row["checkpoint"], row["state"]) if reasons is None else ", ".join(dict.fromkeys(reasons))
        best = any(hold.startswith("best:") for hold in row["holds"])
        loss = row["metrics"].get("val_loss")
        found.append(Fate(row["step"], row["level"], loss, best, reasons is not None, why))
    return sorted(found, key=lambda fate: fate.step)


def show(console: Console, fates_: list[Fate], stalls: dict[int, Stall]) -> None:
    """Print one line for each checkpoint, and the medians under it."""
    table = Table(title="every checkpoint of the run", title_justify="left")
    for name in ("step", "val loss", "level", "", "what the rules say", "stall", "torch.save + fsync"):
        table.add_column(
            name, justify="right" if name in {"step", "val loss", "stall", "torch.save + fsync"} else "left"
        )
    for fate in fates_:
        stall = stalls.get(fate.step)
        table.add_row(
            str(fate.step),
            "" if fate.val_loss is None else f"{fate.val_loss:.3f}",
            fate.level,
            "best" if fate.best else "",
            f"kept: {fate.why}" if fate.kept else f"[dim]dropped: {fate.why}[/]",
            f"{stall.ckptd_s * 1000:.1f} ms" if stall else "[dim]killed[/]",
            f"{stall.plain_s * 1000:.1f} ms" if stall else "",
        )
    console.print(table)
    if stalls:
        ours = median(stall.ckptd_s for stall in stalls.values())
        plain = median(stall.plain_s for stall in stalls.values())
        console.print(
            f"the training stood still for [bold]{ours * 1000:.1f} ms[/] per save (median); torch.save + fsync of the"
            f" same state in the same run took {plain * 1000:.1f} ms: [bold]{plain / ours:.0f} times[/] as long"
        )

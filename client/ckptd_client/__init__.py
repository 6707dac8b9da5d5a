"""ckptd-client: hands checkpoints of a training loop to ckptd.

    import ckptd_client as ckptd

    run = ckptd.Experiment("resnet50", project="imagenet", config=cfg, dir="runs")
    state = run.load("latest")
    run.save({"model": model, "optimizer": optimizer}, step=step, metrics={"val_loss": v})

The names below are imported when they are first used: importing the package costs next to nothing.
"""

from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from ckptd_client.errors import (
        CkptdClientError,
        CorruptCheckpoint,
        MissingPart,
        NotFound,
        Refused,
        StateMismatch,
        TimedOut,
        Unavailable,
        UnsupportedValue,
    )
    from ckptd_client.experiment import Experiment
    from ckptd_client.handle import Handle
    from ckptd_client.offers import submit

__version__ = "0.1.0"

__all__ = [
    "CkptdClientError",
    "CorruptCheckpoint",
    "Experiment",
    "Handle",
    "MissingPart",
    "NotFound",
    "Refused",
    "StateMismatch",
    "TimedOut",
    "Unavailable",
    "UnsupportedValue",
    "__version__",
    "submit",
]

_HOMES = {"Experiment": "experiment", "Handle": "handle", "submit": "offers"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return __all__

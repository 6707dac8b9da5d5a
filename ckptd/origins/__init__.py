"""The configuration's files: which there are, which value came from which, and what is wrong in them.

    flag > environment (CKPTD_ARENAS__BYTES_MAX=4G) > user's file > /etc/ckptd/conf.d/*.toml
         > /etc/ckptd/config.toml > default

`files` needs the standard library only, for the supervisor; `layered` and `render` bring the settings'
model and are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ckptd.origins.files import Places, places

if TYPE_CHECKING:
    from ckptd.origins.layered import Loaded, load
    from ckptd.origins.render import render_example, render_reference

__all__ = ["Loaded", "Places", "load", "places", "render_example", "render_reference"]

_HOMES = {"Loaded": "layered", "load": "layered", "render_example": "render", "render_reference": "render"}


def __getattr__(name: str) -> object:
    """Load what needs the settings' model when somebody asks for it."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)

"""Where ls, experiments, show and path read: the daemon, or its catalog while no daemon runs."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from ckptd.cli import render
from ckptd.cli.daemon_socket import connect
from ckptd.cli.options import asked
from ckptd.errors import Unreachable


class Source(Protocol):
    """Something that answers the reading operations of docs/reference/wire-control.md. `kind`: "daemon" or "catalog"."""

    kind: ClassVar[str]

    def request(self, op: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Answer one operation, or raise the error a daemon would have answered with."""

    def __enter__(self) -> Self:
        """Open."""

    def __exit__(self, *_: object) -> None:
        """Close."""


def open_source() -> Source:
    """Connect to the daemon; without one, open the catalog read-only and say so on standard error.

    Unreachable when there is neither. A daemon named with --socket has no substitute, unless
    CKPTD_DIR says where its catalog is: another daemon's catalog would answer something else.
    """
    try:
        return connect()
    except Unreachable as gone:
        if asked().socket and not os.environ.get("CKPTD_DIR"):
            raise
        from ckptd.cli.offline import OfflineCatalog, find_catalog

        path = find_catalog()
        if path is None:
            raise
        render.say(f"ckpt: no daemon answers; reading {render.escape(path)}, which may be behind")
        return OfflineCatalog(path, gone)

"""What people ask of the file cache: `ckpt cache ls`, `ckpt cache trim`."""

from ckptd.catalog.cached import Cached
from ckptd.errors import NotAuthorized
from ckptd.intake import describe
from ckptd.intake import requests as ask
from ckptd.intake.follow import sees_all
from ckptd.intake.listener import Peer
from ckptd.intake.training import Answer, Handler
from ckptd.pipeline.filecache import FileCache


class FetchedFiles:
    """One method per op. For the operator: what lies there is everybody's."""

    def __init__(self, files: FileCache) -> None:
        """Keep what is asked."""
        self._files = files
        self.handlers: dict[type[ask.Request], Handler] = {ask.CacheList: self.listed, ask.CacheTrim: self.trim}

    async def listed(self, peer: Peer, _request: ask.CacheList) -> Answer:
        """List what is kept, the longest unused first."""
        _check(peer)
        entries = await self._files.entries()
        return {
            "directory": self._files.root,
            "bytes_max": self._files.settings().cache.bytes_max,
            "bytes_used": sum(entry.size_bytes for entry in entries),
            "entries": [self._described(entry) for entry in entries],
        }

    async def trim(self, peer: Peer, request: ask.CacheTrim) -> Answer:
        """Give up the longest unused until the rest fits; what is in use stays."""
        _check(peer)
        gone = await self._files.trim(request.to_bytes)
        left = await self._files.entries()
        return {
            "dropped": [self._described(entry) for entry in gone],
            "bytes_used": sum(entry.size_bytes for entry in left),
        }

    def _described(self, entry: Cached) -> Answer:
        return {
            "key": entry.key,
            "path": self._files.place(entry.key),
            "size_bytes": entry.size_bytes,
            "fetched_at": describe.at(entry.fetched_at),
            "used_at": describe.at(entry.used_at),
            "in_use": entry.in_use,
        }


def _check(peer: Peer) -> None:
    if not sees_all(peer.uid):
        raise NotAuthorized("the file cache is for root and for the daemon's own user", hint="ask who runs this daemon")

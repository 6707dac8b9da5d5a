"""Loading for a resume: the hot copy where the daemon has one, else a verified read of the disk, else the next good one.

Without a daemon the manifests on the disk answer. What is returned is exactly what was saved, or an
error says what is damaged and which checkpoint is whole.
"""

import os
import re
import time
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence

from ckptd_client import restore
from ckptd_client.errors import CorruptCheckpoint, MissingPart, NotFound, Refused, TimedOut, Unavailable
from ckptd_client.find import Found, list_checkpoints, read_manifest
from ckptd_client.finder import close_all
from ckptd_client.reads import Read
from ckptd_client.session import OPEN_S
from ckptd_client.wire import Message

if TYPE_CHECKING:
    from ckptd_client.session import Session

ATTACH_S = 10.0
# What a daemon refuses for good: a hook forbids the load, or no rule says what "best" would be. The disk is not asked.
FOR_GOOD = ("vetoed", "unknown_rule")
ERROR_CHARS_MAX = 2000  # of an error that the daemon is told of
TRIES_MAX = 8  # to read from the disk what others may take away meanwhile
OTHERS_MAX = 64  # checkpoints that are tried in the place of a damaged one
NOTHING: Message = {}  # the daemon's word that no checkpoint is the best by this rule
_ID = re.compile("[0-9a-f]{32}")
_BEST = re.compile(r"best(?:[:_].*)?")
# Selectors that ask for whatever there is: nothing yet is no error.
_ANY = re.compile(r"latest|best(?:[:_].*)?")


class Wanted(NamedTuple):
    """What a caller of load() asked for."""

    selector: str
    into: Any
    keys: Optional[Sequence[str]]
    fallback: bool
    verify: bool


class Loader:
    """Loads checkpoints of one session's experiment. Blocks as long as reading takes; thread-safe."""

    def __init__(self, session: "Session") -> None:
        """Keep the session."""
        self._session = session

    def load(self, wanted: Wanted) -> Any:
        """Load; see Experiment.load. The daemon is told how it went, when there is one: that costs one message."""
        began_s = time.monotonic()
        reply = self._attach(wanted.selector)
        if reply is NOTHING:
            return None
        checkpoint = None if reply is None else str(reply.get("checkpoint"))
        try:
            state = self._load(reply, wanted)
        except Exception as error:
            self._tell(checkpoint, began_s, error=f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX])
            raise
        if state is not None:
            # Another one than was asked for stands here when the first was damaged.
            hot = reply is not None and bool(reply.get("mapped"))
            self._tell(self._session.resumed_from or checkpoint, began_s, hot=hot)
        return state

    def _tell(self, checkpoint: Optional[str], began_s: float, error: str = "", *, hot: bool = False) -> None:
        if checkpoint is not None and _ID.fullmatch(checkpoint):
            ms = round((time.monotonic() - began_s) * 1000, 1)
            self._session.tell("loaded", checkpoint=checkpoint, ok=not error, ms=ms, hot=hot, error=error)

    def _load(self, reply: Optional[Message], wanted: Wanted) -> Any:
        if reply is None:
            return self._load_from_disk(wanted)
        checkpoint = str(reply.get("checkpoint"))
        self._session.resumed_from = checkpoint
        try:
            if reply.get("hot") is True and reply.get("fds"):
                state = self._map(reply, wanted)
                if reply.get("mapped"):
                    return state
            # Files of a hot copy are places in the arena: the manifest knows the digests.
            files = None if reply.get("hot") else reply.get("files")
            return self._read(str(reply.get("path")), files, checkpoint, wanted)
        finally:
            if not reply.get("mapped"):
                self._session.reads.end(Read(str(reply["read"]), checkpoint))

    def _load_from_disk(self, wanted: Wanted) -> Any:
        """Load what the manifests name. No daemon keeps it meanwhile.

        One that was too busy to answer, or is back, may retire or replace it while it is read: what is no longer there
        is looked for anew, and only what stays where it was found is damaged.
        """
        tries = 0
        while True:
            found = self._on_disk(wanted.selector)
            if found is None:
                return None
            try:
                return self._read(found.path, found.files, found.checkpoint, wanted, kept=False)
            except _MovedError as moved:
                tries += 1
                if tries == TRIES_MAX:
                    raise moved.error from None

    def path(self, selector: str) -> Optional[str]:
        """Return where a checkpoint lies, None when there is none."""
        session = self._session
        if session.wait_open(OPEN_S):
            try:
                found = session.connection.request("resolve", ATTACH_S, **self._scope(selector)).get("path")
                if isinstance(found, str):
                    return found
            except NotFound:
                _check_may_be_none(selector)
                return None
            except (Unavailable, TimedOut, Refused) as error:
                if isinstance(error, Refused) and error.code in FOR_GOOD:
                    raise
                session.say("resolve", "the daemon could not say where %s is: %s", selector, error)
        on_disk = self._on_disk(selector)
        return None if on_disk is None else on_disk.path

    def _attach(self, selector: str) -> Optional[Message]:
        """Ask the daemon; None when it is away or has none, so that the disk is asked; NOTHING when there is none at all."""
        session = self._session
        if not session.wait_open(OPEN_S):
            return None
        try:
            return self._ask(selector)
        except NotFound:
            # A checkpoint that is on the disk and not in its catalog is as good; but the disk knows of no best.
            return NOTHING if _BEST.fullmatch(selector) else None
        except (Unavailable, TimedOut, Refused) as error:
            if isinstance(error, Refused) and error.code in FOR_GOOD:
                raise
            session.say("attach", "the daemon could not hand over %s (%s); it is read from the disk", selector, error)
            return None

    def _ask(self, selector: str) -> Message:
        """Return the answer, with the name of this load in it. A name without an answer is given back, too."""
        reads = self._session.reads
        name = reads.begin()
        try:
            reply = self._session.connection.request("attach", ATTACH_S, read=name, **self._scope(selector))
        except (NotFound, Refused):
            reads.refused(name)
            raise
        except BaseException:
            reads.end(Read(name))  # it may have been held all the same
            raise
        return {**reply, "read": name}

    def _scope(self, selector: str) -> Dict[str, str]:
        if "/" in selector:
            return {"selector": selector}
        return {"selector": selector, "experiment": self._session.experiment}

    def _map(self, reply: Message, wanted: Wanted) -> Any:
        """Map the hot copy; None when that fails, for the disk has the same bytes."""
        session, checkpoint = self._session, str(reply["checkpoint"])
        fds: List[int] = reply.pop("fds")
        token = session.hot.token()
        try:
            state = restore.map_checkpoint(
                fds[0],
                reply["files"],
                keys=wanted.keys,
                into=wanted.into,
                on_release=lambda: session.hot.freed(token),
            )
            session.hot.hold(token, Read(str(reply["read"]), checkpoint), fds[0])
        except (OSError, CorruptCheckpoint, MissingPart) as error:
            session.hot.failed(token)
            session.say("hot", "the hot copy could not be mapped (%s); the disk is read", error)
            return None
        finally:
            close_all(fds)
        reply["mapped"] = True
        return state

    def _on_disk(self, selector: str) -> Optional[Found]:
        directory = self._directory()
        try:
            return restore.find_checkpoint(directory, selector)
        except NotFound:
            _check_may_be_none(selector)
            return None
        except Unavailable:
            if _ANY.fullmatch(selector) and not os.path.isdir(directory):
                return None  # "best" needs the catalog, but where nothing was ever saved there is none
            raise

    def _directory(self) -> str:
        spec = self._session.spec
        return os.path.join(spec.directory, spec.project, spec.name)

    def _read(self, path: str, files: Any, checkpoint: str, wanted: Wanted, *, kept: bool = True) -> Any:
        """Read one checkpoint, or another one in its place. _MovedError: nobody keeps it, and it went away."""
        session = self._session
        session.resumed_from = checkpoint
        try:
            return self._read_one(path, files, wanted)
        except (CorruptCheckpoint, MissingPart, OSError) as error:
            if not kept and not _lies_there(path, checkpoint):
                raise _MovedError(error) from error
            if not isinstance(error, CorruptCheckpoint):
                raise
            problem = {"code": "corrupt", "message": error.detail, "file": error.file}
            session.tell("report", checkpoint=checkpoint, problem=problem)
            if not wanted.fallback:
                raise
            damage = error
        for other in _others(path):
            try:
                state = self._read_one(other.path, other.files, wanted._replace(verify=True))
            except (CorruptCheckpoint, MissingPart, OSError) as error:
                session.say(f"damaged {other.path}", "%s can't be used either: %s", other.path, error)
                continue
            session.say(f"fallback {path}", "%s; loaded %s instead", damage, other.path)
            session.resumed_from = other.checkpoint
            return state
        raise damage

    def _read_one(self, path: str, files: Any, wanted: Wanted) -> Any:
        return restore.read_checkpoint(path, files, verify=wanted.verify, into=wanted.into, keys=wanted.keys)


class _MovedError(Exception):
    """What was found on the disk was taken away, or another put in its place, while it was read."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _lies_there(path: str, checkpoint: str) -> bool:
    found = read_manifest(path)
    return found is not None and found.checkpoint == checkpoint


def _others(damaged: str) -> List[Found]:
    """Return the checkpoints beside a damaged one: older ones first, the newest of them first of all."""
    damaged = os.path.abspath(damaged)
    newest_first = [
        each for each in list_checkpoints(os.path.dirname(damaged), 1) if not each.veto or each.path == damaged
    ]
    position = next((index for index, found in enumerate(newest_first) if found.path == damaged), -1)
    return [*newest_first[position + 1 :], *reversed(newest_first[: max(0, position)])][:OTHERS_MAX]


def _check_may_be_none(selector: str) -> None:
    """Whoever asks for the latest may start fresh; whoever names a checkpoint must not get nothing."""
    if _ANY.fullmatch(selector) is None:
        raise NotFound(f"there is no checkpoint {selector!r}")

"""Every error of ckptd, by who must act.

    CkptdError
    ├── Weather           us, by trying again: busy, timeout, worker lost
    │   ├── Busy                 busy
    │   ├── TimedOut             timeout
    │   ├── WorkerLost           worker_lost
    │   ├── NotSettled           not_settled
    │   └── SourceChanged        source_changed
    ├── Refused           the one who asked: bad path, over a limit, not found
    │   ├── BadRequest           bad_request
    │   ├── UnsupportedVersion   unsupported_version
    │   ├── NotAuthorized        not_authorized
    │   ├── BadPath              bad_path
    │   ├── NotFound             not_found
    │   ├── UnknownRule          unknown_rule
    │   ├── Exists               exists
    │   ├── Ambiguous            ambiguous
    │   ├── Held                 held
    │   ├── Vetoed               vetoed
    │   ├── Changed              changed
    │   ├── GivenUp              given_up
    │   ├── OverQuota            quota
    │   ├── NoArena              no_arena
    │   └── InvalidFormat        invalid_format
    ├── Operator          a person: damage, full disk, no permission, bad configuration
    │   ├── Corrupt              corrupt
    │   ├── Missing              missing
    │   ├── NoSpace              no_space
    │   ├── DiskFault            disk_fault
    │   ├── Denied               denied
    │   ├── RootDegraded         root_degraded
    │   ├── BadConfig            bad_config
    │   ├── CatalogFault         catalog_fault
    │   ├── AlreadyRunning       already_running
    │   └── Unreachable          unreachable
    └── Bug               the developers: an invariant broke

Each class has a stable `code` (on the wire and in --json), an `exit_code` (what `ckpt` exits
with) and a `hint`: what to do next. Raise with `from` when another error caused it; log or raise,
never both.
"""

from typing import Any, ClassVar


class CkptdError(Exception):
    """An error with a stable code; `details` go to the wire as they are (JSON values)."""

    code: str = "error"  # of the class; only an error from the wire may bring one of its own
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        """Keep what happened and where (`message`), and what to do (`hint`)."""
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """Return the "error" object of a reply."""
        return {"code": self.code, "message": self.message, "hint": self.hint, **self.details}


class Weather(CkptdError):
    """It passes: we try again."""

    code = "weather"


class Busy(Weather):
    """A limit is reached for the moment; `retry_after_s` says when to come back."""

    code = "busy"
    default_hint = "try again in a moment"


class TimedOut(Weather):
    """A bounded wait ended."""

    code = "timeout"
    exit_code = 6
    default_hint = "raise --timeout, or see `ckpt status` for what is slow"


class WorkerLost(Weather):
    """An I/O worker died or hung in the middle of a request; it is replaced."""

    code = "worker_lost"
    default_hint = "the request is tried again with a new worker; `ckpt doctor` shows repeats"


class NotSettled(Weather):
    """The writer of a file is not done yet."""

    code = "not_settled"


class SourceChanged(Weather):
    """A file or an arena changed while it was read."""

    code = "source_changed"


class Refused(CkptdError):
    """The one who asked must ask for something else."""

    code = "refused"
    exit_code = 7


class BadRequest(Refused):
    """A field is missing, unknown, of the wrong type or out of bounds."""

    code = "bad_request"
    exit_code = 2


class UnsupportedVersion(Refused):
    """The client speaks a protocol that this daemon does not."""

    code = "unsupported_version"
    default_hint = "upgrade the older of the two: ckptd or ckptd-client"


class NotAuthorized(Refused):
    """The peer's user may not do this."""

    code = "not_authorized"


class BadPath(Refused):
    """A path is not absolute, leaves its root, or is not a plain file or directory."""

    code = "bad_path"
    exit_code = 2


class NotFound(Refused):
    """No such experiment, checkpoint or root."""

    code = "not_found"
    exit_code = 3
    default_hint = "`ckpt ls` lists what there is"


class UnknownRule(Refused):
    """No rule of this name says what is best; unlike one that has no winner yet, waiting does not help."""

    code = "unknown_rule"
    exit_code = 3
    default_hint = "`keep_best` in the configuration makes one; `ckpt best list` names those that have a winner"


class Exists(Refused):
    """The name is taken by something else, which stays as it is."""

    code = "exists"
    default_hint = "choose another name, or remove what is there"


class Ambiguous(Refused):
    """A name or an id prefix fits several things."""

    code = "ambiguous"
    exit_code = 2
    default_hint = "give more of the id, or PROJECT/EXPERIMENT"


class Held(Refused):
    """A promise keeps this checkpoint: pinned, leased, best, or the newest verified one."""

    code = "held"
    default_hint = "`ckpt show ID` names what holds it; `ckpt unpin ID` lifts a pin"


class Vetoed(Refused):
    """A hook forbids it, and says why."""

    code = "vetoed"
    default_hint = "`ckpt hooks list` names the hook; `ckpt hooks disable NAME` takes it out of the way"


class Changed(Refused):
    """What was looked at is not what there is now; nothing was done."""

    code = "changed"


class GivenUp(Refused):
    """A person ended this save before it was written; nothing of it is left."""

    code = "given_up"


class OverQuota(Refused):
    """More than a configured limit."""

    code = "quota"


class NoArena(Refused):
    """The arena budget can't hold this save now."""

    code = "no_arena"
    default_hint = "raise arenas.bytes_max, or save less often"


class InvalidFormat(Refused):
    """The bytes are not what their name says."""

    code = "invalid_format"


class Operator(CkptdError):
    """A person must act."""

    code = "operator"


class Corrupt(Operator):
    """Bytes on disk no longer match their recorded digest."""

    code = "corrupt"
    exit_code = 4
    default_hint = "`ckpt path latest` names the newest good one"


class Missing(Operator):
    """A catalogued checkpoint is gone from the disk."""

    code = "missing"
    exit_code = 4


class NoSpace(Operator):
    """The file system or the quota is full."""

    code = "no_space"
    default_hint = "free space, or lower retention (`ckpt retention plan`)"


class DiskFault(Operator):
    """The disk answered with an I/O error."""

    code = "disk_fault"
    default_hint = "see the kernel's log; the checkpoint was not reported durable"


class Denied(Operator):
    """The daemon's user may not touch this path."""

    code = "denied"


class RootDegraded(Operator):
    """The file system under a root hangs or fails, or is not the one that was there; other roots go on."""

    code = "root_degraded"
    default_hint = "`ckpt status` names the mount; it is tried again by itself"


class BadConfig(Operator):
    """The configuration has errors; all of them are listed."""

    code = "bad_config"
    exit_code = 78
    default_hint = "`ckpt config check` lists every error"


class CatalogFault(Operator):
    """The catalog is corrupt, newer than this daemon, or on a network file system."""

    code = "catalog_fault"


class AlreadyRunning(Operator):
    """Another daemon holds this state directory."""

    code = "already_running"


class Unreachable(Operator):
    """No daemon answers."""

    code = "unreachable"
    exit_code = 5
    default_hint = "start one with `ckptd`, or name its socket in CKPTD_SOCKET"


class Bug(CkptdError):
    """An invariant broke. Never caught except at the daemon's border."""

    code = "internal"
    default_hint = "please report this with the daemon's log"


def _all(cls: type[CkptdError]) -> list[type[CkptdError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _all(sub))]


BY_CODE: dict[str, type[CkptdError]] = {cls.code: cls for cls in _all(CkptdError)}


def from_wire(error: dict[str, Any]) -> CkptdError:
    """Rebuild the error a reply carries; one of a newer peer becomes a plain CkptdError that keeps its code."""
    details = {str(k): v for k, v in error.items() if k not in {"code", "message", "hint"}}
    code = str(error.get("code") or CkptdError.code)
    cls = BY_CODE.get(code, CkptdError)
    found = cls(str(error.get("message", "")), hint=str(error.get("hint", "")))
    found.code, found.details = code, details
    return found

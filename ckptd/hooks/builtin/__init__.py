"""The hooks that ckptd brings. `[[hooks]] builtin = "numeric-health"` switches one on; docs/guide/builtin-hooks.md.

Modules here are imported where their hook runs: those of kind PYTHON in a child host, never in the daemon.
"""

from ckptd.hooks.points import HookEvent
from ckptd.hooks.spec import Builtin, Kind, Priority, Spec

_HERE = "ckptd.hooks.builtin"
_ENDS = (HookEvent.EXPERIMENT_FAILED, HookEvent.EXPERIMENT_LOST)

BUILTINS: dict[str, Builtin] = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            name="numeric-health",
            kind=Kind.PYTHON,
            target=f"{_HERE}.checks:NumericHealth",
            events=(HookEvent.CHECKPOINT_VERIFIED,),
            meaning="NaN, infinity, exploding and dead tensors, norms that jumped since the checkpoint before",
            priority=Priority.BACKGROUND,
            timeout_s=120.0,
        ),
        Builtin(
            name="quaternions",
            kind=Kind.PYTHON,
            target=f"{_HERE}.checks:QuaternionValidation",
            events=(HookEvent.CHECKPOINT_VERIFIED,),
            meaning="tensors and metrics that should be unit quaternions and are not",
            priority=Priority.BACKGROUND,
            timeout_s=120.0,
        ),
        Builtin(
            name="rotation-loss",
            kind=Kind.INPROCESS,
            target=f"{_HERE}.notices:RotationLoss",
            events=(HookEvent.CHECKPOINT_VERIFIED,),
            meaning="rotation losses among the metrics that are NaN, infinite or implausible",
            priority=Priority.LOW,
        ),
        Builtin(
            name="recovery",
            kind=Kind.INPROCESS,
            target=f"{_HERE}.notices:Recovery",
            events=_ENDS,
            meaning="how to go on after an experiment failed or was lost: last good checkpoint, command",
        ),
        Builtin(
            name="grid",
            kind=Kind.INPROCESS,
            target=f"{_HERE}.notices:Silence",
            events=(*_ENDS, HookEvent.EXPERIMENT_STALLED),
            meaning="experiments of a sweep that fell silent, died or failed",
        ),
        Builtin(
            name="notify",
            kind=Kind.INPROCESS,
            target=f"{_HERE}.notices:Notify",
            events=(
                HookEvent.EXPERIMENT_STALLED,
                *_ENDS,
                HookEvent.DISK_LOW,
                HookEvent.DISK_RELIEF,
                HookEvent.CHECKPOINT_CORRUPT,
                HookEvent.CHECKPOINT_MISSING,
                HookEvent.CHECKPOINT_FAILED,
                HookEvent.JOB_PARKED,
                HookEvent.ALERT_RAISED,
                HookEvent.WORKER_LOST,
                HookEvent.ROOT_DEGRADED,
                HookEvent.ON_DB_ERROR,
                HookEvent.HOOK_OPENED,
                HookEvent.RETENTION_HELD,
                HookEvent.HOOK_FINDING,
            ),
            meaning="events that a person should hear of, by rules, at a bounded rate, with quiet hours",
            priority=Priority.HIGH,
        ),
    )
}


def relays(spec: Spec) -> bool:
    """Whether a hook may find something about what hooks found: `notify` alone, which never looks at its own findings.

    Any other two could go on about one another for ever.
    """
    return spec.kind is Kind.INPROCESS and spec.target == BUILTINS["notify"].target

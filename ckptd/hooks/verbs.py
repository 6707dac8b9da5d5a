"""Verbs that plug-ins add to the socket: "x-PLUGIN.VERB", each run in a child host under the limits of a hook.

From [[verbs]] of the configuration, and from installed packages: an entry point "NAME" of the group
`ckptd.hooks.verbs` in the distribution DIST is the verb "x-DIST.NAME", so that no package can take another's prefix.
"""

import re
from importlib import metadata

from ckptd.config import Settings
from ckptd.errors import BadConfig
from ckptd.hookconfig import VERB_PATTERN
from ckptd.hooks.points import HookEvent
from ckptd.hooks.spec import Kind, Spec

GROUP = "ckptd.hooks.verbs"
VERBS_MAX = 256


def from_settings(settings: Settings) -> dict[str, Spec]:
    """Return the verbs by name. BadConfig for a name that is taken twice or is none.

    Reads the metadata of installed packages: some milliseconds of file access, none of it under a storage root.
    """
    defaults = settings.hooks_defaults
    found: dict[str, Spec] = {}
    for entry in settings.verbs:
        spec = Spec(
            name=entry.name,
            kind=Kind.PYTHON,
            target=entry.python,
            events=(HookEvent.DAEMON_STARTED,),  # a host wants one; it is never told of it
            timeout_s=entry.timeout_s or defaults.timeout_s,
            memory_bytes_max=defaults.memory_bytes_max if entry.memory_bytes_max is None else entry.memory_bytes_max,
            import_path=tuple(map(str, entry.import_path)),
            environment=dict(entry.environment),
            options=dict(entry.options),
        )
        _add(found, spec)
    for spec in _installed(settings) if defaults.enabled and defaults.entry_points else ():
        _add(found, spec)
    return found


def _installed(settings: Settings) -> list[Spec]:
    defaults = settings.hooks_defaults
    specs = []
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = re.sub(r"[-_.]+", "-", point.dist.name).lower() if point.dist is not None else ""
        specs.append(
            Spec(
                name=f"x-{package}.{point.name}",
                kind=Kind.PYTHON,
                target=point.value,
                events=(HookEvent.DAEMON_STARTED,),
                timeout_s=defaults.timeout_s,
                memory_bytes_max=defaults.memory_bytes_max,
                source="entry point",
            )
        )
    return specs


def _add(found: dict[str, Spec], spec: Spec) -> None:
    if re.fullmatch(VERB_PATTERN, spec.name) is None:
        raise BadConfig(f"verb {spec.name!r} is none: a verb is written x-PLUGIN.VERB, in lower case")
    if spec.name in found:
        raise BadConfig(f"two verbs are named {spec.name!r}: {found[spec.name].target} and {spec.target}")
    if len(found) >= VERBS_MAX:
        raise BadConfig(f"over {VERBS_MAX} verbs")
    found[spec.name] = spec

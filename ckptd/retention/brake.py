"""The brake: a plan that nobody asked for and that takes much of an experiment at once waits for a person.

A rule that was mistyped looks like any other rule. What gives it away is how much it takes: rules that are
followed save by save drop a few at a time. Decided anew for each plan, from the plan and the rules alone.
"""

from dataclasses import dataclass

from ckptd.model import State
from ckptd.retention.decide import Plan
from ckptd.rules import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Braked:
    """What a plan would do at once that is too much for nobody to have asked for it.

    drops, strips  how many checkpoints it drops, and takes the optimizer state out of
    live           how many live ones there are, those among them
    size_bytes     of those that it drops
    why            what it follows, in short: "the rules keep last 3"
    limits         what it passes, in words
    """

    drops: int
    strips: int
    live: int
    size_bytes: int
    why: tuple[str, ...]
    limits: str

    @property
    def words(self) -> str:
        """Say what it would do, and why that is held."""
        acts = [f"drop {self.drops}"] * bool(self.drops) + [f"strip {self.strips}"] * bool(self.strips)
        return f"it would {' and '.join(acts)} of {self.live} live checkpoints at once, {self.limits}"


def brake(decided: Plan, rules: Rules) -> Braked | None:
    """Return what holds a plan, None when it may be carried out by itself.

    Held is the whole of a plan, and only one that drops more than `brake_count_min` checkpoints and more than
    `brake_share` of the live ones, or strips as many. A share of 1 holds nothing: no more than all can go.
    """
    rows = [one.checkpoint for one in decided.keep] + [one.checkpoint for one in decided.drop]
    live = sum(row.state is State.LIVE for row in rows)
    drops, strips = len(decided.drop), len(decided.strip)
    # Half of a millionth is less than one checkpoint of any experiment: 0.1 * 30 is not quite 3 in binary.
    most = max(rules.brake_count_min, rules.brake_share * live + 5e-7)
    if max(drops, strips) <= most:
        return None
    size_bytes = sum(one.checkpoint.size_bytes for one in decided.drop)
    limits = f"more than {rules.brake_count_min} and more than {rules.brake_share * 100:g} % of them"
    why = _followed(rules, drops=drops > 0, strips=strips > 0)
    return Braked(drops=drops, strips=strips, live=live, size_bytes=size_bytes, why=why, limits=limits)


def _followed(rules: Rules, *, drops: bool, strips: bool) -> tuple[str, ...]:
    why = []
    if drops and rules.keeps and rules.drop == "at_once":
        why.append(f"the rules keep {', '.join(rules.words())}")
    if drops and rules.bytes_max:
        why.append(f"the experiment's budget is {rules.bytes_max} bytes")
    if strips:
        why.append(f"optimizer states stay in the newest {rules.strip_after}")
    return tuple(why)

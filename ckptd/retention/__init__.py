"""What to keep of one experiment. Pure: no clock, no disk, no catalog.

Rules vote to keep, never to drop (vote.py): a checkpoint goes only when some rule is set and none of
them, no promise and no hold keeps it (decide.py). Promises come before rules and can't be configured
away. Budgets take only what is spare (shed.py). A plan that takes much at once and that nobody asked for
is held (brake.py).
"""

from ckptd.retention.age import newness
from ckptd.retention.brake import Braked, brake
from ckptd.retention.decide import Dropped, Given, Kept, Plan, digest, plan
from ckptd.retention.explain import Explanation, Looked, explain
from ckptd.retention.shed import Spare, shed

__all__ = [
    "Braked",
    "Dropped",
    "Explanation",
    "Given",
    "Kept",
    "Looked",
    "Plan",
    "Spare",
    "brake",
    "digest",
    "explain",
    "newness",
    "plan",
    "shed",
]

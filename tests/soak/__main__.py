"""Trainers, legacy writers, readers, retention and random faults on one node, for as long as you like.

    python -m tests.soak [--minutes 122] [--seed 1] [--calm --pace 0.08 --phase-min 5]

The second form breaks nothing and saves as fast as it can: 100,000 saves by one daemon, whose memory and
descriptors stay what they were.

Exit status 1 at a violation, at a descriptor too many, and, for runs of twenty minutes or more, when memory
grows by more than one percent per hour. Why it does, `python -m tests.soak.heap PID` may tell of a daemon that runs.
"""

import argparse
import random
import signal
import sys
import time
from pathlib import Path

from tests.soak import report
from tests.soak.soak import Plan, Soak

KEPT = Path(".soak")


def main() -> int:
    """Run, report, judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=122.0, help="memory is judged in the later half")
    parser.add_argument("--seed", type=int, help="the same seed, the same schedule of faults; drawn when not given")
    parser.add_argument("--calm", action="store_true", help="no faults")
    parser.add_argument("--pace", type=float, default=1.0, help="0.5: everybody saves twice as often")
    parser.add_argument("--phase-min", type=float, default=40 / 60, help="load between two looks at everything")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    seconds = options.minutes * 60
    print(f"seed {seed}, {options.minutes:g} minutes", flush=True)
    plan = Plan(
        seconds=seconds,
        seed=seed,
        pace=options.pace,
        phase_s=options.phase_min * 60,
        calm=options.calm,
        lives_on=not options.calm and seconds >= report.JUDGED_S,
    )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # its node and its mount end with it
    with Soak(plan, lambda line: print(line, flush=True)) as soak:
        outcome = soak.run()
        if outcome.violations:
            print(soak.ground.tail())
    path = KEPT / time.strftime("%Y%m%d-%H%M%S.json")
    report.keep(outcome, path)
    print(report.render(outcome))
    print(f"all of it: {path}")
    why = report.verdict(outcome)
    print(f"FAILED: {'; '.join(why)}" if why else "passed")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())

"""ckptd: the daemon that takes checkpoints off the training process.

Read daemon.py first: it opens everything and nests the task groups. intake/ is the way in, jobs.py
the queue, pipeline/ the way of each checkpoint, catalog/ what is known, worker/ the only code that
touches storage. Imports go down the list in docs/architecture.md.
"""

__version__ = "0.1.0"

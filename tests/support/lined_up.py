"""A queue whose jobs are put and ended in one line each."""

from typing import Any

from ckptd import config
from ckptd.catalog import queue
from ckptd.jobs import Job, Jobs, NewJob
from ckptd.model import new_id

SETTINGS = config.Jobs(retries_max=3, backoff_s=1.0, backoff_s_max=60.0, lease_s=600.0)


class Queue(Jobs):
    """The queue with one-line writes for tests."""

    async def put(
        self, lane: str = "a", checkpoint_id: str | None = None, *, can_wait: bool = False, **payload: Any
    ) -> Job:
        of = checkpoint_id or new_id()
        new = NewJob(checkpoint_id=of, lane=lane, stage="publish", can_wait=can_wait, payload=payload)
        return await self._catalog.write(lambda tx: self.enqueue(tx, new))

    async def do(self, what: str, *arguments: Any, **named: Any) -> Any:
        return await self._catalog.write(lambda tx: getattr(self, what)(tx, *arguments, **named))

    async def one(self) -> Job:
        (job,) = await self.claim()
        return job

    async def row(self, job: Job) -> Job:
        return await self._catalog.read(lambda conn: queue.get(conn, job.id))

"""What was begun in a worker and is to be written down goes on although whoever asked for it is gone.

A cancelled request is not an undone one: the worker may be inside its rename, and the answer is lost. So a
person's Ctrl-C waits until both the disk and the catalog have it, for a bounded time.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import anyio.lowlevel

T = TypeVar("T")

ENDS_S = 5.0  # that a deed may go on after its caller was cancelled: a disk that hangs must not hold up a stop


async def to_its_end(deed: Callable[[], Awaitable[T]]) -> T:
    """Do it and return what it returns. Cancelled meanwhile: it goes on, ENDS_S at most, and the caller ends then.

    Raises what it raises.
    """
    shield = anyio.CancelScope(shield=True)
    result: list[T] = []
    failed: Exception | None = None

    async def bound() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            shield.deadline = anyio.current_time() + ENDS_S

    async with anyio.create_task_group() as group:
        group.start_soon(bound)
        with shield:
            try:
                result.append(await deed())
            except Exception as error:  # noqa: BLE001 - raised below: a task group would wrap it
                failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    await anyio.lowlevel.checkpoint_if_cancelled()
    return result[0]

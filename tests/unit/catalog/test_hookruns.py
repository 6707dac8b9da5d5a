"""What hooks did, as the catalog keeps it."""

from ckptd.catalog import hookruns
from ckptd.clock import SystemClock


async def test_runs_are_trimmed_for_each_outcome_so_that_skips_push_out_no_failure(catalog, monkeypatch):
    monkeypatch.setattr(hookruns, "RUNS_KEPT_MAX", 5)
    [one] = (await catalog.write(lambda tx: hookruns.enter(tx, ["one"]))).values()
    at = SystemClock().now()

    async def record(tx) -> None:
        runs = [
            hookruns.Ran(at=at, event="root.added", key=str(n), outcome="failed" if n < 3 else "skipped", ms=1.0)
            for n in range(30)
        ]
        await hookruns.record(tx, [hookruns.Progress(no=one.no, name="one", cursor=None, counts={}, runs=runs)])

    await catalog.write(record)
    logged, _ = await catalog.read(hookruns.runs)
    assert [entry.run.key for entry in logged] == ["29", "28", "27", "26", "25", "2", "1", "0"]

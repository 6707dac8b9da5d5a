"""The figures as Prometheus text. Labels are of closed lists, or name a mount: never an id, a name or a path of a user."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ckptd.query.distribution import LOWEST_S, Distribution
from ckptd.query.statistics import MEASURES, Statistics

LIMITS_S = tuple(LOWEST_S * 2**power for power in range(0, 24, 2))  # 100 µs to 7 min, each exact in a Distribution

Figures = Mapping[str, Any]


class Exposition(Collector):
    """Collects at each scrape what memory knows at that moment."""

    def __init__(self, now: Callable[[], Figures], statistics: Statistics, version: str) -> None:
        """`now` returns intake.meter.Meter.now() with `jobs`, `alerts` and `up_to_date` beside; it must not block."""
        self._now = now
        self._statistics = statistics
        self._version = version
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return the page, in the text format 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        now = self._now()
        yield _gauge("ckptd_build_info", "Version of the daemon; the value is 1.", 1, version=self._version)
        yield _gauge("ckptd_uptime_seconds", "Since the daemon started.", now["uptime_s"])
        yield from self._counted(now)
        yield from self._took()
        yield from _of_memory(now)
        yield from _of_work(now)

    def _counted(self, now: Figures) -> Iterator[Metric]:
        total = now["total"]
        events = CounterMetricFamily("ckptd_events", "Events since the start, by name.", labels=["event"])
        for name, count in sorted(total["counts"].items()):
            events.add_metric([name], count)
        yield events
        yield _counter(
            "ckptd_written_bytes", "Bytes of checkpoints made durable since the start.", total["written_bytes"]
        )
        yield _counter("ckptd_events_missed", "Events that slow subscribers lost.", now["events_missed"])
        for what, meaning in (
            ("hot", "Loads from memory (hit) or files (miss)."),
            ("answers", "Reads from the cache."),
        ):
            reads = CounterMetricFamily(f"ckptd_{what}_reads", meaning, labels=["result"])
            reads.add_metric(["hit"], now[what]["hits"])
            reads.add_metric(["miss"], now[what]["misses"])
            yield reads
        restarts = CounterMetricFamily("ckptd_worker_restarts", "Restarts of I/O workers, by mount.", labels=["mount"])
        for worker in now["workers"]:
            restarts.add_metric([worker["mount"]], worker["restarts"])
        yield restarts

    def _took(self) -> Iterator[Metric]:
        family = HistogramMetricFamily("ckptd_took_seconds", "How long things took; see `measure`.", labels=["measure"])
        for measure in MEASURES:
            took = self._statistics.total.took.get(measure) or Distribution()
            buckets = [(f"{limit_s:g}", count) for limit_s, count in zip(LIMITS_S, took.at_most(LIMITS_S), strict=True)]
            family.add_metric([measure], [*buckets, ("+Inf", took.count)], took.sum_s)
        yield family


def _of_memory(now: Figures) -> Iterator[Metric]:
    arenas = now["arenas"]
    for unit, title in (("bytes", "Memory lent to trainers"), ("count", "Arenas")):
        family = GaugeMetricFamily(f"ckptd_arena_{unit}", f"{title}, by use.", labels=["use"])
        for use, value in sorted(arenas[unit].items()):
            family.add_metric([use], value)
        yield family
    yield _gauge("ckptd_arena_bytes_max", "arenas.bytes_max.", arenas["bytes_max"])
    yield _gauge("ckptd_arena_waiting", "Saves that wait for an arena.", arenas["waiting"])
    yield _gauge("ckptd_hot_bytes_max", "arenas.hot_bytes_max.", now["hot"]["bytes_max"])
    yield _counter("ckptd_hot_given_up", "Hot copies given up for room, time or memory.", now["hot"]["given_up"])
    yield _gauge("ckptd_answers_bytes", "Answers kept in memory.", now["answers"]["bytes_used"])
    family = GaugeMetricFamily("ckptd_rss_bytes", "Resident memory, by process.", labels=["process"])
    for process in ("daemon", "workers", "clients"):
        family.add_metric([process], now["memory"][f"{process}_rss_bytes"])
    yield family


def _of_work(now: Figures) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("ckptd_jobs", "Jobs, by state.", labels=["state"])
    for state, count in sorted(now["jobs"].items()):
        jobs.add_metric([state], count)
    yield jobs
    if now["oldest_s"] is not None:
        yield _gauge("ckptd_job_oldest_seconds", "Age of the longest waiting job.", now["oldest_s"])
    alerts = GaugeMetricFamily("ckptd_alerts", "Alerts that are raised, by name.", labels=["alert"])
    for name, count in sorted(now["alerts"].items()):
        alerts.add_metric([name], count)
    yield alerts
    yield _gauge("ckptd_healthy", "1 while nothing grave is wrong.", int(now["well"]))


def _gauge(name: str, meaning: str, value: float, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(name, meaning, value=value)

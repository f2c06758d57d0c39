"""What an operator's Prometheus may know: counts and durations, by outcome.

No content, no key, no tenant's name: labels come from closed lists (endpoints, outcomes, states).
The registry is an object that `run` makes, not the library's global one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from appliance.serving.lifecycle import Lifecycle, State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

COMPLETE = "complete"
CLIENT_DISCONNECTED = "client_disconnected"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_INTER_EVENT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BUCKETS = len(_INTER_EVENT) + 1


class Metrics:
    """Everything that is counted.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, lifecycle: Lifecycle, *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        ProcessCollector(
            registry=self.registry
        )  # memory, descriptors, CPU: not readable from outside
        self.requests = Counter(
            "dcv_requests",
            "Inference requests by how they ended: complete, client_disconnected, or an error code",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "dcv_request_duration_seconds",
            "From the request's arrival to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_event = Histogram(
            "dcv_time_to_first_token_seconds",
            "From a streamed request's arrival to its first event",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.gaps = GapHistogram(
            "dcv_inter_token_seconds", "Between two arrivals of events of one stream"
        )
        self.registry.register(self.gaps)
        self.stream_events = Counter(
            "dcv_stream_events",
            "Events of streams handed on to clients, [DONE] included; about one for each token",
            ["endpoint"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "dcv_prompt_tokens",
            "Prompt tokens of answers that told their usage",
            ["endpoint"],
            registry=self.registry,
        )
        self.completion_tokens = Counter(
            "dcv_completion_tokens",
            "Completion tokens of answers that told their usage",
            ["endpoint"],
            registry=self.registry,
        )
        self.engine_failures = Counter(
            "dcv_engine_failures",
            "Ends of the engine while it should have run, by error code",
            ["code"],
            registry=self.registry,
        )
        self.connections_refused = Counter(
            "dcv_connections_refused",
            "Connections closed before their handshake: one too many in all, or of one peer",
            registry=self.registry,
        )
        self.contained_errors = Counter(
            "dcv_contained_errors",
            "Connections that ended with an error in the server's own code",
            registry=self.registry,
        )
        state = Gauge("dcv_state", "1 for the current state", ["state"], registry=self.registry)
        for possible in State:
            read = partial(_is_current, lifecycle, possible)
            state.labels(possible.value).set_function(read)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe(self, endpoint: str) -> ExchangeMetrics:
        """Begin to observe one request; call when it arrives."""
        return ExchangeMetrics(self, endpoint)


def _is_current(lifecycle: Lifecycle, state: State) -> float:
    return float(lifecycle.state is state)


class GapHistogram(Collector):
    """A histogram that is cheap enough to observe every event: the library's own takes some
    microseconds, which at thousands of events a second is a share of the processor.

    A stream counts in a list of its own and hands it over when it ends.
    """

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help_text = help_text
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def add(self, endpoint: str, counts: Sequence[int], total_s: float) -> None:
        """Add one stream's gaps: how many in each bucket, and all of them together."""
        mine = self._counts.setdefault(endpoint, [0] * BUCKETS)
        for bucket, count in enumerate(counts):
            mine[bucket] += count
        self._sums[endpoint] = self._sums.get(endpoint, 0.0) + total_s

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told: buckets add up, and the last one has no bound."""
        family = HistogramMetricFamily(self._name, self._help_text, labels=["endpoint"])
        bounds = [*map(floatToGoString, _INTER_EVENT), "+Inf"]
        for endpoint, counts in self._counts.items():
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([endpoint], buckets, self._sums[endpoint])
        yield family


class ExchangeMetrics:
    """One request being observed. Exactly one `end` counts, the first."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrived = metrics.clock()
        self._first: float | None = None
        self._last = 0.0
        self._gaps = [0] * BUCKETS
        self._events = 0
        self._ended = False

    def events(self, count: int) -> None:
        """So many events, at least one, arrived together and are handed on."""
        now = self._metrics.clock()
        if self._first is None:
            self._first = now
            self._metrics.first_event.labels(self._endpoint).observe(now - self._arrived)
        else:
            self._gaps[bisect_left(_INTER_EVENT, now - self._last)] += 1
        self._last = now
        self._events += count

    def usage(self, usage: object) -> None:
        """What an answer says it took: OpenAI's `usage` object, as the engine wrote it."""
        if not isinstance(usage, dict):
            return
        for key, counter in (
            ("prompt_tokens", self._metrics.prompt_tokens),
            ("completion_tokens", self._metrics.completion_tokens),
        ):
            if isinstance(count := usage.get(key), int) and count > 0:
                counter.labels(self._endpoint).inc(count)

    def end(self, outcome: str) -> None:
        """The request is over: `complete`, `client_disconnected`, or an error's code."""
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(self._endpoint, outcome).inc()
        elapsed = self._metrics.clock() - self._arrived
        self._metrics.duration.labels(self._endpoint).observe(elapsed)
        if self._first is not None:
            self._metrics.stream_events.labels(self._endpoint).inc(self._events)
            self._metrics.gaps.add(self._endpoint, self._gaps, self._last - self._first)

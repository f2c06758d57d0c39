"""What an operator's Prometheus may know: counts and durations, by outcome.

No content, no key, no tenant's name: labels come from closed lists (endpoints, outcomes, states).
The registry is an object that `run` makes, not the library's global one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from appliance.serving.lifecycle import Lifecycle, State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

COMPLETE = "complete"
CLIENT_DISCONNECTED = "client_disconnected"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_INTER_EVENT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Everything that is counted.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, lifecycle: Lifecycle, *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
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
        self.inter_event = Histogram(
            "dcv_inter_token_seconds",
            "Mean time between the events of one stream, one observation per stream",
            ["endpoint"],
            buckets=_INTER_EVENT,
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


class ExchangeMetrics:
    """One request being observed. Exactly one `end` counts, the first."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrived = metrics.clock()
        self._first: float | None = None
        self._events = 0
        self._ended = False

    def event(self) -> None:
        """Bytes of at least one event were handed on."""
        self._events += 1
        if self._first is None:
            self._first = self._metrics.clock()
            waited = self._first - self._arrived
            self._metrics.first_event.labels(self._endpoint).observe(waited)

    def end(self, outcome: str) -> None:
        """The request is over: `complete`, `client_disconnected`, or an error's code."""
        if self._ended:
            return
        self._ended = True
        now = self._metrics.clock()
        self._metrics.requests.labels(self._endpoint, outcome).inc()
        self._metrics.duration.labels(self._endpoint).observe(now - self._arrived)
        if self._first is not None and self._events > 1:
            mean = (now - self._first) / (self._events - 1)
            self._metrics.inter_event.labels(self._endpoint).observe(mean)

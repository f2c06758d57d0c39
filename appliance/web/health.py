"""`GET /health` and what `dcv status` prints: the same facts, from one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quart import Response
from quart_trio import QuartTrio

from appliance import __version__
from appliance.config import MeasuredConfig
from appliance.serving.admission import Admission
from appliance.serving.lifecycle import Lifecycle, State
from appliance.wire.canonical import JsonObject, canonical_json

ENGINE_NAME = "sglang"


@dataclass(frozen=True, slots=True)
class HealthSource:
    """Where the facts come from; complete from the first moment of the boot on.

    Attributes:
        attestation: verdict, schemes and age of our own evidence; null before there is any.
    """

    config: MeasuredConfig
    lifecycle: Lifecycle
    admission: Admission
    attestation: Callable[[], JsonObject | None]

    def snapshot(self) -> JsonObject:
        """The health document, without anything about requests but their number."""
        lifecycle, stage = self.lifecycle, self.lifecycle.stage
        serving = lifecycle.state is State.SERVING
        return {
            "status": lifecycle.state.value,
            "stage": {
                "number": stage.number,
                "name": stage.name,
                "since": int(stage.since),
                "detail": stage.detail,
            },
            "engine": {
                "name": ENGINE_NAME if not self.config.engine.unsafe_command else "unsafe_command",
                "version": self.config.engine.version,
                "ready": serving or lifecycle.state is State.DRAINING,
            },
            "attestation": self.attestation(),
            "model": self.config.model.id,
            "version": __version__,
            "uptime_s": int(lifecycle.uptime_s),
            "running": self.admission.running,
            "error": None
            if lifecycle.error is None
            else {"code": lifecycle.error.code, "message": lifecycle.error.message},
        }


def add_health_routes(app: QuartTrio, source: HealthSource) -> None:
    """`/health` and its aliases: 200 only while serving. `/health/live`: the process answers."""

    async def ready() -> Response:
        status = 200 if source.lifecycle.state is State.SERVING else 503
        return Response(
            canonical_json(source.snapshot()), status=status, content_type="application/json"
        )

    async def live() -> Response:
        return Response(b'{"status":"live"}', content_type="application/json")

    for prefix in ("", "/~inference@1.0", "/~inference@1.0/v1"):
        app.add_url_rule(f"{prefix}/health", f"{prefix}health", ready, methods=["GET"])
    app.add_url_rule("/health/ready", "health_ready", ready, methods=["GET"])
    app.add_url_rule("/health/live", "health_live", live, methods=["GET"])

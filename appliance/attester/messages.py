"""What the gateway and the collector say to each other, and how it is framed.

A frame is the length of its body, 4 bytes big-endian, and the body: one canonical JSON object of
at most 8 MiB. The gateway asks, `{"id", "op", …}`; the collector answers every question once,
with `{"id", "result"}` or `{"id", "error": {"code", "message"}}`, in the order in which it has the
answers, which need not be that of the questions.

    op               asks with                        is answered with
    hello            settings: [attestation], or null api, and the schemes of what is configured
    inventory                                         `GpuInventory`, see `inventory_to_json`
    gpu_evidence     nonce: 64 hex digits             list of `GpuEvidence`
    cpu_evidence     report_data: up to 128 hex       `CpuEvidence`
    set_gpus_ready   ready: true or false             null

`hello` comes first, and once. Neither side believes the other's bytes: what does not parse ends
the connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import trio

from appliance.attester.provider import (
    MAX_REPORT_DATA_BYTES,
    NONCE_BYTES,
    ConfidentialComputeState,
    GpuDevice,
    GpuInventory,
)
from appliance.config import Attestation
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    ConfigError,
    DeviceFault,
    EndorsementsUnavailable,
    Malformed,
    ProviderAbsent,
)
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.encoding import decode_hex
from appliance.wire.evidence import CpuEvidence, GpuEvidence, parse_cpu_evidence, parse_gpu_evidence

API = "dcv-attester/1"

MAX_FRAME_BYTES = 8 << 20
MAX_NESTING = 16
MAX_GPUS = 16
MAX_MESSAGE_CHARACTERS = 1000

LENGTH_BYTES = 4

OPERATIONS = ("hello", "inventory", "gpu_evidence", "cpu_evidence", "set_gpus_ready")

ERRORS: dict[str, type[ApplianceError]] = {
    error.code: error
    for error in (
        ProviderAbsent,
        DeviceFault,
        AttesterUnavailable,
        EndorsementsUnavailable,
        ConfigError,
    )
}
"""What a collector may answer with. Another code counts as AttesterUnavailable."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question. `arguments` are everything but `id` and `op`, not looked at yet."""

    id: int
    op: str
    arguments: JsonObject = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Its form in a frame."""
        return {"id": self.id, "op": self.op, **self.arguments}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer: a result, or the error in its place."""

    id: int
    result: JsonValue = None
    error: ApplianceError | None = None

    def to_json(self) -> JsonObject:
        """Its form in a frame."""
        if self.error is None:
            return {"id": self.id, "result": self.result}
        message = self.error.message[:MAX_MESSAGE_CHARACTERS]
        return {"id": self.id, "error": {"code": self.error.code, "message": message}}


@dataclass(frozen=True, slots=True)
class Hello:
    """What the collector is set up for.

    Attributes:
        cpu: scheme of the CPU evidence. gpu: of the GPU evidence; None without GPUs.
        gpu_count: so many must be there; 0 without GPUs.
    """

    cpu: str
    gpu: str | None
    gpu_count: int

    def to_json(self) -> JsonObject:
        """Its form in an answer."""
        return {"api": API, "cpu": self.cpu, "gpu": self.gpu, "gpu_count": self.gpu_count}


class FrameStream:
    """Frames over a byte stream. One task may send while another receives.

    A frame that was cut on its way out leaves the other side with half of it, so whoever is
    cancelled in `send` must give the connection up.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, document: JsonObject) -> None:
        """Send one frame.

        Raises:
            Malformed: the document is too large; nothing was sent.
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is gone.
        """
        body = canonical_json(document)
        if len(body) > MAX_FRAME_BYTES:
            raise Malformed(f"expected a frame of at most {MAX_FRAME_BYTES} bytes, got {len(body)}")
        await self._stream.send_all(len(body).to_bytes(LENGTH_BYTES, "big") + body)

    async def receive(self) -> JsonObject | None:
        """The next frame's document; None when the other side closed between two frames.

        Raises:
            Malformed: not a frame, or one that was cut.
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is gone.
        """
        head = await self._take(LENGTH_BYTES)
        if head is None:
            return None
        length = int.from_bytes(head, "big")
        if not 0 < length <= MAX_FRAME_BYTES:
            raise Malformed(
                f"expected a frame of 1 to {MAX_FRAME_BYTES} bytes, got {length}", field="length"
            )
        body = await self._take(length)
        if body is None:
            raise Malformed(f"expected {length} bytes, the stream ended", field="body")
        return parse_json_object(body, max_nesting=MAX_NESTING)

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    async def _take(self, length: int) -> bytes | None:
        """So many bytes; None if the stream ends before the first."""
        while len(self._buffer) < length:
            data = await self._stream.receive_some(1 << 16)
            if not data:
                if self._buffer:
                    raise Malformed(
                        f"expected {length} bytes, got {len(self._buffer)}", field="frame"
                    )
                return None
            self._buffer += data
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken


# ----------------------------------------------------------------------- what the collector reads


def parse_request(document: JsonObject) -> Request:
    """A question.

    Raises:
        Malformed: not one; of its arguments nothing is known yet.
    """
    arguments = dict(document)
    number, op = _id(arguments.pop("id", None)), arguments.pop("op", None)
    if not isinstance(op, str) or op not in OPERATIONS:
        raise Malformed(f"expected op to be one of {', '.join(OPERATIONS)}", field="op")
    return Request(number, op, arguments)


def parse_settings(arguments: JsonObject) -> Attestation | None:
    """The `[attestation]` of a `hello`, as `settings_to_json` makes it; paths are absolute.

    Raises:
        Malformed: not that.
    """
    settings = _only(arguments, "settings")
    if settings is None:
        return None
    try:
        return msgspec.convert(settings, Attestation, strict=True)
    except msgspec.ValidationError as error:
        raise Malformed(f"settings: {error}", field="settings") from None


def settings_to_json(settings: Attestation) -> JsonValue:
    """`[attestation]` as plain values."""
    plain: JsonValue = msgspec.to_builtins(settings)
    return plain


def parse_nonce(arguments: JsonObject) -> bytes:
    """The 32 bytes of a `gpu_evidence`.

    Raises:
        Malformed: not that.
    """
    return _hex(_only(arguments, "nonce"), "nonce", length=NONCE_BYTES)


def parse_report_data(arguments: JsonObject) -> bytes:
    """Up to 64 bytes of a `cpu_evidence`.

    Raises:
        Malformed: not that.
    """
    data = _hex(_only(arguments, "report_data"), "report_data")
    if len(data) > MAX_REPORT_DATA_BYTES:
        raise Malformed("report_data: expected at most 64 bytes", field="report_data")
    return data


def parse_ready(arguments: JsonObject) -> bool:
    """The new state of a `set_gpus_ready`.

    Raises:
        Malformed: not that.
    """
    ready = _only(arguments, "ready")
    if not isinstance(ready, bool):
        raise Malformed("ready: expected true or false", field="ready")
    return ready


def parse_nothing(arguments: JsonObject) -> None:
    """An `inventory` has no arguments.

    Raises:
        Malformed: it has.
    """
    if arguments:
        raise Malformed("expected no arguments")


# ------------------------------------------------------------------------- what the gateway reads


def parse_response(document: JsonObject) -> Response:
    """An answer; its result is not looked at yet.

    Raises:
        Malformed: not one.
    """
    number = _id(document.get("id"))
    if document.keys() == {"id", "result"}:
        return Response(number, result=document["result"])
    match document.get("error"):
        case {"code": str(code), "message": str(message)} if document.keys() == {"id", "error"}:
            kind = ERRORS.get(code, AttesterUnavailable)
            return Response(number, error=kind(message[:MAX_MESSAGE_CHARACTERS]))
        case _:
            raise Malformed("expected a result or an error with code and message", field="error")


def parse_hello(value: JsonValue) -> Hello:
    """What the collector is set up for.

    Raises:
        Malformed: not that, or another version of this protocol.
    """
    match value:
        case {
            "api": str(api),
            "cpu": str(cpu),
            "gpu": str() | None as gpu,
            "gpu_count": int(count),
        }:
            if api == API and not isinstance(count, bool):
                return Hello(cpu, gpu, count)
            raise Malformed(f"expected {API}", field="api")
        case _:
            raise Malformed("expected api, cpu, gpu and gpu_count", field="hello")


def parse_gpu_list(value: JsonValue) -> tuple[GpuEvidence, ...]:
    """Every GPU's evidence; nothing in it is trustworthy.

    Raises:
        Malformed: not that.
    """
    if not isinstance(value, list) or len(value) > MAX_GPUS:
        raise Malformed(f"expected a list of at most {MAX_GPUS} GPUs", field="gpus")
    return tuple(parse_gpu_evidence(one, where=f"gpus[{index}]") for index, one in enumerate(value))


def parse_cpu(value: JsonValue) -> CpuEvidence:
    """The CPU's evidence; nothing in it is trustworthy.

    Raises:
        Malformed: not that.
    """
    return parse_cpu_evidence(value, where="cpu")


def inventory_to_json(inventory: GpuInventory) -> JsonObject:
    """An inventory in an answer."""
    plain: JsonObject = msgspec.to_builtins(inventory)
    return plain


def parse_inventory(value: JsonValue) -> GpuInventory:
    """An inventory.

    Raises:
        Malformed: not that.
    """
    try:
        found = msgspec.convert(value, GpuInventory, strict=True)
    except msgspec.ValidationError as error:
        raise Malformed(f"inventory: {error}", field="inventory") from None
    if len(found.gpus) > MAX_GPUS:
        raise Malformed(f"inventory: expected at most {MAX_GPUS} GPUs", field="inventory.gpus")
    return found


def _id(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed("expected an id, a number from 0", field="id")
    return value


def _only(arguments: JsonObject, name: str) -> JsonValue:
    if arguments.keys() != {name}:
        raise Malformed(f"expected {name} and nothing else", field=name)
    return arguments[name]


def _hex(value: JsonValue, name: str, *, length: int | None = None) -> bytes:
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected lowercase hex", field=name)
    return decode_hex(value, field=name, length=length)


__all__ = [
    "API",
    "MAX_FRAME_BYTES",
    "ConfidentialComputeState",
    "FrameStream",
    "GpuDevice",
    "GpuInventory",
    "Hello",
    "Request",
    "Response",
]

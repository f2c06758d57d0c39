"""Checkpoints: what an appliance signs of an answer inside the answer itself (protocol.md section 6).

    core ── H("dcv/1 completion", sha256(JCS(core))) ── a leaf of the completion epoch
      └─ with `completion` ── JCS without `signature` ── Ed25519, the checkpoint key

A checkpoint stands in one of three places:

    in a whole answer      {…, "dcv": {checkpoint}}
    at a stream's end      data: {"id", "object", "created", "model", "choices": [], "dcv": {…}}
    while a stream runs    : dcv-checkpoint <base64url of the checkpoint's JSON, no padding>

The third is an SSE comment, so that no client stumbles over it (WHATWG HTML section 9.2.6), and is
written without padding like every base64url of RFC 7515. `prefix_bytes` and `prefix_sha256` are
about the content bytes before the first byte of the event that holds the checkpoint. An event
begins behind the blank line of the one before. So `: ping` lines right above its `data` line belong
to it: they are how the appliance says that it still waits for evidence, which covers a prefix that
must not grow meanwhile.

Nothing read here is trustworthy before `verify_checkpoint`, with the checkpoint key of an instance
document that a quote binds; and then it is the appliance's word, to be held against the bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import API_VERSION, PublicKey
from appliance.wire.receipt import (
    GpuAttested,
    read_count,
    read_gpu_attested,
    read_hex,
    read_members,
    read_sha256,
    read_text,
    signing_input,
    verify_signature,
)
from appliance.wire.sse import DONE_EVENT, behind_pings

TYPE = "checkpoint"
COMMENT = b": dcv-checkpoint "

MEMBER = "dcv"
TEE_MEMBERS = ("attestation", "resolved_model")
"""What `tee` puts beside a checkpoint, and nothing else may."""

RESOLVED_MODEL = ("id", "revision", "digest")
"""What an answer with `tee` tells of the model, out of the workload manifest."""

MAX_CHECKPOINT_BYTES = 32 << 10
"""Of the JSON. The longest has two inclusions with twelve path items each: some 4 KiB."""
MAX_NESTING = 8
MAX_ANSWER_NESTING = 256
"""Of the chunk or the answer around one, as deep as any answer may be."""

CORE_MEMBERS = (
    "api_version",
    "type",
    "seq",
    "final",
    "receipt_id",
    "workload_keyset_digest",
    "request_body_hash",
    "prefix_bytes",
    "prefix_sha256",
    "output_digest",
    "gpu",
    "key_id",
)

_DATA = b"data: {"
_DONE = DONE_EVENT.removesuffix(b"\n\n")
_SIGNS = (*(name.encode() for name in (MEMBER, *TEE_MEMBERS)), b"\\u")
"""Without all of these an event has none of the members: a name's letters stand there, unless one
is escaped, which a letter only can be by its number (RFC 8259 section 7)."""


@dataclass(frozen=True, slots=True)
class Core:
    """What a checkpoint says.

    Attributes:
        seq: how many checkpoints of this answer came before.
        keyset_digest, request_body_hash: 32 bytes, as in the receipt.
        prefix_bytes, prefix_sha256: of the content before this event; None where the answer is
            not streamed.
        output_digest: 32 bytes, `wire.output`; None unless final, or where there is none.
        gpu: the admission event.
        key_id: of the key that signs.
    """

    seq: int
    final: bool
    receipt_id: str
    keyset_digest: bytes
    request_body_hash: bytes
    prefix_bytes: int | None
    prefix_sha256: bytes | None
    output_digest: bytes | None
    gpu: GpuAttested
    key_id: str

    def to_json(self) -> JsonObject:
        """`core`, whose canonical form is committed to."""
        prefix, output = self.prefix_sha256, self.output_digest
        return {
            "api_version": API_VERSION,
            "type": TYPE,
            "seq": self.seq,
            "final": self.final,
            "receipt_id": self.receipt_id,
            "workload_keyset_digest": format_sha256(self.keyset_digest),
            "request_body_hash": format_sha256(self.request_body_hash),
            "prefix_bytes": self.prefix_bytes,
            "prefix_sha256": None if prefix is None else prefix.hex(),
            "output_digest": None if output is None else format_sha256(output),
            "gpu": self.gpu.to_json(),
            "key_id": self.key_id,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as received; only its form was checked.

    Attributes:
        completion: the completion event; None unless `tee` was asked for.
        signature: 64 bytes, over the canonical form of everything else.
        document: all of it.
    """

    core: Core
    completion: GpuAttested | None
    signature: bytes
    document: JsonObject

    @property
    def raw(self) -> bytes:
        """The canonical form of the core."""
        return canonical_json(self.core.to_json())

    @property
    def core_sha256(self) -> bytes:
        """What the completion event names it by, 32 bytes."""
        return hashlib.sha256(self.raw).digest()


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint in what was answered.

    Attributes:
        start, end: of the event that holds it, in content bytes; `start` is None in an answer
            that is not streamed.
        chunk: that event's JSON, or the answer; empty for a comment.
    """

    checkpoint: Checkpoint
    start: int | None
    end: int
    chunk: JsonObject


def sign_checkpoint(
    core: Core, completion: GpuAttested | None, *, sign: Callable[[bytes], bytes]
) -> JsonObject:
    """The signed checkpoint.

    Args:
        sign: Ed25519 over the signing input, by the key that `core.key_id` names; 64 bytes.
    """
    unsigned: JsonObject = {
        **core.to_json(),
        "completion": None if completion is None else completion.to_json(),
    }
    return {**unsigned, "signature": sign(signing_input(unsigned)).hex()}


def verify_checkpoint(checkpoint: Checkpoint, key: PublicKey) -> None:
    """The checkpoint was signed by this key, under its name.

    Args:
        key: the checkpoint key of the instance document.

    Raises:
        Unauthentic: it was not.
    """
    verify_signature(checkpoint.document, key, what="checkpoint")


def checkpoint_comment(document: JsonObject) -> bytes:
    """The SSE comment that holds a signed checkpoint, blank line included."""
    return COMMENT + base64.urlsafe_b64encode(canonical_json(document)).rstrip(b"=") + b"\n\n"


def checkpoint_chunk(
    *, object: str, response_id: str, created: int, model: str, members: JsonObject
) -> JsonObject:
    """The last chunk of a stream.

    Args:
        object: as the stream's other chunks name themselves.
        created: Unix seconds.
        members: `dcv`, and what `tee` adds beside it.
    """
    return {
        "id": response_id,
        "object": object,
        "created": created,
        "model": model,
        "choices": [],
        **members,
    }


# -------------------------------------------------------------------------------------- reading


def parse_checkpoint(data: bytes) -> Checkpoint:
    """Read a checkpoint's JSON.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_CHECKPOINT_BYTES:
        raise Malformed(f"checkpoint: expected at most {MAX_CHECKPOINT_BYTES} bytes")
    return read_checkpoint(parse_json_object(data, max_nesting=MAX_NESTING), where="$")


def read_checkpoint(value: JsonValue, *, where: str) -> Checkpoint:
    """Read a checkpoint that is already JSON.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    read_members(value, (*CORE_MEMBERS, "completion", "signature"), where)
    core = _core(value, where)
    completion = None
    if value["completion"] is not None:
        completion = read_gpu_attested(value["completion"], f"{where}.completion", "completion")
        if not core.final:
            raise Malformed(f"{where}.completion: expected null before the end", field=where)
    signature = read_hex(value["signature"], f"{where}.signature", 64)
    return Checkpoint(core, completion, signature, value)


def parse_core(data: bytes) -> Core:
    """Read the JSON of a core alone, as `attestation.raw` has it.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_CHECKPOINT_BYTES:
        raise Malformed(f"core: expected at most {MAX_CHECKPOINT_BYTES} bytes")
    value = parse_json_object(data, max_nesting=MAX_NESTING)
    read_members(value, CORE_MEMBERS, "$")
    return _core(value, "$")


def parse_comment(event: bytes) -> Checkpoint:
    """Read the comment form: one event, without its blank line.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    text = event.removeprefix(COMMENT)
    if text == event:
        raise Malformed(f"expected a comment that begins `{COMMENT.decode().strip()}`")
    if len(text) > MAX_CHECKPOINT_BYTES * 4 // 3 + 1:
        raise Malformed(f"checkpoint: expected at most {MAX_CHECKPOINT_BYTES} bytes")
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _not_base64url() from None
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text:  # padding, or unused bits that are set
        raise _not_base64url()
    try:
        return parse_checkpoint(data)
    except Malformed as error:  # an offset into what was decoded is none into the event
        raise Malformed(error.message, field=error.field) from None


def checkpoint_of_answer(answer: JsonObject) -> Checkpoint | None:
    """The checkpoint of an answer that was not streamed, or of a chunk; None where it has none.

    Raises:
        Malformed: it has one that is not of this form, or what `tee` adds without the completion
            event that it is about.
    """
    checkpoint = None
    if MEMBER in answer:
        checkpoint = read_checkpoint(answer[MEMBER], where=f"$.{MEMBER}")
    if checkpoint is None or checkpoint.completion is None:
        for name in TEE_MEMBERS:
            if name in answer:
                raise Malformed(
                    f"$.{name}: expected it only beside a checkpoint with a completion event",
                    field=f"$.{name}",
                )
    return checkpoint


def find_checkpoints(content: bytes) -> Iterator[Placed]:
    """Every checkpoint in a stream's content, in its order. What follows the last blank line, the
    half event of a stream that was cut, is not looked at.

    Raises:
        Malformed: one is not of this form; an event has what `tee` adds and no such checkpoint; or
            is not one that this appliance writes, so that a client may read it otherwise.
    """
    start = 0
    while (end := content.find(b"\n\n", start) + 2) > 1:
        placed = _placed(content[start : end - 2], start, end)
        if placed is not None:
            yield placed
        start = end


def _placed(event: bytes, start: int, end: int) -> Placed | None:
    if event.startswith(COMMENT):
        return Placed(parse_comment(event), start, end, {})
    data = behind_pings(event)
    if not _as_written(data):
        raise Malformed("expected events as this appliance writes them", offset=start)
    if not (data.startswith(_DATA) and any(sign in data for sign in _SIGNS)):
        return None
    try:
        chunk = parse_json_object(data[len(_DATA) - 1 :], max_nesting=MAX_ANSWER_NESTING)
        checkpoint = checkpoint_of_answer(chunk)
    except Malformed as error:
        raise Malformed(error.message, field=error.field, offset=start) from None
    return None if checkpoint is None else Placed(checkpoint, start, end, chunk)


def _as_written(event: bytes) -> bool:
    """One line, which a carriage return would end, too (WHATWG HTML section 9.2.5)."""
    one_line = b"\n" not in event and b"\r" not in event
    return one_line and (event in (b"", _DONE) or event.startswith((_DATA, b":")))


def _core(value: JsonObject, where: str) -> Core:
    if (value["api_version"], value["type"]) != (API_VERSION, TYPE):
        raise Malformed(f"{where}: expected a {TYPE} of {API_VERSION}", field=f"{where}.type")
    final, size, prefix = value["final"], value["prefix_bytes"], value["prefix_sha256"]
    output = value["output_digest"]
    if not isinstance(final, bool):
        raise Malformed(f"{where}.final: expected true or false", field=f"{where}.final")
    if (size is None) != (prefix is None):
        raise Malformed(f"{where}: expected prefix_bytes and prefix_sha256 both, or both null")
    if not final and (size is None or output is not None):
        raise Malformed(f"{where}: expected a prefix and no output_digest before the end")
    return Core(
        seq=read_count(value["seq"], f"{where}.seq"),
        final=final,
        receipt_id=read_text(value["receipt_id"], f"{where}.receipt_id"),
        keyset_digest=read_sha256(
            value["workload_keyset_digest"], f"{where}.workload_keyset_digest"
        ),
        request_body_hash=read_sha256(value["request_body_hash"], f"{where}.request_body_hash"),
        prefix_bytes=None if size is None else read_count(size, f"{where}.prefix_bytes"),
        prefix_sha256=(None if prefix is None else read_hex(prefix, f"{where}.prefix_sha256", 32)),
        output_digest=None if output is None else read_sha256(output, f"{where}.output_digest"),
        gpu=read_gpu_attested(value["gpu"], f"{where}.gpu", "admission"),
        key_id=read_text(value["key_id"], f"{where}.key_id"),
    )


def _not_base64url() -> Malformed:
    return Malformed("checkpoint: expected canonical base64url without padding")

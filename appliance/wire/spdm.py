"""SPDM 1.1: one GET_MEASUREMENTS request and its signed MEASUREMENTS response.

DMTF DSP0274 version 1.1, section 10.11 (tables "GET_MEASUREMENTS request message format",
"Successful MEASUREMENTS response message format", "Measurement block format" and "DMTF measurement
specification format"). NVIDIA's devices hand out the two messages as one byte string, the request's
37 bytes first; that string is what the signature at its end is over. Integers are little-endian.

    request    version 11 | code e0 | attributes | operation | nonce 32 | slot
    response   version 11 | code 60 | param1 | slot | blocks u8 | record length u24
               | blocks | nonce 32 | opaque length u16 | opaque | signature 96 (r || s)
    block      index u8 | specification u8 (1: DMTF) | size u16 | type u8 | length u16 | value

Nothing that is read here is trustworthy before its signature was checked (`rats.schemes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.cursor import Cursor

VERSION = 0x11
GET_MEASUREMENTS = 0xE0
MEASUREMENTS = 0x60
DMTF = 0x01

REQUEST_BYTES = 37
NONCE_BYTES = 32
SIGNATURE_BYTES = 96
"""ECDSA over P-384: r and s, 48 bytes each, big-endian (DSP0274 section 15)."""

DIGEST_BYTES = 48
"""SHA-384, the measurement hash that NVIDIA's devices negotiate."""

MAX_TRANSCRIPT_BYTES = 1 << 16
"""NVML's buffer for one has 8 KiB."""

ALL_MEASUREMENTS = 0xFF
SIGNATURE_REQUESTED = 0x01
RAW_BIT_STREAM = 0x80
LAST_INDEX = 0xFE
SLOT_BITS = 0x0F


@dataclass(frozen=True, slots=True)
class MeasurementBlock:
    """One measurement.

    Attributes:
        index: 1 to 254.
        value_type: DMTFSpecMeasurementValueType; bit 7 says that the value is no digest.
        value: 48 bytes (SHA-384), or the raw bit stream.
    """

    index: int
    value_type: int
    value: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Transcript:
    """A request and its response.

    Attributes:
        nonce: the requester's 32 bytes: ours.
        slot: of the certificate chain whose key signs.
        blocks: by index; in the order of the response.
        responder_nonce: 32 bytes of the device's.
        opaque: the vendor's own data, uninterpreted. opaque_offset: where it begins.
        signed: what the signature is over, everything before it.
        signature: r || s, 96 bytes.
    """

    nonce: bytes
    slot: int
    blocks: dict[int, MeasurementBlock]
    responder_nonce: bytes
    opaque: bytes
    opaque_offset: int
    signed: bytes
    signature: bytes

    def __repr__(self) -> str:
        return f"Transcript({len(self.blocks)} blocks, {len(self.opaque)} opaque bytes)"


def parse_transcript(data: bytes) -> Transcript:
    """Parse the request and the response, to the last byte.

    Raises:
        Malformed: not that form, another version, no signature was asked for, an index twice, or
            bytes left over.
    """
    if len(data) > MAX_TRANSCRIPT_BYTES:
        raise Malformed(
            f"report: expected at most {MAX_TRANSCRIPT_BYTES} bytes, got {len(data)}",
            field="report",
        )
    cursor = Cursor(data, "little")
    # 1. What was asked: without the signature bit the response would end before its signature.
    cursor.expect(bytes((VERSION, GET_MEASUREMENTS)), "request.version_and_code")
    attributes = cursor.unsigned(1, "request.attributes")
    if not attributes & SIGNATURE_REQUESTED:
        raise cursor.malformed("expected the signature to be requested", "request.attributes")
    operation = cursor.unsigned(1, "request.operation")
    nonce = cursor.take(NONCE_BYTES, "request.nonce")
    slot = cursor.unsigned(1, "request.slot") & SLOT_BITS
    # 2. What was answered. "Param2 … shall contain the slot number … specified in the
    #    corresponding GET_MEASUREMENTS request"; its upper half and Param1 are reserved.
    cursor.expect(bytes((VERSION, MEASUREMENTS)), "response.version_and_code")
    cursor.take(1, "response.param1")
    if cursor.unsigned(1, "response.slot") & SLOT_BITS != slot:
        raise cursor.malformed("expected the slot of the request", "response.slot")
    # 3. The measurements.
    count = cursor.unsigned(1, "response.number_of_blocks")
    record_length = cursor.unsigned(3, "response.record_length")
    blocks = _parse_blocks(cursor.sub(record_length, "response.record"), count)
    if operation != ALL_MEASUREMENTS and blocks.keys() != {operation}:
        raise cursor.malformed("expected the measurement that was asked for", "response.record")
    # 4. The device's nonce, the vendor's data, the signature, and nothing after it.
    responder_nonce = cursor.take(NONCE_BYTES, "response.nonce")
    opaque_length = cursor.unsigned(2, "response.opaque_length")
    opaque_offset = cursor.offset
    opaque = cursor.take(opaque_length, "response.opaque")
    signed = data[: cursor.offset]
    signature = cursor.take(SIGNATURE_BYTES, "response.signature")
    cursor.end("report")
    return Transcript(
        nonce, slot, blocks, responder_nonce, opaque, opaque_offset, signed, signature
    )


def _parse_blocks(record: Cursor, count: int) -> dict[int, MeasurementBlock]:
    if count == 0:
        raise record.malformed("expected at least one block", "response.number_of_blocks")
    blocks: dict[int, MeasurementBlock] = {}
    for _ in range(count):
        block = _parse_block(record)
        # Of two values for one index a verifier and an attacker could each pick their own.
        if block.index in blocks:
            raise record.malformed(f"index {block.index} twice", "response.record.index")
        blocks[block.index] = block
    record.end("response.record")
    return blocks


def _parse_block(record: Cursor) -> MeasurementBlock:
    index = record.unsigned(1, "response.record.index")
    if not 1 <= index <= LAST_INDEX:
        raise record.malformed(f"expected 1 to {LAST_INDEX}, got {index}", "response.record.index")
    record.expect(bytes((DMTF,)), "response.record.specification")
    size = record.unsigned(2, "response.record.size")
    measurement = record.sub(size, "response.record.measurement")
    value_type = measurement.unsigned(1, "response.record.value_type")
    length = measurement.unsigned(2, "response.record.value_length")
    value = measurement.take(length, "response.record.value")
    measurement.end("response.record.measurement")
    if not value_type & RAW_BIT_STREAM and length != DIGEST_BYTES:
        raise measurement.malformed(
            f"expected a digest of {DIGEST_BYTES} bytes, got {length}", "response.record.value"
        )
    return MeasurementBlock(index, value_type, value)

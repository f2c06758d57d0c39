"""TCG event logs: what firmware says it measured, and the PCRs or RTMRs that follow from it.

The crypto-agile log of TCG, PC Client Platform Firmware Profile, version 1.06, section 10: first
a TCG_PCR_EVENT of the SHA-1 era that describes the log (10.4.5.1), then TCG_PCR_EVENT2s.
Everything is little-endian. A TDX guest's log (CCEL) has the same form; its index 0 is MRTD, 1 to
4 are RTMR0 to RTMR3 (UEFI 2.10, 38.4.1).

A log is not signed. It is believed exactly as far as its replay gives the registers that are, and
even then an event's `data` is only a comment: the digest is what was extended.

Padding. Firmware exposes the log as an area of fixed size in an ACPI table, and that is what some
tools hand on. What is behind the last event is then all 0x00 (never written) or all 0xff (EDK2
fills the area so, that a reader can tell the end). Exactly these two tails are accepted; an event
of zeros would have no digest and extend nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject
from appliance.wire.cursor import Cursor
from appliance.wire.tpm import DIGEST_BYTES, HASHES

MAX_LOG_BYTES = 1 << 20
"""Real ones have 20 to 100 KiB; CCEL areas are 64 KiB."""

MAX_EVENTS = 4096
"""Real ones have 50 to 200."""

MAX_ALGORITHMS = 8
MAX_DIGEST_BYTES = 64
MAX_REGISTER = 31
SHOWN_BYTES = 256
"""Of an event's data in JSON."""

EV_NO_ACTION = 0x00000003
"""Extends nothing: "the event field contains information" (10.4.1)."""

EVENT_TYPES = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    EV_NO_ACTION: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    0x00000006: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    0x00000008: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    0x0000000D: "EV_IPL",
    0x0000000E: "EV_IPL_PARTITION_DATA",
    0x0000000F: "EV_NONHOST_CODE",
    0x00000010: "EV_NONHOST_CONFIG",
    0x00000011: "EV_NONHOST_INFO",
    0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x00000013: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}

_STARTUP_LOCALITY = b"StartupLocality\0"


@dataclass(frozen=True, slots=True)
class Event:
    """One entry.

    Attributes:
        register: the PCR's number, or the CCEL's.
        type: as in `EVENT_TYPES`.
        digests: what was extended, by the name of the bank; banks without a name here are left out.
        data: what the firmware says about it.
    """

    register: int
    type: int
    digests: Mapping[str, bytes]
    data: bytes

    @property
    def type_name(self) -> str:
        """The specification's, or the number."""
        return EVENT_TYPES.get(self.type, f"0x{self.type:08x}")

    def to_json(self) -> JsonObject:
        """For people; of the data the first bytes and how many there are."""
        return {
            "register": self.register,
            "type": self.type_name,
            "digests": {bank: digest.hex() for bank, digest in self.digests.items()},
            "data": self.data[:SHOWN_BYTES].hex(),
            "data_bytes": len(self.data),
        }


def parse_event_log(data: bytes) -> tuple[Event, ...]:
    """Every event after the describing one.

    Raises:
        Malformed: a log of the SHA-1 era, another form, out of bounds, or neither an event nor
            padding at the end.
    """
    if len(data) > MAX_LOG_BYTES:
        raise Malformed("event_log: expected at most 1 MiB", field="event_log")
    # Where a tail of padding begins, found once: looking at each event would be quadratic.
    padding = min(len(data.rstrip(b"\x00")), len(data.rstrip(b"\xff")))
    cursor = Cursor(data, "little")
    algorithms = _header(cursor)
    events: list[Event] = []
    while cursor.remaining and cursor.offset < padding:
        if len(events) == MAX_EVENTS:
            raise cursor.malformed(f"expected at most {MAX_EVENTS} events", "event_log")
        events.append(_event(cursor, algorithms, f"event_log[{len(events)}]"))
    return tuple(events)


def replay(events: Iterable[Event], algorithm: str = "sha256") -> dict[int, bytes]:
    """The registers' values after these events, of those that any event extends.

    Args:
        events: in the order of the log.
        algorithm: `sha256` for a TPM's usual bank, `sha384` for RTMRs.

    Raises:
        Malformed: an event extends something in other banks only; or the locality the TPM was
            started from comes twice or too late to be the initial value.
    """
    size = DIGEST_BYTES[algorithm]
    registers: dict[int, bytes] = {}
    for index, event in enumerate(events):
        field = f"event_log[{index}]"
        if event.type == EV_NO_ACTION:
            if event.data.startswith(_STARTUP_LOCALITY):
                _start(registers, event, size, field)
            continue
        if event.register > MAX_REGISTER:
            raise Malformed(f"{field}: expected a register, got {event.register}", field=field)
        digest = event.digests.get(algorithm)
        if digest is None:
            raise Malformed(f"{field}: expected a {algorithm} digest", field=field)
        before = registers.get(event.register, bytes(size))
        registers[event.register] = hashlib.new(algorithm, before + digest).digest()
    return registers


def _start(registers: dict[int, bytes], event: Event, size: int, field: str) -> None:
    """PCR 0 begins as the locality that sent TPM2_Startup: 0, 3, or 4 for a measured CRTM.

    "The TCG_EfiStartupLocalityEvent SHALL be placed in the log before any event that extends
    PCR[0]" (10.4.5.3).
    """
    if event.register != 0 or len(event.data) != len(_STARTUP_LOCALITY) + 1:
        raise Malformed(f"{field}: expected a locality of PCR 0", field=field)
    if 0 in registers:
        raise Malformed(f"{field}: expected the locality before PCR 0 is extended", field=field)
    if event.data[-1]:
        registers[0] = bytes(size - 1) + event.data[-1:]


def _header(cursor: Cursor) -> dict[int, int]:
    """The TCG_PCR_EVENT with a TCG_EfiSpecIDEvent: digest sizes by TPM_ALG_ID."""
    cursor.take(4, "header.register")
    cursor.expect(EV_NO_ACTION.to_bytes(4, "little"), "header.type")
    cursor.zeros(20, "header.digest")
    spec = cursor.sub(cursor.unsigned(4, "header.size"), "header.event")
    spec.expect(b"Spec ID Event03\0", "header.signature")
    spec.take(4, "header.platform_class")
    spec.take(3, "header.version")
    spec.take(1, "header.uintn_size")
    count = spec.unsigned(4, "header.algorithms")
    if not 0 < count <= MAX_ALGORITHMS:
        raise spec.malformed(f"expected 1 to {MAX_ALGORITHMS}, got {count}", "header.algorithms")
    algorithms: dict[int, int] = {}
    for _ in range(count):
        algorithm = spec.unsigned(2, "header.algorithms")
        size = spec.unsigned(2, "header.algorithms")
        known = DIGEST_BYTES.get(HASHES.get(algorithm, ""), size)
        if algorithm in algorithms or size != known or not 0 < size <= MAX_DIGEST_BYTES:
            raise spec.malformed(
                "expected every algorithm once, with its size", "header.algorithms"
            )
        algorithms[algorithm] = size
    spec.take(spec.unsigned(1, "header.vendor_info"), "header.vendor_info")
    spec.end("header.event")
    return algorithms


def _event(cursor: Cursor, algorithms: Mapping[int, int], field: str) -> Event:
    register = cursor.unsigned(4, f"{field}.register")
    type = cursor.unsigned(4, f"{field}.type")
    count = cursor.unsigned(4, f"{field}.digests")
    if count > len(algorithms):
        raise cursor.malformed(f"expected at most {len(algorithms)}", f"{field}.digests")
    seen: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = cursor.unsigned(2, f"{field}.digests")
        if algorithm not in algorithms or algorithm in seen:
            raise cursor.malformed("expected each algorithm of the header once", f"{field}.digests")
        seen[algorithm] = cursor.take(algorithms[algorithm], f"{field}.digests")
    data = cursor.take(cursor.unsigned(4, f"{field}.data"), f"{field}.data")
    digests = {HASHES[one]: digest for one, digest in seen.items() if one in HASHES}
    return Event(register, type, digests, data)

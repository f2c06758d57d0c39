"""What an NVIDIA GPU or NVSwitch says in the opaque data of its SPDM measurements.

Sources: the parsers of nv-local-gpu-verifier 2.7.3 (`spdm_msrt_resp_msg.py`) and of NVIDIA's
attestation-sdk (`gpu_opaque_data_parser.cpp`, `switch/evidence.cpp`); NVIDIA's "Opaque Data
Format" for what is refused here. The data is a list of type u16, length u16, value; integers are
little-endian. GPUs and switches share the numbers and disagree about some meanings: a GPU's
`vbios_version` is 8 binary bytes, a switch's is text; number 22 is a list of the switches a GPU is
linked to, or the switch's own identifier.

Nothing here is trustworthy before the report's signature was checked (`rats.schemes.nvidia_gpu`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.cursor import Cursor
from appliance.wire.spdm import Transcript, parse_transcript

TYPES = {
    1: "cert_issuer_name",
    2: "cert_authority_key_identifier",
    3: "driver_version",
    4: "gpu_info",
    5: "sku",
    6: "vbios_version",
    7: "manufacturer_id",
    8: "tamper_detection",
    9: "smc",
    10: "vpr",
    11: "nvdec0_status",
    12: "msrscnt",
    13: "cprinfo",
    14: "board_id",
    15: "chip_sku",
    16: "chip_sku_mod",
    17: "project",
    18: "project_sku",
    19: "project_sku_mod",
    20: "fwid",
    21: "protected_pcie_status",
    22: "switch_pdi",
    23: "floorswept_ports",
    24: "position_id",
    25: "lock_switch_status",
    26: "switch_gpu_pdis",
    32: "gpu_link_conn",
    33: "sys_enable_status",
    34: "opaque_data_version",
    35: "chip_info",
    36: "feature_flag",
}
"""NVIDIA's names, without their `OPAQUE_FIELD_ID_`. Others are kept under `type_<number>`."""

VERSIONED_MAGIC = b"NVDAOD"
"""Opaque data of drivers from CUDA 13.5 on begins with it, and is laid out differently."""

FEATURES = {0: "SPT", 1: "MPT", 2: "PPCIE"}
"""Single GPU passed through, multiple GPUs passed through, protected PCIe."""

ENABLED = b"\xaa"
DISABLED = b"\x55"
"""Of `nvdec0_status` and `protected_pcie_status`: the hardware's own constants."""

FWID_BYTES = 48
PDI_BYTES = 8
VBIOS_BYTES = 8

SHA384_OID = bytes.fromhex("608648016503040202")
"""2.16.840.1.101.3.4.2.2, as DER has it."""

INTEGER, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE = 0x02, 0x04, 0x06, 0x30
FWIDS = 0xA6
"""Context tag 6 of a DiceTcbInfo."""

TAG_NUMBER = 0x1F

LS10_BOARD = ("5612", "0002", "890")
"""Project, project SKU and chip SKU of the one LS10 board; a switch's report has none of them."""

_WORD = re.compile(rb"[0-9A-Za-z._-]{1,64}\Z")
_SWITCH_BIOS = re.compile(rb"[0-9A-Fa-f]{2}(?:\.[0-9A-Fa-f]{2}){4}\Z")


@dataclass(frozen=True, slots=True, repr=False)
class NvidiaReport:
    """A report of a GPU or a switch, parsed.

    Attributes:
        transcript: the SPDM messages.
        fields: the opaque data by the names of `TYPES`; values as they came.
    """

    transcript: Transcript
    fields: dict[str, bytes]

    def __repr__(self) -> str:
        return f"NvidiaReport({self.transcript!r}, {', '.join(self.fields)})"

    @property
    def fwid(self) -> bytes | None:
        """Digest of the firmware that holds the signing key; early drivers leave it out.

        Raises:
            Malformed: not 48 bytes.
        """
        fwid = self.fields.get("fwid")
        if fwid is not None and len(fwid) != FWID_BYTES:
            raise _malformed("fwid", f"expected {FWID_BYTES} bytes, got {len(fwid)}")
        return fwid

    def measurements(self) -> dict[int, bytes]:
        """Values by the index that reference values use: SPDM counts from 1, they from 0."""
        return {index - 1: block.value for index, block in self.transcript.blocks.items()}


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """What a GPU says about itself.

    Attributes:
        driver_version: as `nvidia-smi` prints it. vbios_version: as `96.00.9F.00.04`.
        project, project_sku, chip_sku: of the board, uppercase; empty where not said.
        chip_info: the chip's name, on Blackwell; empty on Hopper.
        nvdec0_status: the one byte, or None. Its measurement counts unless this is `DISABLED`.
        protected_pcie: None where not said.
        feature_flag: a number, of `FEATURES` if it is known; None before opaque data version 1.
        opaque_data_version: None before the driver sent one.
        switches: identifiers of the NVSwitches its links end at, hex; empty without any.
    """

    driver_version: str
    vbios_version: str
    project: str
    project_sku: str
    chip_sku: str
    chip_info: str
    nvdec0_status: bytes | None
    protected_pcie: bool | None
    feature_flag: int | None
    opaque_data_version: int | None
    switches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SwitchIdentity:
    """What an NVSwitch says about itself.

    Attributes:
        vbios_version: of its BIOS, as `96.10.55.00.01`.
        pdi: its own identifier, hex. gpus: those of the GPUs at its ports, hex.
    """

    vbios_version: str
    pdi: str
    gpus: tuple[str, ...]


def parse_report(data: bytes) -> NvidiaReport:
    """Parse a report: the SPDM messages and the fields in them.

    Raises:
        Malformed: not that form, a field twice, or the versioned opaque data of CUDA 13.5 and
            later, which this appliance does not read.
    """
    transcript = parse_transcript(data)
    return NvidiaReport(transcript, _parse_opaque(transcript))


def gpu_identity(report: NvidiaReport) -> GpuIdentity:
    """Read a GPU's fields.

    Raises:
        Malformed: the driver's or the VBIOS's version is missing, or a value has not its form.
    """
    fields = report.fields
    return GpuIdentity(
        driver_version=_text("driver_version", _required(fields, "driver_version")),
        vbios_version=format_vbios_version(_required(fields, "vbios_version")),
        project=_optional_text(fields, "project").upper(),
        project_sku=_optional_text(fields, "project_sku").upper(),
        chip_sku=_optional_text(fields, "chip_sku").upper(),
        chip_info=_optional_text(fields, "chip_info"),
        nvdec0_status=fields.get("nvdec0_status"),
        protected_pcie=_protected_pcie(fields),
        feature_flag=_number(fields, "feature_flag"),
        opaque_data_version=_number(fields, "opaque_data_version"),
        switches=_identifiers(fields, "switch_pdi"),
    )


def switch_identity(report: NvidiaReport) -> SwitchIdentity:
    """Read a switch's fields.

    Raises:
        Malformed: the BIOS's version is missing, or a value has not its form.
    """
    version = _required(report.fields, "vbios_version").rstrip(b"\0")
    if not _SWITCH_BIOS.match(version):
        raise _malformed("vbios_version", "expected five hex pairs with dots between")
    own = _identifiers(report.fields, "switch_pdi")
    return SwitchIdentity(
        vbios_version=version.decode("ascii").upper(),
        pdi=own[0] if own else "",
        gpus=_identifiers(report.fields, "switch_gpu_pdis"),
    )


def format_vbios_version(value: bytes) -> str:
    """A GPU's VBIOS version as NVIDIA writes it, `96.00.9F.00.04`.

    The eight bytes are two little-endian words: the version proper, of four parts, and the
    board maker's revision, of which the lowest byte is the fifth part.

    Raises:
        Malformed: not eight bytes.
    """
    if len(value) != VBIOS_BYTES:
        raise _malformed("vbios_version", f"expected {VBIOS_BYTES} bytes, got {len(value)}")
    return ".".join(f"{part:02X}" for part in (*value[3::-1], value[4]))


def driver_rim_id(chip: str, identity: GpuIdentity) -> str:
    """The name under which NVIDIA's service has the driver's reference values."""
    if chip.startswith("GH"):
        return f"NV_GPU_DRIVER_{chip}_{identity.driver_version}"
    return f"NV_GPU_CC_DRIVER_{identity.chip_info or chip}_{identity.driver_version}"


def vbios_rim_id(identity: GpuIdentity) -> str:
    """The name under which NVIDIA's service has the VBIOS's reference values."""
    board = (identity.project, identity.project_sku, identity.chip_sku)
    return "_".join(("NV_GPU_VBIOS", *board, identity.vbios_version.replace(".", "")))


def switch_rim_id(identity: SwitchIdentity) -> str:
    """The name under which NVIDIA's service has the switch BIOS's reference values."""
    return "_".join(("NV_SWITCH_BIOS", *LS10_BOARD, identity.vbios_version.replace(".", "")))


def parse_dice_fwid(extension: bytes) -> bytes:
    """The firmware's SHA-384 digest in the DICE extension of an attestation certificate.

    There are two forms. Hopper and LS10 have a CompositeDeviceID, `SEQUENCE {INTEGER, SEQUENCE
    (a public key), FWID}`; Blackwell has a DiceTcbInfo (TCG DICE Attestation Architecture 1.1,
    section 6.1.1), whose field 6 is a `SEQUENCE OF FWID`; the first one counts. `FWID ::= SEQUENCE
    {hashAlg OBJECT IDENTIFIER, digest OCTET STRING}`.

    Raises:
        Malformed: neither of them, DER with a second spelling, or a digest that is not SHA-384.
    """
    (outer,) = _der_items(extension, 1)
    fields = _der_items(_der_value(outer, SEQUENCE), None)
    tags = [tag for tag, _ in fields]
    if tags == [INTEGER, SEQUENCE, SEQUENCE]:
        fwid = fields[2]
    elif tags.count(FWIDS) == 1 and _are_ascending(tags):
        fwid = _der_items(fields[tags.index(FWIDS)][1], None)[0]
    else:
        raise Malformed("dice: expected a CompositeDeviceID or a DiceTcbInfo", field="dice")
    algorithm, digest = _der_items(_der_value(fwid, SEQUENCE), 2)
    if _der_value(algorithm, OBJECT_IDENTIFIER) != SHA384_OID:
        raise Malformed("dice: expected the firmware's digest to be SHA-384", field="dice.hashAlg")
    value = _der_value(digest, OCTET_STRING)
    if len(value) != FWID_BYTES:
        raise Malformed(f"dice: expected {FWID_BYTES} bytes of digest", field="dice.digest")
    return value


def _der_items(data: bytes, count: int | None) -> list[tuple[int, bytes]]:
    """Tag and value of each element, to the last byte (X.690 sections 8.1 and 10.1)."""
    cursor = Cursor(data, "big")
    items: list[tuple[int, bytes]] = []
    while cursor.remaining:
        tag = cursor.unsigned(1, "dice.tag")
        if tag & TAG_NUMBER == TAG_NUMBER:
            raise cursor.malformed("expected a tag of one byte", "dice.tag")
        items.append((tag, cursor.take(_der_length(cursor), "dice.value")))
    if not items or len(items) != (count or len(items)):
        raise cursor.malformed(f"expected {count or 'some'} elements, got {len(items)}", "dice")
    return items


def _der_length(cursor: Cursor) -> int:
    first = cursor.unsigned(1, "dice.length")
    if first < 0x80:
        return first
    size = first & 0x7F
    if not 1 <= size <= 2:
        raise cursor.malformed("expected a definite length below 64 KiB", "dice.length")
    length = cursor.unsigned(size, "dice.length")
    # "The length octets shall be … the minimum number of octets" (X.690 section 10.1).
    if length < 0x80 or (size == 2 and length < 0x100):
        raise cursor.malformed("expected the shortest length", "dice.length")
    return length


def _der_value(item: tuple[int, bytes], tag: int) -> bytes:
    if item[0] != tag:
        raise Malformed(f"dice: expected tag {tag:02x}, got {item[0]:02x}", field="dice.tag")
    return item[1]


def _are_ascending(tags: list[int]) -> bool:
    """Context tags 0 to 9, each at most once and in order."""
    numbers = [tag & TAG_NUMBER for tag in tags]
    return all(tag & 0xC0 == 0x80 for tag in tags) and numbers == sorted(set(numbers))


def _parse_opaque(transcript: Transcript) -> dict[str, bytes]:
    data = transcript.opaque
    cursor = Cursor(data, "little", at=transcript.opaque_offset)
    if data.startswith(VERSIONED_MAGIC):
        raise cursor.malformed(
            "NVDAOD, the versioned format of CUDA 13.5 and later, is not read here: use a driver "
            "before it",
            "opaque",
        )
    fields: dict[str, bytes] = {}
    while cursor.remaining:
        number = cursor.unsigned(2, "opaque.type")
        name = TYPES.get(number, f"type_{number}")
        if name in fields:
            raise cursor.malformed("twice", f"opaque.{name}")
        length = cursor.unsigned(2, f"opaque.{name}.length")
        fields[name] = cursor.take(length, f"opaque.{name}")
    return fields


def _required(fields: dict[str, bytes], name: str) -> bytes:
    value = fields.get(name)
    if value is None:
        raise _malformed(name, "expected it, it is missing")
    return value


def _text(name: str, value: bytes) -> str:
    # It becomes part of a name that is asked for, hence no slash and no space.
    word = value.rstrip(b"\0 ")
    if not _WORD.match(word):
        raise _malformed(name, "expected letters, digits, dots, dashes and underscores")
    return word.decode("ascii")


def _optional_text(fields: dict[str, bytes], name: str) -> str:
    # Buffers are longer than what is in them, and what follows the first zero means nothing.
    value = fields.get(name, b"").split(b"\0")[0]
    return _text(name, value) if value else ""


def _number(fields: dict[str, bytes], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not 1 <= len(value) <= 8:
        raise _malformed(name, f"expected 1 to 8 bytes, got {len(value)}")
    return int.from_bytes(value, "little")


def _protected_pcie(fields: dict[str, bytes]) -> bool | None:
    value = fields.get("protected_pcie_status")
    if value is None:
        return None
    if value not in (ENABLED, DISABLED):
        raise _malformed("protected_pcie_status", f"expected aa or 55, got {value.hex()[:16]}")
    return value == ENABLED


def _identifiers(fields: dict[str, bytes], name: str) -> tuple[str, ...]:
    """The distinct ones, sorted; a zero one stands for a link that ends nowhere."""
    value = fields.get(name, b"")
    if len(value) % PDI_BYTES:
        raise _malformed(name, f"expected a multiple of {PDI_BYTES} bytes, got {len(value)}")
    each = {value[at : at + PDI_BYTES] for at in range(0, len(value), PDI_BYTES)}
    return tuple(sorted(one.hex() for one in each if any(one)))


def _malformed(name: str, what: str) -> Malformed:
    return Malformed(f"opaque.{name}: {what}", field=f"opaque.{name}")

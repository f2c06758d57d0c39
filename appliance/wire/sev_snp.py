"""AMD SEV-SNP attestation reports: 1184 bytes to frozen values.

Source: SEV Secure Nested Paging Firmware ABI Specification, AMD publication 56860: the tables of
ATTESTATION_REPORT, of the guest policy, of TCB_VERSION, and of the ECDSA P-384 signature format.
All integers are little-endian.

Nothing here is trustworthy before `rats.schemes.sev_snp` has checked the signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from appliance.errors import Malformed
from appliance.wire.cursor import Cursor

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
"""What the signature is over: everything before it."""

VERSIONS = range(2, 6)
FIRST_VERSION_WITH_CPUID = 3
FIRST_VERSION_WITH_MITIGATIONS = 4
"""Of LAUNCH_MIT_VECTOR and CURRENT_MIT_VECTOR. They came with version 5; firmware is said to have
filled these bytes in version 4, so they are read there too. Before, they are reserved."""

ECDSA_P384_SHA384 = 1
_COMPONENT_BYTES = 72
"""Of R and of S: a P-384 integer takes 48, the rest is zero."""
_P384_BYTES = 48

# The word at 0x48: AUTHOR_KEY_EN, MASK_CHIP_KEY, SIGNING_KEY; bits 31:5 must be zero.
_AUTHOR_KEY_EN = 1 << 0
_MASK_CHIP_KEY = 1 << 1
_KEY_INFO_BITS = 0b11111


class SigningKey(IntEnum):
    """SIGNING_KEY: which key signed. 2 to 6 are reserved."""

    VCEK = 0
    """Derived from the chip."""
    VLEK = 1
    """Loaded by a cloud provider."""
    NONE = 7
    """The report is not signed."""


class GuestPolicy(IntFlag):
    """POLICY: what the guest's owner demanded at launch; the firmware holds the host to it.

    Bits 7:0 and 15:8 are the least minor and major version of the firmware's ABI; bits that are
    not named here are kept.
    """

    SMT = 1 << 16
    """Sibling threads may be on."""
    RESERVED_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    """A migration agent may be associated, which can move the guest elsewhere."""
    DEBUG = 1 << 19
    """The host may read and write the guest's memory."""
    SINGLE_SOCKET = 1 << 20
    CXL_ALLOW = 1 << 21
    MEM_AES_256_XTS = 1 << 22
    RAPL_DIS = 1 << 23
    CIPHERTEXT_HIDING_DRAM = 1 << 24
    PAGE_SWAP_DISABLE = 1 << 25


POLICY_KNOWN_BITS = (1 << 26) - 1


class PlatformInfo(IntFlag):
    """PLATFORM_INFO: what the firmware says about the host. Later firmware defines more of them:
    bits that are not named here are kept, and mean nothing."""

    SMT_EN = 1 << 0
    TSME_EN = 1 << 1
    ECC_EN = 1 << 2
    RAPL_DIS = 1 << 3
    CIPHERTEXT_HIDING_DRAM_EN = 1 << 4
    ALIAS_CHECK_COMPLETE = 1 << 5
    TIO_EN = 1 << 7


@dataclass(frozen=True, slots=True)
class Tcb:
    """TCB_VERSION: security version numbers, each 0 to 255. `fmc` exists from Turin on."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None


@dataclass(frozen=True, slots=True)
class FirmwareVersion:
    """MAJOR.MINOR.BUILD of the firmware."""

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


@dataclass(frozen=True, slots=True)
class AttestationReport:
    """ATTESTATION_REPORT, versions 2 to 5. Field names are the specification's.

    Attributes:
        signed: the bytes that the signature is over.
        vmpl: of the requester; 0xFFFFFFFF for a report that the host asked for.
        current_tcb, reported_tcb, committed_tcb, launch_tcb: 8 bytes each, whose layout depends
            on the product line: `parse_tcb` reads them.
        cpuid: combined family, combined model and stepping; None in version 2.
        launch_mit_vector, current_mit_vector: None before version 4.
        signature_r, signature_s: of ECDSA P-384.
    """

    signed: bytes
    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: PlatformInfo
    author_key_en: bool
    mask_chip_key: bool
    signing_key: SigningKey
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int, int] | None
    chip_id: bytes
    committed_tcb: bytes
    current_version: FirmwareVersion
    committed_version: FirmwareVersion
    launch_tcb: bytes
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signature_r: int
    signature_s: int


def parse_report(data: bytes) -> AttestationReport:
    """Read one report, exactly 1184 bytes. It is not trustworthy yet.

    Raises:
        Malformed: another length, a version this module does not know, a reserved byte or bit
            that is not zero, an unknown signature algorithm or signing key.
    """
    if len(data) != REPORT_BYTES:
        raise Malformed(
            f"report: expected {REPORT_BYTES} bytes, got {len(data)}", field="report", offset=0
        )
    cursor = Cursor(data, "little")
    # 1. 0x000: what this report is.
    version = cursor.unsigned(4, "version")
    if version not in VERSIONS:
        raise _at(0x000, "version", f"expected 2 to 5, got {version}")
    guest_svn = cursor.unsigned(4, "guest_svn")
    policy = _policy(cursor)
    family_id = cursor.take(16, "family_id")
    image_id = cursor.take(16, "image_id")
    vmpl = cursor.unsigned(4, "vmpl")
    algorithm = cursor.unsigned(4, "signature_algo")
    if algorithm != ECDSA_P384_SHA384:
        raise _at(0x034, "signature_algo", f"expected 1 (ECDSA P-384 SHA-384), got {algorithm}")
    # 2. 0x038: the platform, and who signs.
    current_tcb = cursor.take(8, "current_tcb")
    platform_info = PlatformInfo(cursor.unsigned(8, "platform_info"))
    author_key_en, mask_chip_key, signing_key = _key_info(cursor)
    cursor.zeros(4, "reserved_04c")
    # 3. 0x050: what the guest is, and what it says.
    report_data = cursor.take(64, "report_data")
    measurement = cursor.take(48, "measurement")
    host_data = cursor.take(32, "host_data")
    id_key_digest = cursor.take(48, "id_key_digest")
    author_key_digest = cursor.take(48, "author_key_digest")
    report_id = cursor.take(32, "report_id")
    report_id_ma = cursor.take(32, "report_id_ma")
    # 4. 0x180: the chip and its firmware.
    reported_tcb = cursor.take(8, "reported_tcb")
    cpuid = _cpuid(cursor, version)
    cursor.zeros(0x1A0 - cursor.offset, "reserved_18b")
    chip_id = cursor.take(64, "chip_id")
    committed_tcb = cursor.take(8, "committed_tcb")
    current_version = _firmware(cursor, "current")
    committed_version = _firmware(cursor, "committed")
    launch_tcb = cursor.take(8, "launch_tcb")
    launch_mit_vector, current_mit_vector = _mitigations(cursor, version)
    cursor.zeros(SIGNED_BYTES - cursor.offset, "reserved_208")
    # 5. 0x2A0: the signature, in a field of 512 bytes.
    signature_r = _component(cursor, "signature_r")
    signature_s = _component(cursor, "signature_s")
    cursor.zeros(cursor.remaining, "signature_reserved")
    return AttestationReport(
        signed=data[:SIGNED_BYTES],
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        current_tcb=current_tcb,
        platform_info=platform_info,
        author_key_en=author_key_en,
        mask_chip_key=mask_chip_key,
        signing_key=signing_key,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid=cpuid,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current_version=current_version,
        committed_version=committed_version,
        launch_tcb=launch_tcb,
        launch_mit_vector=launch_mit_vector,
        current_mit_vector=current_mit_vector,
        signature_r=signature_r,
        signature_s=signature_s,
    )


def product_of(cpuid: tuple[int, int, int]) -> str | None:
    """The product line of a combined family and model; None for one that is not known here.

    Bergamo and Siena (models from 0xA0) are of Genoa's line and under its root.
    """
    family, model, _ = cpuid
    if family == 0x19 and model <= 0x0F:
        return "Milan"
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return "Genoa"
    if family == 0x1A and model <= 0x1F:
        return "Turin"
    return None


def parse_tcb(raw: bytes, *, product: str, field: str) -> Tcb:
    """Read the 8 bytes of a TCB_VERSION as that product line lays them out.

    Raises:
        Malformed: not 8 bytes, or a reserved one is not zero.
    """
    cursor = Cursor(raw, "little")
    if product == "Turin":
        fmc = cursor.unsigned(1, f"{field}.fmc")
        bootloader = cursor.unsigned(1, f"{field}.bootloader")
        tee = cursor.unsigned(1, f"{field}.tee")
        snp = cursor.unsigned(1, f"{field}.snp")
        cursor.zeros(3, f"{field}.reserved")
    else:
        fmc = None
        bootloader = cursor.unsigned(1, f"{field}.bootloader")
        tee = cursor.unsigned(1, f"{field}.tee")
        cursor.zeros(4, f"{field}.reserved")
        snp = cursor.unsigned(1, f"{field}.snp")
    microcode = cursor.unsigned(1, f"{field}.microcode")
    cursor.end(field)
    return Tcb(bootloader=bootloader, tee=tee, snp=snp, microcode=microcode, fmc=fmc)


def _policy(cursor: Cursor) -> GuestPolicy:
    # Bit 17 is reserved and must be one. Bits above 25 are judged in `rats.policy`: firmware has
    # given meaning to reserved ones before, without a new report version.
    policy = GuestPolicy(cursor.unsigned(8, "policy"))
    if GuestPolicy.RESERVED_ONE not in policy:
        raise _at(0x008, "policy", "expected bit 17 to be one")
    return policy


def _key_info(cursor: Cursor) -> tuple[bool, bool, SigningKey]:
    word = cursor.unsigned(4, "key_info")
    if word & ~_KEY_INFO_BITS:
        raise _at(0x048, "key_info", "expected bits 31:5 to be zero")
    try:
        signing_key = SigningKey(word >> 2)
    except ValueError:
        raise _at(0x048, "signing_key", f"expected 0, 1 or 7, got {word >> 2}") from None
    return bool(word & _AUTHOR_KEY_EN), bool(word & _MASK_CHIP_KEY), signing_key


def _cpuid(cursor: Cursor, version: int) -> tuple[int, int, int] | None:
    if version < FIRST_VERSION_WITH_CPUID:
        cursor.zeros(3, "reserved_188")
        return None
    return (
        cursor.unsigned(1, "cpuid_fam_id"),
        cursor.unsigned(1, "cpuid_mod_id"),
        cursor.unsigned(1, "cpuid_step"),
    )


def _mitigations(cursor: Cursor, version: int) -> tuple[int | None, int | None]:
    if version < FIRST_VERSION_WITH_MITIGATIONS:
        cursor.zeros(16, "reserved_1f8")
        return None, None
    return cursor.unsigned(8, "launch_mit_vector"), cursor.unsigned(8, "current_mit_vector")


def _firmware(cursor: Cursor, name: str) -> FirmwareVersion:
    build = cursor.unsigned(1, f"{name}_build")
    minor = cursor.unsigned(1, f"{name}_minor")
    major = cursor.unsigned(1, f"{name}_major")
    cursor.zeros(1, f"{name}_reserved")
    return FirmwareVersion(major=major, minor=minor, build=build)


def _component(cursor: Cursor, name: str) -> int:
    value = cursor.unsigned(_P384_BYTES, name)
    cursor.zeros(_COMPONENT_BYTES - _P384_BYTES, name)
    return value


def _at(offset: int, field: str, what: str) -> Malformed:
    return Malformed(f"{field}: {what} at byte {offset}", field=field, offset=offset)

"""Azure's HCL report: a hardware report and what the paravisor says, as vTPM NV index 0x01400001.

Sources: Microsoft, "Azure confidential VMs: guest attestation design", attestation report format,
and the paravisor's own declarations (OpenHCL, `openhcl_attestation_protocol::igvm_attest::get`,
`IgvmAttestRequestHeader` and `IgvmAttestRequestData`). Little-endian:

       0  "HCLA", version (1 or 2), size of what is used, request type 2 (the paravisor made it to
          have its attestation key certified), status 0, 12 reserved
      32  1184 bytes: an SEV-SNP ATTESTATION_REPORT, or a TDREPORT (1024) and zeros
    1216  size of this header and the claims, version (1), report type (2 SEV-SNP, 4 TDX),
          hash type (1 SHA-256, 2 SHA-384, 3 SHA-512), size of the claims
    1236  the claims, JSON: keys (HCLAkPub, HCLEkPub), vm-configuration, user-data

The hardware report's REPORT_DATA begins with the hash of the claims' bytes; the rest is zero. All
three sizes must agree. The NV index has a fixed size (2600 bytes, earlier 2048), and some tools
hand on all of it: behind the used size there may be zeros, and nothing else.

Nothing here is trustworthy before `rats.schemes.azure_vtpm` has authenticated the hardware report
and compared the hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import rsa

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.cursor import Cursor
from appliance.wire.encoding import decode_base64
from appliance.wire.tdx import TD_REPORT_BYTES

HARDWARE_REPORT_BYTES = 1184
REPORT_DATA_BYTES = 64
MAX_REPORT_BYTES = 64 << 10
MAX_CLAIMS_BYTES = 32 << 10
MAX_KEYS = 8
RSA_BYTES = (256, 384, 512)

Kind = Literal["sev_snp", "tdx"]

_AK_CERT_REQUEST = 2

_KINDS: dict[int, Kind] = {2: "sev_snp", 4: "tdx"}
_HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
_HEADER_BYTES = 32
_DATA_HEADER_BYTES = 20


@dataclass(frozen=True, slots=True)
class RuntimeClaims:
    """The paravisor's JSON.

    Attributes:
        attestation_key: HCLAkPub, the key of the vTPM's quotes.
        secure_boot, tpm_enabled: of `vm-configuration`; None where it does not say.
        user_data: what the guest wrote to NV index 0x01400002 before; empty where it is not there.
        configuration: all of `vm-configuration`, for display.
    """

    attestation_key: rsa.RSAPublicKey
    secure_boot: bool | None
    tpm_enabled: bool | None
    user_data: bytes
    configuration: JsonObject


@dataclass(frozen=True, slots=True)
class HclReport:
    """The report, taken apart.

    Attributes:
        version: 1 or 2.
        kind: of the hardware report.
        hardware_report: 1184 bytes; of a TDREPORT the first 1024 are it.
        bound: what the hardware report's REPORT_DATA must be, 64 bytes.
        claims: the paravisor's.
    """

    version: int
    kind: Kind
    hardware_report: bytes
    bound: bytes
    claims: RuntimeClaims

    @property
    def td_report(self) -> bytes:
        """Of a TDX report the TDREPORT, which the host's quoting service takes."""
        return self.hardware_report[:TD_REPORT_BYTES]


def parse_hcl_report(data: bytes) -> HclReport:
    """The content of the NV index, with or without its padding.

    Raises:
        Malformed: not that form, sizes that disagree, an unknown version or type, something other
            than zeros behind its end, or claims without a key to quote with.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise Malformed("hcl_report: expected at most 64 KiB", field="hcl_report")
    cursor = Cursor(data, "little")
    # 1. The header.
    cursor.expect(b"HCLA", "hcl.signature")
    version = cursor.unsigned(4, "hcl.version")
    if version not in {1, 2}:
        raise cursor.malformed(f"expected version 1 or 2, got {version}", "hcl.version")
    used = cursor.unsigned(4, "hcl.size")
    request = cursor.unsigned(4, "hcl.request_type")
    if request != _AK_CERT_REQUEST:
        raise cursor.malformed(f"expected 2 (AK certificate), got {request}", "hcl.request_type")
    cursor.zeros(_HEADER_BYTES - cursor.offset, "hcl.status")  # and what is reserved
    # 2. The hardware report.
    report = cursor.take(HARDWARE_REPORT_BYTES, "hcl.hardware_report")
    # 3. What the paravisor says.
    size = cursor.unsigned(4, "hcl.data_size")
    if cursor.unsigned(4, "hcl.data_version") != 1:
        raise cursor.malformed("expected version 1", "hcl.data_version")
    kind = _KINDS.get(cursor.unsigned(4, "hcl.report_type"))
    if kind is None:
        raise cursor.malformed("expected 2 (SEV-SNP) or 4 (TDX)", "hcl.report_type")
    hash = _HASHES.get(cursor.unsigned(4, "hcl.hash_type"))
    if hash is None:
        raise cursor.malformed("expected 1, 2 or 3", "hcl.hash_type")
    length = cursor.unsigned(4, "hcl.claims_size")
    if length > MAX_CLAIMS_BYTES or size != _DATA_HEADER_BYTES + length:
        raise cursor.malformed(f"expected claims of {size - 20} bytes", "hcl.claims_size")
    if used != _HEADER_BYTES + HARDWARE_REPORT_BYTES + size:
        raise cursor.malformed(f"expected a size that fits the claims, got {used}", "hcl.size")
    claims = cursor.take(length, "hcl.claims")
    # 4. What is left of the NV index.
    cursor.zeros(cursor.remaining, "hcl.padding")
    if kind == "tdx" and any(report[TD_REPORT_BYTES:]):
        raise Malformed("hcl.hardware_report: expected zeros behind the TDREPORT", field="hcl")
    bound = hashlib.new(hash, claims).digest().ljust(REPORT_DATA_BYTES, b"\0")
    return HclReport(version, kind, report, bound, _claims(claims))


def _claims(data: bytes) -> RuntimeClaims:
    """Members that are not listed are Azure's to add; of those that are, each must be what it is."""
    document = parse_json_object(data, max_nesting=6)
    configuration = document.get("vm-configuration", {})
    if not isinstance(configuration, dict):
        raise Malformed("claims: expected an object", field="claims.vm-configuration")
    user_data = document.get("user-data", "")
    if not isinstance(user_data, str):
        raise Malformed("claims: expected hex", field="claims.user-data")
    return RuntimeClaims(
        attestation_key=_attestation_key(document.get("keys")),
        secure_boot=_flag(configuration, "secure-boot"),
        tpm_enabled=_flag(configuration, "tpm-enabled"),
        user_data=_user_data(user_data),
        configuration=configuration,
    )


def _attestation_key(keys: JsonValue) -> rsa.RSAPublicKey:
    """The JWK (RFC 7517) called HCLAkPub; `key_ops` is not asked, early firmware had `encrypt`."""
    field = "claims.keys"
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise Malformed(f"{field}: expected at most {MAX_KEYS} keys", field=field)
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == "HCLAkPub"]
    if len(found) != 1:
        raise Malformed(f"{field}: expected one HCLAkPub, got {len(found)}", field=field)
    key = found[0]
    modulus, exponent = _integer(key, "n"), _integer(key, "e")
    if key.get("kty") != "RSA" or len(modulus) not in RSA_BYTES or len(exponent) > 4:
        raise Malformed(f"{field}: expected an RSA key of at least 2048 bits", field=field)
    numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus))
    try:
        return numbers.public_key()
    except ValueError:
        raise Malformed(f"{field}: expected an RSA public key", field=field) from None


def _integer(key: JsonObject, name: str) -> bytes:
    """A Base64urlUInt (RFC 7518 section 2)."""
    text = key.get(name)
    if not isinstance(text, str) or "=" in text or "+" in text or "/" in text:
        raise Malformed("claims.keys: expected unpadded base64url", field=f"claims.keys.{name}")
    standard = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)
    return decode_base64(standard, field=f"claims.keys.{name}", max_bytes=RSA_BYTES[-1])


def _flag(configuration: JsonObject, name: str) -> bool | None:
    value = configuration.get(name)
    if value is not None and not isinstance(value, bool):
        raise Malformed("claims: expected true or false", field=f"claims.{name}")
    return value


def _user_data(text: str) -> bytes:
    if len(text) > 2 * REPORT_DATA_BYTES or not text.isascii() or not text.isalnum():
        if not text:
            return b""
        raise Malformed("claims.user-data: expected 64 bytes of hex", field="claims.user-data")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Malformed("claims.user-data: expected hex", field="claims.user-data") from None

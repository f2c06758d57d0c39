"""NVIDIA GPUs and NVSwitches: reports and reference values to authentic claims, offline.

Sources: NVIDIA's nv-local-gpu-verifier 2.7.3 and attestation-sdk for what is checked; DSP0274 1.1
section 10.11 (what is signed), RFC 5280 section 6.1 (chains, in `rats.chain`), TCG DICE
Attestation Architecture 1.1 section 6.1 (firmware digest in the certificate).

A device's chain has five certificates: the attestation key, certified by the device for one
firmware; the device, in its boot ROM; two intermediates; the pinned NVIDIA Device Identity CA. A
report therefore says which device, which firmware, which driver, and 64 digests of what it runs.
Those digests mean something only beside NVIDIA's own: `authenticate_rim` and `compare`.

What a report does not say is which machine the GPU is in: that binding is the nonce's
(`rats.binding`).
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

from appliance.errors import Malformed, Stale, Unauthentic, Unbound
from appliance.rats import chain
from appliance.rats.result import Finding, Tier
from appliance.wire import nvidia_gpu as wire
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.evidence import GpuEvidence
from appliance.wire.rim import Rim, parse_rim

DICE_OIDS = frozenset({"2.23.133.5.4.1", "2.23.133.5.4.1.1"})
"""Hopper's and LS10's, Blackwell's."""

SHORTEST_PATH = 3
"""Attestation key, device, pinned root; real ones have five certificates."""

P384_BYTES = 48

NVDEC0_INDEX = 35
"""Measures a decoder that is fused off in many boards; it counts unless the report says so."""

_CHIP = re.compile(r"[A-Z]{2}_?[0-9]{2,3}[A-Z]?\Z")


@dataclass(frozen=True, slots=True, repr=False)
class DeviceChain:
    """A chain of certificates that led to a pinned root.

    Attributes:
        path: leaf first, the pinned root last.
        key: of the leaf; signs reports.
        chip: as `GH100`. hwmodel: the device certificate's name, as NVIDIA's claims have it.
        fwid: of the firmware that the leaf was made for; None where it does not say.
        valid_from, valid_until: when all of them are valid.
    """

    path: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePublicKey
    chip: str
    hwmodel: str
    fwid: bytes | None
    valid_from: datetime.datetime
    valid_until: datetime.datetime


class ChainCache:
    """Chains that were authenticated, least recently used out first.

    A key is the hash of everything but the time: the chain's bytes and the pinned roots. The time
    is asked again at every use. One thread uses it.
    """

    __slots__ = ("_capacity", "_chains")

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._chains: OrderedDict[bytes, DeviceChain] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chains)

    def authenticate(
        self, pem: bytes, *, root: tuple[x509.Certificate, ...], at: datetime.datetime
    ) -> DeviceChain:
        """As `authenticate_chain`; a chain that fails is never kept."""
        key = _cache_key(pem, root)
        known = self._chains.get(key)
        if known is not None and known.valid_from <= at <= known.valid_until:
            self._chains.move_to_end(key)
            return known
        self._chains[key] = authenticated = authenticate_chain(pem, root=root, at=at)
        while len(self._chains) > self._capacity:
            self._chains.popitem(last=False)
        return authenticated


@dataclass(frozen=True, slots=True)
class WantedRim:
    """Reference values that a report calls for.

    Attributes:
        role: `driver`, `vbios` or `switch_bios`.
        version: that they must be for. rim_id: their name at NVIDIA's service.
    """

    role: str
    version: str
    rim_id: str


@dataclass(frozen=True, slots=True, repr=False)
class NvidiaGpuClaims:
    """What a GPU or a switch signed, and what its certificates say about it.

    Attributes:
        scheme: of the evidence: `nvidia_gpu`, or `simulated` under the published test root.
        at: when its certificates were held to be valid.
        nonce: the requester's 32 bytes in the report, compared with one only if one was given.
        chip: as `GH100`. hwmodel: the device certificate's name, such as `GH100 A01 GSP BROM`.
        ueid: the leaf's serial number in decimal, as NVIDIA's claims have it.
        device_certificate_sha256: of the certificate above the leaf: the device, whatever its
            firmware.
        identity: the report's own fields.
        fwid: digest of the firmware, bound to report and leaf; None where neither says it.
        measurements: by the index that reference values use, from 0.
        opaque: every field of the report, for people; uninterpreted.
        path: the certificates, leaf first, for whoever asks about their revocation.
    """

    scheme: str
    at: datetime.datetime
    nonce: bytes
    chip: str
    hwmodel: str
    ueid: str
    device_certificate_sha256: str
    identity: wire.GpuIdentity | wire.SwitchIdentity
    fwid: bytes | None
    measurements: dict[int, bytes]
    opaque: dict[str, bytes]
    path: tuple[x509.Certificate, ...] = field(default=())

    def __repr__(self) -> str:
        return f"NvidiaGpuClaims({self.scheme}, {self.hwmodel}, {self.ueid})"

    @property
    def driver_version(self) -> str | None:
        """None for a switch, which has no driver of its own."""
        return self.identity.driver_version if isinstance(self.identity, wire.GpuIdentity) else None

    @property
    def vbios_version(self) -> str:
        """Of a switch: its BIOS's."""
        return self.identity.vbios_version

    @property
    def feature(self) -> str | None:
        """`SPT`, `MPT`, `PPCIE`, another number, or None where the report does not say."""
        if not isinstance(self.identity, wire.GpuIdentity):
            return None
        flag = self.identity.feature_flag
        if flag is not None:
            return wire.FEATURES.get(flag, str(flag))
        # Drivers before the flag said only this much.
        return wire.FEATURES[2] if self.identity.protected_pcie else None

    @property
    def rims_wanted(self) -> tuple[WantedRim, ...]:
        """The reference values that this report is to be compared with."""
        identity = self.identity
        if isinstance(identity, wire.SwitchIdentity):
            rim_id = wire.switch_rim_id(identity)
            return (WantedRim("switch_bios", identity.vbios_version, rim_id),)
        driver_id = wire.driver_rim_id(self.chip, identity)
        return (
            WantedRim("driver", identity.driver_version, driver_id),
            WantedRim("vbios", identity.vbios_version, wire.vbios_rim_id(identity)),
        )

    def to_json(self) -> JsonObject:
        """Every claim; byte strings as lowercase hex."""
        rim_ids: list[JsonValue] = [one.rim_id for one in self.rims_wanted]
        identity: JsonObject = {"vbios_version": self.vbios_version}
        if isinstance(self.identity, wire.GpuIdentity):
            identity |= _gpu_json(self.identity)
        else:
            identity |= {"switch_pdi": self.identity.pdi, "gpus": list(self.identity.gpus)}
        measurements: JsonObject = {
            str(index): value.hex() for index, value in sorted(self.measurements.items())
        }
        opaque: JsonObject = {name: value.hex() for name, value in self.opaque.items()}
        return {
            "scheme": self.scheme,
            "nonce": self.nonce.hex(),
            "chip": self.chip,
            "hwmodel": self.hwmodel,
            "ueid": self.ueid,
            "device_certificate_sha256": self.device_certificate_sha256,
            "feature": self.feature,
            "fwid": self.fwid.hex() if self.fwid is not None else None,
            **identity,
            "rim_ids": rim_ids,
            "measurements": measurements,
            "opaque": opaque,
        }


def authenticate(
    evidence: GpuEvidence,
    *,
    root: tuple[x509.Certificate, ...],
    at: datetime.datetime,
    nonce: bytes | None,
    chains: ChainCache | None = None,
) -> NvidiaGpuClaims:
    """Check a report's form, freshness, chain, signature and firmware, in this order.

    Args:
        evidence: its reference values and OCSP responses are not looked at.
        root: the pinned certificates for this scheme; the chain's own copy counts for nothing.
        at: timezone-aware.
        nonce: the 32 bytes that were asked for. None compares nothing, and then whoever calls
            has to judge `claims.nonce`: without that the report may be from any time.
        chains: those authenticated before; saves four signatures and five certificates.

    Raises:
        Malformed: the report or a certificate does not parse.
        Stale: another nonce, or `at` is outside a certificate's validity.
        Unauthentic: the chain does not lead to a pinned root, or the signature is not the leaf's.
        Unbound: the report is about other firmware than its certificate.
    """
    # 1. Form.
    report = wire.parse_report(evidence.report)
    # 2. Freshness.
    transcript = report.transcript
    if nonce is not None and not hmac.compare_digest(transcript.nonce, nonce):
        raise Stale(
            f"GPU report: expected nonce {nonce.hex()[:16]}…, got {transcript.nonce.hex()[:16]}…"
        )
    # 3. The chain, to the pinned root.
    find_chain = authenticate_chain if chains is None else chains.authenticate
    device = find_chain(evidence.certificate_chain, root=root, at=at)
    # 4. The signature: over the request and the response up to it.
    _check_signature(device.key, transcript.signature, transcript.signed, "GPU report")
    # 5. The firmware. "Skipping the comparison … if the attestation report does not contain the
    #    FWID" (`verify_gpu_certificate_chain`): drivers before 550 leave it out.
    fwid = report.fwid
    if fwid is not None and fwid != device.fwid:
        known = device.fwid.hex()[:16] + "…" if device.fwid is not None else "none"
        raise Unbound(f"GPU report: firmware {fwid.hex()[:16]}…, its certificate's is {known}")
    # 6. What it says. Now it may be believed.
    leaf, certificate = device.path[0], device.path[1]
    read = wire.switch_identity if device.chip.startswith("LS") else wire.gpu_identity
    return NvidiaGpuClaims(
        scheme=evidence.scheme,
        at=at,
        nonce=transcript.nonce,
        chip=device.chip,
        hwmodel=device.hwmodel,
        ueid=str(leaf.serial_number),
        device_certificate_sha256=chain.sha256_of(certificate),
        identity=read(report),
        fwid=device.fwid,
        measurements=report.measurements(),
        opaque=report.fields,
        path=device.path,
    )


def authenticate_chain(
    pem: bytes, *, root: tuple[x509.Certificate, ...], at: datetime.datetime
) -> DeviceChain:
    """Check a device's certificates, PEM, leaf first.

    Raises:
        Malformed: no certificates, too many, or one does not parse.
        Unauthentic: they do not lead to a pinned root, or are not a device's.
        Stale: `at` is outside the validity of one of them.
    """
    presented = chain.parse_pem_chain(pem, field="certificate_chain")
    path = chain.authenticate_path(presented, roots=root, at=at, what="GPU certificates")
    if len(path) < SHORTEST_PATH:
        raise Unauthentic("GPU certificates: expected a device's certificate above the leaf")
    hwmodel = _common_name(path[1])
    chip = hwmodel.partition(" ")[0]
    if not _CHIP.match(chip):
        raise Unauthentic("GPU certificates: expected the device's to be named after its chip")
    return DeviceChain(
        path=path,
        key=_signing_key(path[0], "GPU certificates"),
        chip=chip.replace("_", ""),
        hwmodel=hwmodel,
        fwid=_fwid_of(path[0]),
        valid_from=max(one.not_valid_before_utc for one in path),
        valid_until=min(one.not_valid_after_utc for one in path),
    )


@dataclass(frozen=True, slots=True, repr=False)
class AuthenticatedRim:
    """Reference values that NVIDIA signed.

    Attributes:
        rim: what they are.
        sha256: of the document, lowercase hex.
        path: the signer's certificates, leaf first, for whoever asks about their revocation.
        valid_from, valid_until: when all of them are valid.
    """

    rim: Rim
    sha256: str
    path: tuple[x509.Certificate, ...]
    valid_from: datetime.datetime
    valid_until: datetime.datetime

    def __repr__(self) -> str:
        return f"AuthenticatedRim({self.rim.product} {self.rim.colloquial_version})"


def authenticate_rim(
    document: bytes, *, root: tuple[x509.Certificate, ...], at: datetime.datetime
) -> AuthenticatedRim:
    """Check a manifest's form, signer, signature and digest, and that its signer is in time.

    Raises:
        Malformed: not NVIDIA's profile of a signed SWID tag.
        Unauthentic: the signer does not lead to a pinned root, or the document was altered.
        Stale: authentic, and `at` is outside the validity of a certificate.
    """
    authenticated = authenticate_rim_even_if_expired(document, root=root, at=at)
    if at > authenticated.valid_until:
        raise Stale(
            f"RIM {authenticated.rim.colloquial_version}: its signer's certificate was valid until "
            f"{authenticated.valid_until:%Y-%m-%d}, not at {at:%Y-%m-%d}"
        )
    return authenticated


def authenticate_rim_even_if_expired(
    document: bytes, *, root: tuple[x509.Certificate, ...], at: datetime.datetime
) -> AuthenticatedRim:
    """As `authenticate_rim`, for a policy that is to judge about expiry itself.

    NVIDIA's signers live two years and manifests are signed anew in place, so that a stored one
    expires although nothing is wrong with it. Only expiry is left to the caller, in `valid_until`;
    a certificate that is not yet valid is refused.
    """
    signed = parse_rim(document)
    what = f"RIM {signed.rim.colloquial_version}"
    # 1. The signer. Where one has expired: at the last moment at which none had.
    presented = tuple(
        chain.parse_der_certificate(one, field="X509Certificate") for one in signed.certificates
    )
    moment = min(at, *(one.not_valid_after_utc for one in presented))
    path = chain.authenticate_path(presented, roots=root, at=moment, what=what)
    # 2. The signature over SignedInfo, and 3. the digest in it, over everything else.
    _check_signature(_signing_key(path[0], what), signed.signature, signed.signed_info, what)
    digest = hashlib.new(signed.digest_algorithm, signed.content).digest()
    if not hmac.compare_digest(digest, signed.digest):
        raise Unauthentic(f"{what}: the document is not the one that was signed")
    return AuthenticatedRim(
        rim=signed.rim,
        sha256=hashlib.sha256(document).hexdigest(),
        path=path,
        valid_from=max(one.not_valid_before_utc for one in path),
        valid_until=min(one.not_valid_after_utc for one in path),
    )


def compare(claims: NvidiaGpuClaims, rims: Sequence[AuthenticatedRim]) -> tuple[Finding, ...]:
    """Hold a report's digests against NVIDIA's. Nothing found means that all of them match.

    A manifest belongs to a report by its version, as in NVIDIA's verifiers: it does not name the
    board. Those get it by a name that does; who is handed a file instead has at least to find the
    chip in it. Every active index must be in the report with one of its alternatives. What no
    manifest measures is not looked at.
    """
    wanted = claims.rims_wanted
    if not rims:
        return (
            _finding(
                Tier.WARNING,
                "reference_values",
                " and ".join(one.rim_id for one in wanted),
                "none: authentic, not compared",
                "Get these reference values from NVIDIA's RIM service, or put them in rim_dirs.",
            ),
        )
    chosen: dict[str, Rim] = {}
    findings: list[Finding] = []
    for one in wanted:
        fitting = _fitting([each.rim for each in rims], one, claims.chip)
        if not fitting:
            findings.append(_missing(one))
        elif len(fitting) > 1:
            findings.append(_ambiguous(one, fitting))
        else:
            chosen[one.role] = fitting[0]
    findings += [_unfit(each, wanted) for each in rims if not _fits_any(each.rim, wanted)]
    findings += _other_products(claims, chosen)
    findings += _conflicts(chosen)
    findings += _mismatches(claims, chosen)
    return tuple(findings)


def _fitting(rims: Sequence[Rim], wanted: WantedRim, chip: str) -> list[Rim]:
    """Those for the wanted version; of several, those for the chip; equal ones once."""
    fitting = [rim for rim in rims if _fits(rim, wanted)]
    if len(fitting) > 1:
        fitting = [rim for rim in fitting if rim.product == chip] or fitting
    distinct: list[Rim] = []
    for rim in fitting:
        if all(rim.measurements != other.measurements for other in distinct):
            distinct.append(rim)
    return distinct


def _fits(rim: Rim, wanted: WantedRim) -> bool:
    # Lowercase on both sides, as in NVIDIA's `RIM.verify`.
    return rim.colloquial_version.lower() == wanted.version.lower()


def _fits_any(rim: Rim, wanted: Sequence[WantedRim]) -> bool:
    return any(_fits(rim, one) for one in wanted)


def _other_products(claims: NvidiaGpuClaims, chosen: dict[str, Rim]) -> list[Finding]:
    named = {claims.chip}
    if isinstance(claims.identity, wire.GpuIdentity) and claims.identity.chip_info:
        named.add(claims.identity.chip_info)
    return [
        _finding(
            Tier.WARNING,
            "rim_product",
            f"a manifest for {role} {rim.colloquial_version} of {' or '.join(sorted(named))}",
            f"of {rim.product}",
            "Get the manifest by the name that the claims give as rim_ids.",
        )
        for role, rim in chosen.items()
        if rim.product not in named
    ]


def _conflicts(chosen: dict[str, Rim]) -> list[Finding]:
    """An index that two manifests measure: which of them would count?"""
    owners: dict[int, list[str]] = {}
    for role, rim in chosen.items():
        for index in rim.measurements:
            owners.setdefault(index, []).append(role)
    return [
        _finding(
            Tier.CONTRAINDICATED,
            "rim_conflict",
            f"index {index} in one manifest",
            "in those for " + " and ".join(roles),
            "Get both manifests anew from NVIDIA's RIM service.",
        )
        for index, roles in sorted(owners.items())
        if len(roles) > 1
    ]


def _mismatches(claims: NvidiaGpuClaims, chosen: dict[str, Rim]) -> list[Finding]:
    findings: list[Finding] = []
    for role, rim in chosen.items():
        if not rim.measurements:
            findings.append(
                _finding(
                    Tier.WARNING,
                    "reference_values",
                    f"active measurements in the manifest for {role} {rim.colloquial_version}",
                    "none: nothing compared",
                    "Get the manifest anew from NVIDIA's RIM service.",
                )
            )
        for index, good in sorted(rim.measurements.items()):
            got = claims.measurements.get(index)
            if got not in good and not _is_exempt(claims, index):
                findings.append(_mismatch(role, rim, index, got))
    return findings


def _is_exempt(claims: NvidiaGpuClaims, index: int) -> bool:
    identity = claims.identity
    return (
        index == NVDEC0_INDEX
        and isinstance(identity, wire.GpuIdentity)
        and identity.nvdec0_status == wire.DISABLED
    )


def _mismatch(role: str, rim: Rim, index: int, got: bytes | None) -> Finding:
    good = " or ".join(one.hex() for one in rim.measurements[index])
    return _finding(
        Tier.CONTRAINDICATED,
        "measurement",
        f"index {index} of {role} {rim.colloquial_version}: {good}",
        got.hex() if got is not None else "no such measurement",
        "The GPU runs other firmware or other settings than NVIDIA released: do not use it.",
    )


def _missing(wanted: WantedRim) -> Finding:
    return _finding(
        Tier.WARNING,
        "rim_missing",
        wanted.rim_id,
        f"none for {wanted.role} {wanted.version}",
        "Get these reference values from NVIDIA's RIM service, or put them in rim_dirs.",
    )


def _ambiguous(wanted: WantedRim, fitting: Sequence[Rim]) -> Finding:
    return _finding(
        Tier.CONTRAINDICATED,
        "rim_conflict",
        f"one manifest for {wanted.role} {wanted.version}",
        f"{len(fitting)} different ones",
        f"Give only {wanted.rim_id}.",
    )


def _unfit(one: AuthenticatedRim, wanted: Sequence[WantedRim]) -> Finding:
    return _finding(
        Tier.CONTRAINDICATED,
        "rim_version",
        " or ".join(f"{each.role} {each.version}" for each in wanted),
        f"a manifest for {one.rim.product} {one.rim.colloquial_version}",
        "Give only " + " and ".join(each.rim_id for each in wanted) + ".",
    )


def _finding(tier: Tier, rule: str, expected: str, got: str, advice: str) -> Finding:
    return Finding(tier, f"nvidia_gpu.{rule}", expected, got, advice)


def _gpu_json(identity: wire.GpuIdentity) -> JsonObject:
    switches: list[JsonValue] = list(identity.switches)
    nvdec0 = identity.nvdec0_status
    return {
        "driver_version": identity.driver_version,
        "project": identity.project,
        "project_sku": identity.project_sku,
        "chip_sku": identity.chip_sku,
        "chip_info": identity.chip_info or None,
        "nvdec0_status": nvdec0.hex() if nvdec0 is not None else None,
        "protected_pcie": identity.protected_pcie,
        "feature_flag": identity.feature_flag,
        "opaque_data_version": identity.opaque_data_version,
        "switches": switches,
    }


def _cache_key(pem: bytes, root: tuple[x509.Certificate, ...]) -> bytes:
    """The chain's hash first: of fixed length, so that no two inputs run into each other."""
    digest = hashlib.sha256(hashlib.sha256(pem).digest())
    for certificate in root:
        digest.update(certificate.fingerprint(hashes.SHA256()))
    return digest.digest()


def _signing_key(leaf: x509.Certificate, what: str) -> ec.EllipticCurvePublicKey:
    """The leaf's key, which must be P-384 and meant for signatures."""
    try:
        key = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise Unauthentic(f"{what}: expected the leaf's key on P-384") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Unauthentic(f"{what}: expected the leaf's key on P-384")
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return key
    if not usage.digital_signature:
        raise Unauthentic(f"{what}: expected a leaf whose key may sign")
    return key


def _check_signature(
    key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes, what: str
) -> None:
    """ECDSA over P-384 and SHA-384; `signature` is r || s, big-endian."""
    r, s = (
        int.from_bytes(half, "big") for half in (signature[:P384_BYTES], signature[P384_BYTES:])
    )
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Unauthentic(f"{what}: the signature is not its certificate's") from None


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise Unauthentic("GPU certificates: expected the device's to have one common name")
    return names[0].value


def _fwid_of(leaf: x509.Certificate) -> bytes | None:
    found = [one.value for one in leaf.extensions if one.oid.dotted_string in DICE_OIDS]
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0], x509.UnrecognizedExtension):
        raise Malformed("dice: expected one such extension in the leaf", field="dice")
    return wire.parse_dice_fwid(found[0].value)

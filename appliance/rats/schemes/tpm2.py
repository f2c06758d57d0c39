"""A TPM's quote to authentic claims: the attestation key's chain, the signature, the PCRs, the log.

Sources: TCG, TPM 2.0 Library, Part 1, 19 (attestation); TCG, PC Client Platform Firmware Profile.

What a quote proves: a TPM that the vendor vouches for held these PCR values after it was given
`extra_data`. It proves nothing about memory: whoever owns the host reads all of it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

from appliance.errors import Malformed, Unauthentic, Unbound
from appliance.rats.chain import (
    UNREADABLE,
    authenticate_path,
    parse_der_certificate,
    parse_pem_chain,
)
from appliance.wire.canonical import JsonObject
from appliance.wire.event_log import EV_NO_ACTION, Event, parse_event_log, replay
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tpm import (
    DIGEST_BYTES,
    PublicArea,
    PublicKey,
    Quote,
    Signature,
    parse_public,
    parse_quote,
    parse_signature,
)

BANK = "sha256"

AK_PURPOSE = x509.ObjectIdentifier("2.23.133.8.3")
"""tcg-kp-AIKCertificate (TCG, Credential Profiles, "extended key usage"): an attestation key's
certificate that names purposes names this one. Not every vendor names any: of a Google VM's
certificates the attestation key's has the key usage digitalSignature, the endorsement key's
keyEncipherment, and neither has an extended key usage; their CAs name tcg-kp-EKCertificate."""

MAX_KEY_FILE_BYTES = 64 << 10
MIN_RSA_BITS = 2048

HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
"""What a quote may be signed over. SHA-1 is not here: collisions of it can be made."""

UNLOGGED_PCRS = frozenset({10, 15, 16, 23})
"""PCRs that a running system extends without the firmware's log: IMA (10), volume key and
machine id (15, systemd), debugging (16), applications (23). A log that mentions them is not
compared there."""

OVERRIDES_PCR = 12
"""What systemd-stub was given beside its image (systemd-stub(7))."""

MAX_OVERRIDES = 8
"""That are told."""

MAX_TOLD = 200
"""Characters of one."""

PHASES = (b"enter-initrd", b"leave-initrd", b"sysinit", b"ready")
"""What systemd-pcrphase extends PCR 11 with, in this order, after the firmware's log has ended
(systemd-pcrphase.service(8)): PCR 11 is the log's value, or that and any first few of these."""


@dataclass(frozen=True, slots=True)
class TpmClaims:
    """What the TPM signed, and what follows from it.

    Attributes:
        report_data: the qualifying data, at most 66 bytes.
        pcrs: SHA-256 bank, by number: what was quoted.
        clock, reset_count, restart_count, safe, firmware_version: as in the quote.
        events: the firmware's log; empty without one.
        replayed: PCRs whose value follows from the log.
    """

    report_data: bytes
    pcrs: Mapping[int, bytes]
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    events: tuple[Event, ...] = ()
    replayed: tuple[int, ...] = ()

    @property
    def scheme(self) -> str:
        """Its name."""
        return "tpm2"

    @property
    def measurements(self) -> dict[str, str]:
        """`pcr0` and so on, lowercase hex."""
        return {f"pcr{number}": value.hex() for number, value in sorted(self.pcrs.items())}

    @property
    def overrides(self) -> tuple[str, ...]:
        """What PCR 12 was extended with, in order, where the log gives its value; at most
        `MAX_OVERRIDES`.

        An event's data is a comment, but for text that hashes to what was extended: an argument of
        the command line is told as it is, anything else as its event's type.
        """
        if OVERRIDES_PCR not in self.replayed:
            return ()
        extended = [
            event
            for event in self.events
            if event.register == OVERRIDES_PCR and event.type != EV_NO_ACTION
        ]
        return tuple(_told(event) for event in extended[:MAX_OVERRIDES])

    def to_json(self) -> JsonObject:
        """All of them; of the log how long it is and which PCRs it explains."""
        return {
            "scheme": self.scheme,
            "report_data": self.report_data.hex(),
            "measurements": {**self.measurements},
            "clock": self.clock,
            "reset_count": self.reset_count,
            "restart_count": self.restart_count,
            "safe": self.safe,
            "firmware_version": f"{self.firmware_version:016x}",
            "event_log": {"events": len(self.events), "replayed_pcrs": [*self.replayed]},
        }


def authenticate(
    evidence: CpuEvidence, *, roots: tuple[x509.Certificate, ...], at: datetime.datetime
) -> TpmClaims:
    """A vTPM's or TPM's evidence whose attestation key the vendor certified.

    Args:
        evidence: of scheme `tpm2`. roots: the pinned vendor roots. at: timezone-aware.

    Raises:
        Malformed: a part that does not parse.
        Unauthentic: no root is pinned, the chain does not lead to one, the key is certified for
            something else, or the signature is not the key's.
        Stale: a certificate is outside its validity.
        Unbound: the PCR values are not those that were quoted, or the log does not give them.
    """
    if not roots:
        raise Unauthentic(
            "tpm2: no vendor root is pinned, name a file of them in [attestation] tpm_roots_file"
        )
    # 1. The attestation key, up to a root the operator pinned.
    leaf = parse_der_certificate(evidence.parts["ak_certificate"], field="ak_certificate")
    authorities = evidence.endorsements.get("authorities", b"")
    issuers = parse_pem_chain(authorities, field="authorities") if authorities else ()
    what = "tpm2 attestation key"
    authenticate_path((leaf, *issuers), roots=roots, at=at, what=what, purpose=AK_PURPOSE)
    _check_may_sign(leaf)
    # 2. The quote, by that key.
    return authenticate_parts(evidence.parts, key_of(leaf))


def authenticate_parts(parts: Mapping[str, bytes], key: PublicKey) -> TpmClaims:
    """`quote`, `signature`, `pcrs` and, where there is one, `event_log`, by a key that is already
    known to be an attestation key.

    Raises:
        As `authenticate`, but Stale.
    """
    hash, quote = _signed(parts["quote"], parts["signature"], key)
    claims = _about(hash, quote, _in_order(parts["pcrs"], quote))
    return with_event_log(claims, parts["event_log"]) if "event_log" in parts else claims


def authenticate_quote(
    message: bytes, signature: bytes, public_key: PublicKey, pcrs: Mapping[int, bytes]
) -> TpmClaims:
    """The quote alone.

    Args:
        message: TPMS_ATTEST. signature: TPMT_SIGNATURE or bare, see `wire.tpm.parse_signature`.
        public_key: known to be an attestation key, by whom is the caller's affair.
        pcrs: SHA-256 bank, by number; values that were not quoted are left out of the claims.

    Raises:
        Malformed: message or signature do not parse.
        Unauthentic: the signature is not this key's, or over SHA-1.
        Unbound: the PCR values are not those that were quoted.
    """
    hash, quote = _signed(message, signature, public_key)
    return _about(hash, quote, pcrs)


def _signed(message: bytes, signature: bytes, key: PublicKey) -> tuple[str, Quote]:
    """The hash that was signed over and the quote; of which nothing is looked at before."""
    how = parse_signature(signature)
    _verify(how, message, key)
    return how.hash, parse_quote(message)


def _about(hash: str, quote: Quote, pcrs: Mapping[int, bytes]) -> TpmClaims:
    """What the quote says, of these values.

    "pcrDigest: digest of the selected PCR using the hash of the signing key" (Part 2, 10.12.1).
    """
    numbers = selected_pcrs(quote)
    if missing := sorted(set(numbers) - pcrs.keys()):
        raise Unbound(f"tpm2: expected the value of PCR {missing[0]}, which was quoted")
    digest = hashlib.new(hash, b"".join(pcrs[number] for number in numbers)).digest()
    if digest != quote.pcr_digest:
        raise Unbound(
            f"tpm2: PCR values: expected digest {quote.pcr_digest.hex()}, got {digest.hex()}"
        )
    return TpmClaims(
        report_data=quote.extra_data,
        pcrs={number: pcrs[number] for number in numbers},
        clock=quote.clock,
        reset_count=quote.reset_count,
        restart_count=quote.restart_count,
        safe=quote.safe,
        firmware_version=quote.firmware_version,
    )


def with_event_log(claims: TpmClaims, log: bytes) -> TpmClaims:
    """The same claims and the firmware's log, which must give the quoted PCRs.

    Of the quoted PCRs those are compared that the log extends, but for `UNLOGGED_PCRS`.

    Raises:
        Malformed: the log does not parse, or has no SHA-256 digests.
        Unbound: it gives another value than was quoted; the message names the PCR.
    """
    events = parse_event_log(log)
    replayed = []
    for number, value in sorted(replay(events, BANK).items()):
        quoted = claims.pcrs.get(number)
        if quoted is None or number in UNLOGGED_PCRS:
            continue
        if quoted not in _possible(number, value):
            raise Unbound(
                f"tpm2: event log: PCR {number}: expected {quoted.hex()}, its replay gives "
                f"{value.hex()}"
            )
        replayed.append(number)
    return replace(claims, events=events, replayed=tuple(replayed))


def _told(event: Event) -> str:
    """systemd-stub hashes a command line as UTF-16, little-endian, with its final NUL."""
    if hashlib.sha256(event.data).digest() == event.digests[BANK]:
        with contextlib.suppress(UnicodeDecodeError):
            text = event.data.decode("utf-16-le").removesuffix("\0")
            return ascii(text[:MAX_TOLD])
    return event.type_name


def selected_pcrs(quote: Quote) -> tuple[int, ...]:
    """The PCRs a quote is over, in its order.

    Raises:
        Unauthentic: PCRs of another bank than SHA-256, or none: nothing could be compared.
    """
    numbers: list[int] = []
    for selection in quote.selections:
        if selection.pcrs and selection.hash != BANK:
            raise Unauthentic(
                f"tpm2: expected a quote over SHA-256 PCRs only, got {selection.hash}"
            )
        numbers += selection.pcrs
    if not numbers:
        raise Unauthentic("tpm2: expected a quote over some PCRs, got none")
    return tuple(numbers)


def parse_public_key(data: bytes) -> PublicKey:
    """An attestation key from a file: PEM or DER, SubjectPublicKeyInfo or certificate, or a
    TPM2B_PUBLIC or TPMT_PUBLIC (`tpm2_readpublic -f pem|der|tss|tpmt`).

    A certificate's chain is not looked at: who names this file vouches for it.

    Raises:
        Malformed: none of these.
        Unauthentic: a TPM's public area of a key that may sign more than what its TPM made up, or
            an RSA key of less than 2048 bits.
    """
    if len(data) > MAX_KEY_FILE_BYTES:
        raise Malformed("ak: expected at most 64 KiB", field="ak")
    if b"-----BEGIN CERTIFICATE-----" in data:
        return key_of(parse_pem_chain(data, field="ak")[0])
    if b"-----BEGIN " in data:
        return _supported(_loaded(load_pem_public_key, data))
    if data[:1] != b"\x30":
        return attestation_key(parse_public(data))
    try:
        return _supported(_loaded(load_der_public_key, data))
    except Malformed:
        return key_of(parse_der_certificate(data, field="ak"))


def attestation_key(public: PublicArea) -> PublicKey:
    """The key of a public area, if that is what an attestation key's must be.

    Raises:
        Unauthentic: it is not a restricted signing key that cannot leave its TPM.
    """
    if not public.is_restricted_signing_key:
        raise Unauthentic(
            "tpm2: attestation key: expected attributes fixedTPM, restricted, sign and not "
            f"decrypt, got {public.attributes:#010x}"
        )
    return public.public_key()


def key_of(certificate: x509.Certificate) -> PublicKey:
    """A certificate's key.

    Raises:
        Malformed: it does not parse. Unauthentic: not a kind that signs quotes.
    """
    try:
        return _supported(certificate.public_key())
    except UNREADABLE:
        raise Malformed("ak: expected a public key", field="ak") from None


def _in_order(values: bytes, quote: Quote) -> dict[int, bytes]:
    """The values of an evidence's `pcrs`, which are in the order of the selection."""
    numbers, size = selected_pcrs(quote), DIGEST_BYTES[BANK]
    if len(values) != size * len(numbers):
        raise Unbound(f"tpm2: expected {len(numbers)} PCR values, got {len(values)} bytes")
    found: dict[int, bytes] = {}
    for index, number in enumerate(numbers):
        found[number] = values[index * size : (index + 1) * size]
    return found


def _verify(how: Signature, message: bytes, key: PublicKey) -> None:
    digest = HASHES.get(how.hash)
    if digest is None:
        raise Unauthentic(f"tpm2: signature: expected SHA-256 or longer, got {how.hash}")
    try:
        match key:
            case rsa.RSAPublicKey() if how.algorithm == "rsassa":
                key.verify(how.value, message, padding.PKCS1v15(), digest)
            case rsa.RSAPublicKey() if how.algorithm == "rsapss":
                # Part 1, B.7: a TPM's salt is as long as fits, or as the digest (FIPS 186-4).
                salt = padding.PSS(padding.MGF1(digest), padding.PSS.AUTO)
                key.verify(how.value, message, salt, digest)
            case ec.EllipticCurvePublicKey() if how.algorithm == "ecdsa":
                key.verify(how.value, message, ec.ECDSA(digest))
            case _:
                raise Unauthentic(f"tpm2: signature: {how.algorithm} is not of this key's kind")
    except (*UNREADABLE, InvalidSignature):
        raise Unauthentic("tpm2: signature: not the attestation key's over this quote") from None


def _possible(number: int, value: bytes) -> tuple[bytes, ...]:
    """What a PCR may hold once the log has given `value`."""
    if number != 11:
        return (value,)
    values = [value]
    for phase in PHASES:
        word = hashlib.sha256(phase).digest()
        values.append(hashlib.sha256(values[-1] + word).digest())
    return tuple(values)


def _check_may_sign(certificate: x509.Certificate) -> None:
    """RFC 5280 4.2.1.3: with a key usage, signatures need digitalSignature. A CA's key signs
    certificates and no quotes (TCG, Credential Profiles: "CA" is false)."""
    for extension in certificate.extensions:
        match extension.value:
            case x509.KeyUsage(digital_signature=False):
                raise Unauthentic("tpm2: attestation key: expected key usage digitalSignature")
            case x509.BasicConstraints(ca=True):
                raise Unauthentic("tpm2: attestation key: expected a certificate that is no CA's")


def _supported(key: object) -> PublicKey:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key
    raise Unauthentic("tpm2: attestation key: expected an RSA key of 2048 bits or more, or ECC")


def _loaded(load: Callable[[bytes], object], data: bytes) -> object:
    try:
        return load(data)
    except UNREADABLE:
        raise Malformed("ak: expected a public key", field="ak") from None

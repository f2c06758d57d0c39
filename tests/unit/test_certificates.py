"""The operator's certificates: what is taken, what is refused and why, and when it is shown."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import ssl
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import CertificateRefused
from appliance.serving.certificates import (
    MAX_BYTES,
    MAX_CERTIFICATES,
    ChainFile,
    appraise_chain,
    authenticate_chain,
    parse_certificates,
    parse_client_authorities,
    read_certificates,
)
from appliance.serving.keys import TlsIdentity, create_tls_identity
from tests.fakes.authority import CLIENT, DAY, HOUR, Authority, key_pem, name, pem

NOW = datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0)
NAMES = ["localhost", "api.example.org", "127.0.0.1", "::1"]
IDENTITY = create_tls_identity(NAMES, now=NOW)
ROOT = Authority("Root", now=NOW)
INTERMEDIATE = Authority("Intermediate", now=NOW, parent=ROOT)


def our_key() -> ec.EllipticCurvePublicKey:
    key = load_der_public_key(IDENTITY.spki)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


OURS = our_key()
LEAF = INTERMEDIATE.issue(OURS)
GOOD = pem(LEAF, INTERMEDIATE.certificate)


def judge(data: bytes, *, now: datetime.datetime = NOW) -> int:
    """How many certificates the chain has, when it is one we would show."""
    chain = parse_certificates(data)
    authenticate_chain(chain, spki=IDENTITY.spki)
    appraise_chain(chain, now=now)
    return len(chain)


def refusal(data: bytes, *, now: datetime.datetime = NOW) -> str:
    with pytest.raises(CertificateRefused) as caught:
        judge(data, now=now)
    return caught.value.message


# ---------------------------------------------------------------------------------- the request


def test_the_request_names_the_hosts_and_is_signed_by_the_tls_key() -> None:
    request = x509.load_pem_x509_csr(IDENTITY.csr)
    assert request.is_signature_valid
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "api.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    spki = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki == IDENTITY.spki
    assert hashlib.sha256(spki).hexdigest() == IDENTITY.spki_sha256
    assert isinstance(request.signature_hash_algorithm, hashes.SHA256)


def test_the_request_has_the_subject_of_the_certificate_and_no_private_part() -> None:
    request = x509.load_pem_x509_csr(IDENTITY.csr)
    assert request.subject == x509.load_pem_x509_certificate(IDENTITY.certificate).subject
    assert IDENTITY.csr.startswith(b"-----BEGIN CERTIFICATE REQUEST-----\n")
    assert b"PRIVATE" not in IDENTITY.csr


# --------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (GOOD, 2),
        (GOOD + pem(ROOT.certificate), 3),
        (pem(ROOT.issue(OURS)), 1),
        (pem(ROOT.issue(OURS, purposes=None)), 1),
        (pem(ROOT.issue(OURS, purposes=[*CLIENT, ExtendedKeyUsageOID.SERVER_AUTH])), 1),
        (IDENTITY.certificate, 1),
        (b"subject=CN = api\n\n" + GOOD.replace(b"\n", b"\r\n") + b"\n# that is all\n", 2),
    ],
    ids=["usual", "root", "alone", "no-eku", "both-ekus", "our-own", "with-text"],
)
def test_a_chain_for_our_key_is_taken(data: bytes, count: int) -> None:
    assert judge(data) == count


def test_every_usual_kind_of_authority_key_may_sign() -> None:
    keys: list[rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
    ]
    for key in keys:
        signer = Authority("Signer", now=NOW, key=key)
        assert judge(pem(signer.issue(OURS), signer.certificate)) == 2


def test_ten_certificates_are_taken_and_eleven_are_not() -> None:
    signers = [ROOT]
    while len(signers) < MAX_CERTIFICATES:
        signers.append(Authority(f"CA {len(signers)}", now=NOW, parent=signers[-1]))
    chain = [signer.certificate for signer in reversed(signers)]
    assert judge(pem(signers[-2].issue(OURS), *chain[1:])) == MAX_CERTIFICATES
    assert refusal(pem(signers[-1].issue(OURS), *chain)) == (
        "expected 1 to 10 certificates, got 11"
    )


# ------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "expected 1 to 10 certificates, got 0"),
        (b"\0\xff" * 1000, "expected 1 to 10 certificates, got 0"),
        (LEAF.public_bytes(Encoding.DER), "expected 1 to 10 certificates, got 0"),
        (GOOD[:-200], "expected 2 certificates, 1 of them decode"),
        (GOOD.replace(b"\nMII", b"\nAII", 1), "got one that does not decode"),
        (GOOD.replace(b"-----END", b"-----EMD", 1), "decode"),
        (GOOD + IDENTITY.csr, "expected CERTIFICATE blocks only, got 1 of other kinds"),
        (
            GOOD.replace(b"CERTIFICATE-----", b"TRUSTED CERTIFICATE-----"),
            "expected CERTIFICATE blocks only, got 2 of other kinds",
        ),
        (key_pem(ROOT.key) + GOOD, "expected certificates only, got a private key"),
        (GOOD + key_pem(ROOT.key), "expected certificates only, got a private key"),
        (
            b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n" + GOOD,
            "expected certificates only, got a private key",
        ),
    ],
    ids=[
        "empty",
        "garbage",
        "der",
        "cut",
        "broken-der",
        "broken-pem",
        "request",
        "trusted",
        "key-first",
        "key-last",
        "encrypted-key",
    ],
)
def test_a_file_of_anything_else_is_refused(data: bytes, says: str) -> None:
    assert says in refusal(data)


@given(bit=st.integers(0, len(GOOD) * 8 - 1))
def test_a_flipped_bit_is_taken_or_refused_and_never_a_defect(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    with suppress(CertificateRefused):
        assert 1 <= judge(bytes(data)) <= 2


DER = LEAF.public_bytes(Encoding.DER)
SIGNED_AT = DER.index(LEAF.tbs_certificate_bytes)


@given(bit=st.integers(SIGNED_AT * 8, (SIGNED_AT + len(LEAF.tbs_certificate_bytes)) * 8 - 1))
def test_a_flipped_bit_in_what_is_signed_is_refused(bit: int) -> None:
    data = bytearray(DER)
    data[bit // 8] ^= 1 << bit % 8
    flipped = ssl.DER_cert_to_PEM_cert(bytes(data)).encode()
    assert refusal(flipped + pem(INTERMEDIATE.certificate))


def test_a_serial_number_that_rfc_5280_forbids_is_refused() -> None:
    number = LEAF.serial_number
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    negative = ssl.DER_cert_to_PEM_cert(DER.replace(serial, b"\xff" + serial[1:])).encode()
    assert "does not decode" in refusal(negative)


def test_a_refusal_quotes_nothing_of_the_file() -> None:
    assert "secret" not in refusal(b"-----BEGIN secret-----\n-----BEGIN CERTIFICATE-----secret")


# ------------------------------------------------------------------------------ whose and by whom


def test_a_chain_for_another_key_is_refused_with_both_digests() -> None:
    other = create_tls_identity(NAMES, now=NOW)
    message = refusal(pem(ROOT.answer(other.csr)))
    assert message == (
        f"certificate 1: expected the key of this boot, spki_sha256 {IDENTITY.spki_sha256}, "
        f"got {other.spki_sha256}"
    )


def test_our_key_in_another_certificate_of_the_chain_is_not_enough() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert "expected the key of this boot" in refusal(pem(ROOT.issue(other), ROOT.issue(OURS)))


def content(der: bytes) -> bytes:
    """Of a DER value, without its tag and length."""
    return der[2 + (der[1] & 0x7F if der[1] & 0x80 else 0) :]


def sequence(inner: bytes) -> bytes:
    length = len(inner).to_bytes(2, "big")
    if len(inner) < 256:
        length = length[1:]
    return b"\x30" + (b"" if len(inner) < 128 else bytes([0x80 | len(length)])) + length + inner


def test_our_key_in_a_compressed_form_is_refused_because_pins_would_not_match() -> None:
    algorithm = IDENTITY.spki[2:23]
    point = OURS.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    compressed = sequence(algorithm + b"\x03\x22\x00" + point)
    assert load_der_public_key(compressed) == OURS
    signed = LEAF.tbs_certificate_bytes
    whole = sequence(
        sequence(content(signed).replace(IDENTITY.spki, compressed))
        + content(DER).removeprefix(signed)
    )
    assert x509.load_der_x509_certificate(whole).public_key() == OURS
    assert "expected the key of this boot" in refusal(ssl.DER_cert_to_PEM_cert(whole).encode())


OTHER_INTERMEDIATE = Authority("Intermediate", now=NOW, parent=ROOT)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (pem(LEAF, ROOT.certificate), 1),
        (pem(LEAF, ROOT.certificate, INTERMEDIATE.certificate), 1),
        (pem(LEAF, OTHER_INTERMEDIATE.certificate, ROOT.certificate), 1),
        (pem(LEAF, INTERMEDIATE.certificate, Authority("Root", now=NOW).certificate), 2),
        (pem(LEAF, LEAF, INTERMEDIATE.certificate), 1),
        (pem(LEAF, INTERMEDIATE.certificate, INTERMEDIATE.certificate), 2),
    ],
    ids=["gap", "order", "same-name", "other-root", "twice-leaf", "twice-issuer"],
)
def test_a_chain_that_does_not_link_is_refused(data: bytes, number: int) -> None:
    assert refusal(data) == (
        f"certificate {number}: expected it to be issued and signed by certificate {number + 1}, "
        "it is not"
    )


def test_the_leaf_comes_first() -> None:
    assert "certificate 1: expected the key" in refusal(pem(INTERMEDIATE.certificate, LEAF))


def test_an_issuer_with_a_key_that_signs_nothing_is_refused() -> None:
    # Of X25519 and the like `cryptography` says TypeError or UnsupportedAlgorithm, not "no".
    signer = ed25519.Ed25519PrivateKey.generate()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name("Intermediate"))
        .issuer_name(name("Intermediate"))
        .public_key(signer.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(signer, None)
    )
    assert "certificate 1: expected it to be issued" in refusal(pem(LEAF, certificate))


# ------------------------------------------------------------------------------- for what and when


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (ROOT.issue(OURS, not_after=NOW - HOUR / 2), "got one until "),
        (ROOT.issue(OURS, not_before=NOW + HOUR), "got one from "),
        (
            ROOT.issue(OURS, purposes=CLIENT),
            "certificate 1: expected the extended key usage serverAuth or none, got others",
        ),
        (
            ROOT.issue(OURS, purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
            "certificate 1: expected the extended key usage serverAuth or none, got others",
        ),
        (
            ROOT.issue(OURS, is_authority=True),
            "certificate 1: expected a server's, got an authority's",
        ),
    ],
    ids=["expired", "not-yet", "client", "any", "authority"],
)
def test_a_certificate_that_is_not_good_for_a_server_now_is_refused(
    leaf: x509.Certificate, says: str
) -> None:
    assert says in refusal(pem(leaf))


def test_it_is_valid_from_its_first_second_to_its_last() -> None:
    data = pem(ROOT.issue(OURS, not_before=NOW, not_after=NOW + HOUR))
    second = datetime.timedelta(seconds=1)
    assert judge(data, now=NOW) == judge(data, now=NOW + HOUR) == 1
    assert "expected it to be valid now" in refusal(data, now=NOW - second)
    assert "expected it to be valid now" in refusal(data, now=NOW + HOUR + second)


def test_an_expired_issuer_is_refused_too() -> None:
    expired = Authority("Old", now=NOW, parent=ROOT, lifetime=-HOUR)
    message = refusal(pem(expired.issue(OURS), expired.certificate))
    assert re.match(r"certificate 2: expected it to be valid now, got one until 2", message)


@pytest.mark.parametrize("is_authority", [False, None], ids=["no", "silent"])
def test_an_issuer_that_may_issue_nothing_is_refused(*, is_authority: bool | None) -> None:
    signer = Authority("No CA", now=NOW, parent=ROOT, is_authority=is_authority)
    message = refusal(pem(signer.issue(OURS), signer.certificate))
    assert message == "certificate 2: expected an authority's"


# -------------------------------------------------------------------------------------- the file


def test_a_file_of_64_kib_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chain.pem"
    path.write_bytes(b"#" * (MAX_BYTES - len(GOOD)) + GOOD)
    assert judge(read_certificates(path)) == 2
    path.write_bytes(b"#" * (MAX_BYTES - len(GOOD) + 1) + GOOD)
    with pytest.raises(CertificateRefused, match="expected at most 65536 bytes, got more"):
        read_certificates(path)


def test_an_endless_or_silent_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CertificateRefused, match="expected a regular file"):
            read_certificates(path)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(CertificateRefused, match="cannot be read: No such file"):
        read_certificates(tmp_path / "gone")
    with pytest.raises(CertificateRefused, match="cannot be read: Is a directory"):
        read_certificates(tmp_path)


# --------------------------------------------------------------------------- client authorities


def test_client_authorities_come_back_as_certificates_alone() -> None:
    data = b"# ours\n" + pem(ROOT.certificate, INTERMEDIATE.certificate)
    assert parse_client_authorities(data) == pem(ROOT.certificate, INTERMEDIATE.certificate)


def test_a_certificate_that_is_no_authority_cannot_admit_clients() -> None:
    with pytest.raises(CertificateRefused, match="certificate 2: expected an authority's"):
        parse_client_authorities(pem(ROOT.certificate, LEAF))


# ----------------------------------------------------------------------------------- the watcher

INTERVAL_S = 5.0


def shown(context: ssl.SSLContext) -> x509.Certificate:
    """The certificate that a handshake with `context` shows."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs) * 4:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = ours.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


SELF_SIGNED = x509.load_pem_x509_certificate(IDENTITY.certificate)


class Watched:
    """A chain file that is watched, what its context shows, and what is logged of it."""

    def __init__(self, folder: Path, identity: TlsIdentity = IDENTITY) -> None:
        self.path = folder / "chain.pem"
        self.now = NOW
        self.context = identity.server_context()
        self.lines = structlog.testing.LogCapture()
        log = structlog.wrap_logger(structlog.PrintLogger(), processors=[self.lines])
        self.file = ChainFile(self.path, identity, self.context, now=lambda: self.now, log=log)

    def put(self, data: bytes) -> None:
        """As an operator should: readers see the old file or the new one."""
        new = self.path.with_suffix(".new")
        new.write_bytes(data)
        new.replace(self.path)

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines.entries]

    @property
    def shown(self) -> x509.Certificate:
        return shown(self.context)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def a_few_looks() -> None:
    await trio.sleep(3.5 * INTERVAL_S)


async def test_a_chain_is_shown_within_an_interval_of_its_coming(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    await nursery.start(watched.file.watch, INTERVAL_S)
    assert watched.shown == SELF_SIGNED
    watched.put(GOOD)
    assert watched.shown == SELF_SIGNED
    await trio.sleep(INTERVAL_S + 0.1)
    assert watched.shown == LEAF
    await a_few_looks()
    assert watched.events == ["tls_chain_missing", "tls_chain_shown"]
    assert watched.lines.entries[1]["certificates"] == 2
    assert watched.lines.entries[1]["not_after"] == (NOW + DAY).isoformat()


async def test_a_chain_that_is_there_before_is_shown_from_the_first_handshake_on(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    assert watched.shown == LEAF


async def test_the_chain_of_an_earlier_boot_is_a_warning(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    watched = Watched(tmp_path, create_tls_identity(NAMES, now=NOW))
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    await a_few_looks()
    [line] = watched.lines.entries
    assert (line["event"], line["log_level"]) == ("tls_chain_refused", "warning")
    assert "expected the key of this boot" in line["error"]
    assert "dcv csr" in line["advice"]
    assert line["still_shown"] == "self-signed"


async def test_a_renewed_chain_replaces_the_one_before(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    renewed = ROOT.issue(OURS)
    watched.put(pem(renewed))
    await a_few_looks()
    assert watched.shown == renewed
    assert watched.events == ["tls_chain_shown"] * 2


@pytest.mark.parametrize(
    "bad",
    [
        b"garbage",
        pem(LEAF, ROOT.certificate),
        pem(ROOT.issue(OURS, not_after=NOW - HOUR / 2)),
        GOOD + key_pem(ROOT.key),
        b"#" * (MAX_BYTES + 1),
    ],
    ids=["garbage", "link", "expired", "key", "huge"],
)
async def test_a_bad_file_leaves_the_chain_before_and_is_said_once_per_change(
    watched: Watched,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    bad: bytes,
) -> None:
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    watched.put(bad)
    await a_few_looks()
    assert watched.shown == LEAF
    assert watched.events == ["tls_chain_shown", "tls_chain_refused"]
    assert watched.lines.entries[1]["still_shown"] == "operator"
    watched.put(bad)
    await a_few_looks()
    assert watched.events == ["tls_chain_shown", "tls_chain_refused", "tls_chain_refused"]
    watched.put(GOOD)
    await a_few_looks()
    assert watched.events[3:] == ["tls_chain_shown"]


async def test_a_chain_that_openssl_refuses_halfway_leaves_the_one_before(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    # Its leaf would be taken before its weak issuer is refused (Python's security level is 2).
    weak = Authority("Weak", now=NOW, key=rsa.generate_private_key(65537, 1024))
    data = pem(weak.issue(OURS), weak.certificate)
    assert judge(data) == 2
    watched.put(data)
    await nursery.start(watched.file.watch, INTERVAL_S)
    assert watched.shown == SELF_SIGNED
    assert "OpenSSL" in watched.lines.entries[0]["error"]


async def test_a_chain_that_is_not_valid_yet_is_shown_once_it_is(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    later = ROOT.issue(OURS, not_before=NOW + HOUR)
    watched.put(pem(later))
    await nursery.start(watched.file.watch, INTERVAL_S)
    await a_few_looks()
    assert watched.shown == SELF_SIGNED
    watched.now = NOW + HOUR
    await a_few_looks()
    assert watched.shown == later
    assert watched.events == ["tls_chain_refused", "tls_chain_shown"]


async def test_a_chain_that_expires_in_use_stays_and_is_said_once(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    watched.now = NOW + 2 * DAY
    await a_few_looks()
    assert watched.shown == LEAF
    assert watched.events == ["tls_chain_shown", "tls_chain_refused"]
    assert "valid now" in watched.lines.entries[1]["error"]


async def test_a_chain_whose_file_goes_away_stays(
    watched: Watched, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    watched.put(GOOD)
    await nursery.start(watched.file.watch, INTERVAL_S)
    watched.path.unlink()
    await a_few_looks()
    assert watched.shown == LEAF
    assert watched.events == ["tls_chain_shown", "tls_chain_missing"]
    assert watched.lines.entries[1]["still_shown"] == "operator"


def link(path: Path, data: bytes) -> None:
    """As certbot does: a link to a file of another name each time."""
    target = path.with_name(hashlib.sha256(data).hexdigest())
    target.write_bytes(data)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("write", [Path.write_bytes, link], ids=["in-place", "link"])
async def test_a_file_written_in_place_or_a_link_moved_is_a_change(
    watched: Watched,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    write: Callable[[Path, bytes], object],
) -> None:
    write(watched.path, b"soon")
    await nursery.start(watched.file.watch, INTERVAL_S)
    write(watched.path, GOOD)
    await a_few_looks()
    assert watched.shown == LEAF


def test_a_path_that_cannot_be_followed_is_refused_and_not_missing(watched: Watched) -> None:
    watched.path.symlink_to(watched.path)
    watched.file.look()
    watched.file.look()
    [line] = watched.lines.entries
    assert line["event"] == "tls_chain_refused"
    assert "cannot be read: Too many levels of symbolic links" in line["error"]


def test_a_handshake_under_way_keeps_the_certificate_it_began_with(watched: Watched) -> None:
    client = ssl.create_default_context(cadata=IDENTITY.certificate.decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    theirs = watched.context.wrap_bio(to_server, to_client, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        ours.do_handshake()
    watched.put(GOOD)
    watched.file.look()
    assert watched.shown == LEAF
    for side in (theirs, ours, theirs):
        side.do_handshake() if side is ours else _go_on(side)
    assert ours.getpeercert(binary_form=True) == SELF_SIGNED.public_bytes(Encoding.DER)
    ours.write(b"still here")
    assert theirs.read() == b"still here"


def _go_on(side: ssl.SSLObject) -> None:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return

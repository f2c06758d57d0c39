"""The TLS key: born in memory, shown nowhere, and good for a handshake that trusts only it."""

from __future__ import annotations

import datetime
import hashlib
import ssl
import subprocess
import sys
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.serving.keys import CLOCK_SKEW, LIFETIME, TlsIdentity, create_tls_identity

NOW = datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0)
NAMES = ["localhost", "api.example.org", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def identity() -> TlsIdentity:
    return create_tls_identity(NAMES, now=NOW)


def certificate(identity: TlsIdentity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(identity.certificate)


# ------------------------------------------------------------------------------ the certificate


def test_the_certificate_names_what_it_was_asked_to_and_is_no_authority(
    identity: TlsIdentity,
) -> None:
    found = certificate(identity)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "api.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    constraints = found.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_the_certificate_is_signed_by_its_own_p_256_key(identity: TlsIdentity) -> None:
    found = certificate(identity)
    key = found.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert found.issuer == found.subject
    found.verify_directly_issued_by(found)
    assert isinstance(found.signature_hash_algorithm, hashes.SHA256)


def test_the_certificate_is_valid_from_a_little_earlier_for_a_little_over_a_year(
    identity: TlsIdentity,
) -> None:
    found = certificate(identity)
    assert found.not_valid_before_utc == NOW - CLOCK_SKEW
    assert found.not_valid_after_utc == NOW + LIFETIME
    assert datetime.timedelta(days=398) >= LIFETIME  # CA/Browser Forum BR 6.3.2


def test_the_spki_digest_is_that_of_the_certificates_key(identity: TlsIdentity) -> None:
    spki = (
        certificate(identity)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert identity.spki_sha256 == hashlib.sha256(spki).hexdigest()


def test_every_identity_has_a_key_and_a_serial_number_of_its_own(identity: TlsIdentity) -> None:
    other = create_tls_identity(NAMES, now=NOW)
    assert other.spki_sha256 != identity.spki_sha256
    assert certificate(other).serial_number != certificate(identity).serial_number


def test_a_long_first_name_does_not_overflow_the_common_name() -> None:
    long = ".".join(["a" * 60] * 4)
    found = certificate(create_tls_identity([long], now=NOW))
    (common,) = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common.value == long[:64]
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [long]


def test_names_may_come_from_an_iterator() -> None:
    found = certificate(create_tls_identity(iter(["a.example", "b.example"]), now=NOW))
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "b.example"]


def test_a_name_that_is_no_dns_name_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"."):
        create_tls_identity(["bücher.example"], now=NOW)


# ---------------------------------------------------------------------------------- secrecy


def test_the_key_is_in_no_representation(identity: TlsIdentity) -> None:
    shown = f"{identity!r} {identity}"
    assert "PRIVATE" not in shown
    assert not any(line in shown for line in identity._key.decode().splitlines())
    assert b"PRIVATE" not in identity.certificate


def open_descriptors() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder is gone by now
            found[entry.name] = str(entry.readlink())
    return found


def test_loading_the_key_leaves_nothing_on_disk_and_no_descriptor_open(
    identity: TlsIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TMPDIR", "TMP", "TEMP", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = open_descriptors()
    identity.server_context()
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- handshakes


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """A whole handshake in memory; the client's side of it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs) * 4:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert ours.version() is not None, "the handshake did not end"
    return ours


def trusting(identity: TlsIdentity, *alpn: str) -> ssl.SSLContext:
    """An ordinary client that trusts this one certificate and nothing else."""
    context = ssl.create_default_context(cadata=identity.certificate.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_only_this_certificate_connects_by_every_name(
    identity: TlsIdentity, name: str
) -> None:
    ours = handshake(trusting(identity), identity.server_context(), name)
    der = ours.getpeercert(binary_form=True)
    assert der == ssl.PEM_cert_to_DER_cert(identity.certificate.decode())


@pytest.mark.parametrize("name", ["example.org", "127.0.0.2", "api.example.org.evil", "::2"])
def test_a_name_that_the_certificate_does_not_have_is_refused(
    identity: TlsIdentity, name: str
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(trusting(identity), identity.server_context(), name)


def test_another_appliances_certificate_of_the_same_names_is_refused(
    identity: TlsIdentity,
) -> None:
    impostor = create_tls_identity(NAMES, now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(trusting(identity), impostor.server_context(), "localhost")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["h2", "http/1.1"], "h2"),
        (["http/1.1", "h2"], "h2"),
        (["http/1.1"], "http/1.1"),
        (["http/1.0"], None),
        ([], None),
    ],
)
def test_http_2_is_preferred_by_alpn(
    identity: TlsIdentity, offered: list[str], chosen: str | None
) -> None:
    ours = handshake(trusting(identity, *offered), identity.server_context(), "localhost")
    assert ours.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken_with_forward_secrecy(
    identity: TlsIdentity, version: ssl.TLSVersion
) -> None:
    client = trusting(identity)
    client.minimum_version = client.maximum_version = version
    ours = handshake(client, identity.server_context(), "localhost")
    assert (ours.version() or "").replace(".", "_") == version.name
    cipher = ours.cipher()
    assert cipher is not None
    assert cipher[0].startswith(("TLS_", "ECDHE-"))


@pytest.mark.parametrize("suite", ["AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-SHA384"])
def test_suites_that_http_2_forbids_are_not_spoken(identity: TlsIdentity, suite: str) -> None:
    client = trusting(identity)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(f"{suite}:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(client, identity.server_context(), "localhost")


OWNER_OF_KEYS = """
import ctypes, datetime, os
from appliance.serving.keys import close_memory, create_tls_identity

def another_process_of_this_user_reads(name):
    owner = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as after an exec
        try:
            os.listdir(f"/proc/{owner}/fd") if name == "fd" else open(f"/proc/{owner}/{name}").read(1)
        except PermissionError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

identity = create_tls_identity(["localhost"], now=datetime.datetime.now(datetime.UTC))
identity.server_context()
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print([name for name in ("environ", "maps", "fd") if another_process_of_this_user_reads(name)])
close_memory()
print([name for name in ("environ", "maps", "fd") if another_process_of_this_user_reads(name)])
identity.server_context()
print("still loads its own key")
"""


def test_no_process_of_its_own_user_reads_the_memory_of_one_that_closed_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWNER_OF_KEYS], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "['environ', 'maps', 'fd']",
        "[]",
        "still loads its own key",
    ], done.stderr

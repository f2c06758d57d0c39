"""Asking an appliance for its report, and seeing whose key is at the other end.

The connection is TLS without authorities: what makes the key trustworthy is evidence that binds
it (step 8), never a name. So nothing may be sent over such a connection that is worth anything to
whoever answers; a report's nonce is not.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import httpx2
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance import __version__
from appliance.errors import Unbound, VerificationIncomplete
from appliance.wire import report as report_format

CONNECT_S = 10.0
READ_S = 60.0
"""A report waits for two collections at most, and for the CPU's quote."""

TOTAL_S = 120.0

REPORT_PATH = "/v1/aci/attestation"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What an appliance answered.

    Attributes:
        report: the body's bytes; nothing in it is believed.
        spki_sha256: of the TLS key at the other end, 32 bytes.
    """

    url: str
    report: bytes
    spki_sha256: bytes


async def fetch_report(url: str, nonce: bytes) -> Fetched:
    """Step 1 of protocol.md section 9: a report over TLS, with a fresh nonce.

    Args:
        url: of the appliance, `https://HOST[:PORT]`.
        nonce: 32 random bytes.

    Raises:
        VerificationIncomplete: it cannot be reached, or does not answer with a report.
    """
    base = base_url(url)
    timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
    try:
        with trio.fail_after(TOTAL_S):
            async with (
                httpx2.AsyncClient(
                    verify=_any_key(), timeout=timeout, trust_env=False, follow_redirects=False
                ) as client,
                client.stream(
                    "GET",
                    base + REPORT_PATH,
                    params={"nonce": nonce.hex()},
                    headers={"User-Agent": f"dcv/{__version__}", "Accept": "application/json"},
                ) as response,
            ):
                spki = _spki_sha256(response)
                body = await _read(response)
    except trio.TooSlowError:
        raise VerificationIncomplete(f"expected a report within {TOTAL_S:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise VerificationIncomplete(f"cannot ask {base}: {reason}") from error
    return Fetched(base, body, spki)


def base_url(url: str) -> str:
    """Scheme, host and port of a URL.

    Raises:
        VerificationIncomplete: not an https URL; without TLS there is no key to verify.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme == "https" and parts.hostname and (parts.port or 443)
    except ValueError:
        valid = False
    if not valid:
        raise VerificationIncomplete(f"expected a URL like https://HOST:8443, got {url[:200]}")
    return urlunsplit((parts.scheme, parts.netloc, "", "", ""))


def _any_key() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whose key it is, the report says
    return context


class PinnedContext(ssl.SSLContext):
    """TLS with one key and no other: whose key it is, evidence has said before.

    The key is looked at as the handshake ends. Until that has returned no layer above can write,
    so where it is another's nothing leaves this machine, not even a request line.
    """

    spki_sha256: bytes

    @classmethod
    def to(cls, spki_sha256: bytes) -> PinnedContext:
        """Args: spki_sha256: 32 bytes, of the key's SubjectPublicKeyInfo."""
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # this key, whichever certificate holds it
        context.sslobject_class = _PinnedObject
        context.sslsocket_class = _PinnedSocket
        context.spki_sha256 = spki_sha256
        return context

    def check(self, certificate: bytes | None) -> None:
        """Hold the certificate at the other end to the pin.

        Raises:
            Unbound: it has another key.
        """
        got = spki_of(certificate)
        if not hmac.compare_digest(got, self.spki_sha256):
            raise Unbound(
                f"TLS key: expected {self.spki_sha256.hex()}, the one that was verified, "
                f"got {got.hex()}: somebody stands between"
            )


class _PinnedObject(ssl.SSLObject):
    """What asynchronous streams use."""

    def do_handshake(self) -> None:
        super().do_handshake()
        assert isinstance(self.context, PinnedContext)
        self.context.check(self.getpeercert(binary_form=True))


class _PinnedSocket(ssl.SSLSocket):
    """What synchronous clients use."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        assert isinstance(self.context, PinnedContext)
        try:
            self.context.check(self.getpeercert(binary_form=True))
        except BaseException:
            self.close()  # nobody above has it yet
            raise


def pinned_client(url: str, spki_sha256: bytes, *, read_s: float) -> httpx2.AsyncClient:
    """A client every connection of which ends at the key that was verified, or sends nothing.

    Requests raise `Unbound` where it ends at another.
    """
    return httpx2.AsyncClient(
        base_url=url,
        verify=PinnedContext.to(spki_sha256),
        timeout=httpx2.Timeout(read_s, connect=CONNECT_S),
        trust_env=False,
        follow_redirects=False,
        # Content is hashed as it was written.
        headers={"User-Agent": f"dcv/{__version__}", "Accept-Encoding": "identity"},
    )


def _spki_sha256(response: httpx2.Response) -> bytes:
    stream = response.extensions["network_stream"]
    tls = stream.get_extra_info("ssl_object")
    return spki_of(None if tls is None else tls.getpeercert(binary_form=True))


def spki_of(certificate: bytes | None) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo in a DER certificate.

    Raises:
        VerificationIncomplete: there is none, or it does not parse.
    """
    if not certificate:
        raise VerificationIncomplete("expected a TLS certificate, the server showed none")
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise VerificationIncomplete("expected a TLS certificate that parses") from error
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


async def _read(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > report_format.MAX_BYTES:
            raise VerificationIncomplete("expected a smaller report")
    if response.status_code != httpx2.codes.OK:
        raise VerificationIncomplete(f"expected a report, got HTTP {response.status_code}")
    return bytes(body)

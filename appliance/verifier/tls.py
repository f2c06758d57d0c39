"""TLS without authorities: which keys may be at the other end, evidence has said.

    PinnedContext ── every handshake ── the key is one of the pinned ── or nothing is written

The key is looked at as the handshake ends. Until that has returned no layer above can write, so
where it is another's nothing leaves this machine, not even a request line.

Sockets made here also keep to a deadline for the whole of an exchange (`deadline`): a timeout per
read, which is all that a synchronous client has, lets somebody who sends a byte at a time take for
ever. Asynchronous clients have cancel scopes.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import httpx2
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.errors import Unbound, VerificationIncomplete

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Until(threading.local):
    at = float("inf")


_until = _Until()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within so many seconds every read and write of this thread on our sockets must be over.

    One inside another shortens it, never more. Raises: httpx2.ReadTimeout, httpx2.WriteTimeout, or
    TimeoutError, from what is read or written.
    """
    before = _until.at
    _until.at = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.at = before


class _Socket(ssl.SSLSocket):
    """What synchronous clients use."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        self._hurry()
        return super().recv(buflen, flags)

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        self._hurry()
        return super().send(data, flags)

    def _hurry(self) -> None:
        if _until.at == float("inf"):
            return
        left = _until.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("expected the end of it before this")
        timeout = self.gettimeout()
        self.settimeout(left if timeout is None else min(timeout, left))


class PinnedContext(ssl.SSLContext):
    """TLS with these keys and no other.

    Attributes:
        pins: SHA-256 of each SubjectPublicKeyInfo, 32 bytes.
    """

    pins: frozenset[bytes]

    @classmethod
    def to(cls, *spki_sha256: bytes) -> PinnedContext:
        """Args: spki_sha256: 32 bytes each, of the keys' SubjectPublicKeyInfo."""
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        _without_authorities(context)  # this key, whichever certificate holds it
        context.sslobject_class = _PinnedObject
        context.sslsocket_class = _PinnedSocket
        context.pins = frozenset(spki_sha256)
        return context

    def check(self, certificate: bytes | None) -> None:
        """Hold the certificate at the other end to the pins.

        Raises:
            Unbound: it has another key.
        """
        got = spki_of(certificate)
        if got not in self.pins:
            raise Unbound(
                f"TLS key: expected {' or '.join(sorted(one.hex() for one in self.pins))}, the one "
                f"that was verified, got {got.hex()}: somebody stands between"
            )


class _PinnedObject(ssl.SSLObject):
    """What asynchronous streams use."""

    def do_handshake(self) -> None:
        super().do_handshake()
        assert isinstance(self.context, PinnedContext)
        self.context.check(self.getpeercert(binary_form=True))


class _PinnedSocket(_Socket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        assert isinstance(self.context, PinnedContext)
        with ExitStack() as refused:
            refused.callback(self.close)  # nobody above has it yet
            self.context.check(self.getpeercert(binary_form=True))
            refused.pop_all()


def any_key() -> ssl.SSLContext:
    """TLS with whoever answers: whose key it is, the report says that comes over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _without_authorities(context)
    context.sslsocket_class = _Socket
    return context


def _without_authorities(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # The key is looked at once per connection, so it must stay what it is.
    context.options |= ssl.OP_NO_RENEGOTIATION


def spki_of_response(response: httpx2.Response) -> bytes:
    """Of the key at the other end of the connection that a response came over, 32 bytes.

    Raises:
        VerificationIncomplete: it showed no certificate, or one that does not parse.
    """
    stream = response.extensions["network_stream"]
    tls = stream.get_extra_info("socket")
    if not isinstance(tls, ssl.SSLSocket):  # asynchronous streams have TLS above their socket
        tls = stream.get_extra_info("ssl_object")
    certificate = None if tls is None else tls.getpeercert(binary_form=True)
    return spki_of(certificate)


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

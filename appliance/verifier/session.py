"""Asking an appliance for its report, and the clients for before and after.

The first connection is TLS without authorities: what makes the key trustworthy is evidence that
binds it (step 8), never a name. So nothing may be sent over it that is worth anything to whoever
answers; a report's nonce is not. Every later one ends at a key that the evidence named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict
from urllib.parse import urlsplit, urlunsplit

import httpx2

from appliance import __version__
from appliance.errors import VerificationIncomplete
from appliance.verifier.fetching import Fetching, Get, fetch
from appliance.verifier.tls import PinnedContext, any_key
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

    report: bytes
    spki_sha256: bytes


def report_with(nonce: bytes) -> Fetching[Fetched]:
    """Step 1 of protocol.md section 9: a report over TLS, with a fresh nonce.

    Args:
        nonce: 32 random bytes.

    Raises:
        VerificationIncomplete: what answers has none.
    """
    got = yield Get(f"{REPORT_PATH}?nonce={nonce.hex()}", report_format.MAX_BYTES, within_s=TOTAL_S)
    if got.status != httpx2.codes.OK:
        raise VerificationIncomplete(f"expected a report, got HTTP {got.status}")
    return Fetched(got.body, got.spki_sha256)


async def fetch_report(url: str, nonce: bytes) -> Fetched:
    """`report_with`, from whoever answers there.

    Args:
        url: of the appliance, `https://HOST[:PORT]`.

    Raises:
        VerificationIncomplete: it cannot be reached, or does not answer with a report.
    """
    async with anybody(url) as client:
        return await fetch(client, report_with(nonce))


def base_url(url: str) -> str:
    """Scheme, host and port of a URL.

    Raises:
        VerificationIncomplete: not an https URL; without TLS there is no key to verify.
    """
    try:
        parts = urlsplit(url)
        # A name that cannot be asked for is refused here and not where a connection is opened:
        # labels of 1 to 63 bytes (RFC 1035 section 2.3.4), and what httpx2 makes of the rest.
        (parts.hostname or "").encode("idna")
        httpx2.URL(url)
        valid = (
            parts.scheme == "https"
            and parts.hostname
            and parts.username is None
            and (parts.port or 443)
        )
    except (ValueError, httpx2.InvalidURL):
        valid = False
    if not valid:
        raise VerificationIncomplete(f"expected a URL like https://HOST:8443, got {url[:200]}")
    return urlunsplit((parts.scheme, parts.netloc, "", "", ""))


class _Options(TypedDict):
    base_url: str
    timeout: httpx2.Timeout
    trust_env: bool
    follow_redirects: bool
    headers: dict[str, str]


def _options(url: str, read_s: float) -> _Options:
    return {
        "base_url": base_url(url),
        "timeout": httpx2.Timeout(read_s, connect=CONNECT_S),
        "trust_env": False,
        "follow_redirects": False,
        # Content is hashed as it was written.
        "headers": {"User-Agent": f"dcv/{__version__}", "Accept-Encoding": "identity"},
    }


def anybody(url: str) -> httpx2.AsyncClient:
    """A client for step 1 and nothing else: nobody has said yet who is at the other end."""
    return httpx2.AsyncClient(verify=any_key(), **_options(url, READ_S))


def anybody_sync(url: str) -> httpx2.Client:
    """`anybody`, for threads."""
    return httpx2.Client(verify=any_key(), **_options(url, READ_S))


def pinned_client(url: str, pins: Iterable[bytes], *, read_s: float) -> httpx2.AsyncClient:
    """A client every connection of which ends at a key that was verified, or sends nothing.

    Requests raise `Unbound` where it ends at another.

    Args:
        pins: SHA-256 of the keys' SubjectPublicKeyInfo, 32 bytes each.
    """
    return httpx2.AsyncClient(verify=PinnedContext.to(*pins), **_options(url, read_s))


def pinned_client_sync(url: str, pins: Iterable[bytes], *, read_s: float) -> httpx2.Client:
    """`pinned_client`, for threads."""
    return httpx2.Client(verify=PinnedContext.to(*pins), **_options(url, read_s))

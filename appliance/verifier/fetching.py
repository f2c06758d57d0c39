"""What is asked of an appliance, apart from how: told once, for both kinds of client.

    Fetching ── yields what it wants next ──> `fetch` (trio, asyncio) or `fetch_sync` (threads)
        <── is sent what came ──┘                 └── returns what the fetching made of it

So the steps of a verification stand in one place, without `await`, and whoever drives them owns
the connection, the clock and the deadlines.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import anyio
import httpx2

from appliance.errors import VerificationIncomplete
from appliance.verifier.tls import deadline, spki_of_response

FETCH_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Get:
    """A wish for one document.

    Attributes:
        path: from the root, with its query.
        max_bytes: of the body, before it is read any further.
        after_s: how long to wait before asking.
        within_s: for all of it, the wait included, however slowly it comes.
    """

    path: str
    max_bytes: int
    after_s: float = 0.0
    within_s: float = FETCH_S


@dataclass(frozen=True, slots=True)
class Got:
    """What came; nothing of it is believed.

    Attributes:
        spki_sha256: of the TLS key at the other end, 32 bytes.
    """

    status: int
    body: bytes
    spki_sha256: bytes


Fetching: TypeAlias = Generator[Get, Got, T]


async def fetch(
    client: httpx2.AsyncClient, fetching: Fetching[T], *, headers: Mapping[str, str] | None = None
) -> T:
    """Run a fetching over a client, in Trio or asyncio.

    Args:
        headers: sent with every question, such as the credential.

    Raises:
        VerificationIncomplete: an answer cannot be had, in time or at all.
        Unbound: the connection ends at a TLS key that is not pinned; nothing was sent.
        What the fetching raises.
    """
    got: Got | None = None
    while True:
        try:
            wanted = next(fetching) if got is None else fetching.send(got)
        except StopIteration as done:
            value: T = done.value
            return value
        got = await _get(client, wanted, headers)


def fetch_sync(
    client: httpx2.Client, fetching: Fetching[T], *, headers: Mapping[str, str] | None = None
) -> T:
    """`fetch`, in a thread."""
    got: Got | None = None
    while True:
        try:
            wanted = next(fetching) if got is None else fetching.send(got)
        except StopIteration as done:
            value: T = done.value
            return value
        got = _get_sync(client, wanted, headers)


async def _get(client: httpx2.AsyncClient, wanted: Get, headers: Mapping[str, str] | None) -> Got:
    body = bytearray()
    try:
        with anyio.fail_after(wanted.within_s):
            await anyio.sleep(wanted.after_s)
            async with client.stream("GET", wanted.path, headers=headers) as response:
                spki = spki_of_response(response)
                async for part in response.aiter_raw():
                    _add(body, part, wanted)
    except TimeoutError:
        raise _too_slow(wanted) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        raise _no_answer(client.base_url, error) from error
    return Got(response.status_code, bytes(body), spki)


def _get_sync(client: httpx2.Client, wanted: Get, headers: Mapping[str, str] | None) -> Got:
    body = bytearray()
    try:
        with deadline(wanted.within_s):
            time.sleep(wanted.after_s)
            with client.stream("GET", wanted.path, headers=headers) as response:
                spki = spki_of_response(response)
                for part in response.iter_raw():
                    _add(body, part, wanted)
    except TimeoutError:
        raise _too_slow(wanted) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        raise _no_answer(client.base_url, error) from error
    return Got(response.status_code, bytes(body), spki)


def _add(body: bytearray, part: bytes, wanted: Get) -> None:
    body += part
    if len(body) > wanted.max_bytes:
        raise VerificationIncomplete(f"{_bare(wanted)}: expected at most {wanted.max_bytes} bytes")


def _too_slow(wanted: Get) -> VerificationIncomplete:
    return VerificationIncomplete(f"{_bare(wanted)}: expected it within {wanted.within_s:g} s")


def _bare(wanted: Get) -> str:
    return wanted.path.partition("?")[0]


def _no_answer(base: httpx2.URL, error: Exception) -> VerificationIncomplete:
    return VerificationIncomplete(f"cannot ask {base}: {reason(error)}")


def reason(error: Exception) -> str:
    """In words: some of these have none of their own. What was no HTTP is not quoted: it may be part
    of an answer."""
    words = str(error)
    if isinstance(error, httpx2.ProtocolError):
        words = words.partition(":")[0]
    return words or type(error).__name__

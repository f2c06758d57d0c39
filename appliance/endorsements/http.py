"""One bounded question to a vendor's server.

What comes back is bytes nobody vouches for. Everything about the exchange has a limit: its time
(the caller's), its size, its tries. Redirects are refused, because an answer from elsewhere is not
what the configuration names; compressed bodies are refused, because their size is not their
length; the environment is not read (no proxies, no `SSL_CERT_FILE`).

A question is repeated when the server could not be reached or says that another time may be better
(429, 5xx): at most twice, with a growing pause, or the one that `Retry-After` asks for if the time
allows it.
"""

from __future__ import annotations

import datetime
import email.utils
import random
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import httpx2
import trio

from appliance.credentials import Secret
from appliance.errors import EndorsementsUnavailable

TRIES = 3

_PAUSE_S = 0.25
"""Before the second try; twice that before the third, each up to as much again at random, so that
a fleet that boots at once does not ask again at once."""

_MAX_RETRY_AFTER_S = 3600
"""What a server's wish is cut to before it is passed on."""

_USER_AGENT = "dcv"


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """A 200 answer, whole.

    Attributes:
        headers: by lowercase name.
    """

    body: bytes
    headers: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Answer({len(self.body)} bytes)"


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """What a vendor's service knows us by.

    Attributes:
        url: of the service, https. Its scheme, host and port are the only ones that get the key.
        header: that carries it, lowercase. value: of the header, whole.
    """

    url: str
    header: str
    value: Secret

    def is_for(self, url: httpx2.URL) -> bool:
        """Whether a question to `url` carries it."""
        ours = httpx2.URL(self.url)
        return url.scheme == "https" and _origin(url) == _origin(ours)


class Vendors(Protocol):
    """Whoever answers questions to vendors: `VendorClient`, or `Offline`."""

    async def get(
        self,
        url: str,
        *,
        what: str,
        seconds: float,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """As `VendorClient.get`."""
        ...

    async def post(
        self, url: str, body: bytes, *, what: str, seconds: float, max_bytes: int, type: str
    ) -> Answer:
        """As `VendorClient.post`."""
        ...


class Offline:
    """Answers no question: `[attestation] endorsements = "offline"`. It has no way to a socket."""

    async def get(
        self,
        url: str,  # noqa: ARG002 - nobody is asked
        *,
        what: str,
        seconds: float,  # noqa: ARG002
        max_bytes: int,  # noqa: ARG002
        headers: Mapping[str, str] | None = None,  # noqa: ARG002
    ) -> Answer:
        """Raises EndorsementsUnavailable."""
        raise EndorsementsUnavailable(f"{what}: not on disk, and [attestation] says offline")

    async def post(
        self,
        url: str,
        body: bytes,  # noqa: ARG002
        *,
        what: str,
        seconds: float,
        max_bytes: int,
        type: str,  # noqa: ARG002
    ) -> Answer:
        """Raises EndorsementsUnavailable."""
        return await self.get(url, what=what, seconds=seconds, max_bytes=max_bytes)


class Patience:
    """Keeps re-attestation, once a minute, from asking a vendor once a minute what it just asked.

    Args:
        seconds: until the same thing may be asked again, whatever came of it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked: dict[str, float] = {}

    def spend(self, what: str) -> None:
        """Note that `what` is asked now.

        Raises:
            EndorsementsUnavailable: it was, too recently.
        """
        now = trio.current_time()
        self._asked = {key: at for key, at in self._asked.items() if now < at + self._seconds}
        if what in self._asked:
            raise EndorsementsUnavailable(f"{what}: asked less than {self._seconds:g} s ago")
        self._asked[what] = now


class VendorClient:
    """Asks vendors' servers; an asynchronous context manager that owns its connections.

    Args:
        tls: whom to believe; None for the operating system's authorities. It only hides what is
            asked: everything that comes back is authenticated by its own signature.
        keys: of services that want one.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, keys: Sequence[ServiceKey] = ()
    ) -> None:
        self._keys = tuple(keys)
        self._client = httpx2.AsyncClient(
            verify=True if tls is None else tls,
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # the caller's deadline covers the whole exchange
            limits=httpx2.Limits(max_connections=16, max_keepalive_connections=4),
            headers={"user-agent": _USER_AGENT, "accept-encoding": "identity"},
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Idle connections need no farewell worth waiting for, and none may hold up a shutdown.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await self._client.__aexit__(kind, error, traceback)

    async def get(
        self,
        url: str,
        *,
        what: str,
        seconds: float,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask for `url` and wait for all of the answer.

        Args:
            url: with `http` or `https`.
            what: is asked for, for messages; no secrets.
            seconds: for the exchange, all tries and pauses together.
            max_bytes: of the body.
            headers: to send besides the usual ones.

        Raises:
            EndorsementsUnavailable: no 200 answer within time and size.
        """
        request = self._request("GET", url, what, headers=headers)
        return await self._ask(request, what, seconds, max_bytes)

    async def post(
        self, url: str, body: bytes, *, what: str, seconds: float, max_bytes: int, type: str
    ) -> Answer:
        """Send `body`, of media type `type`, and wait for all of the answer. As `get` otherwise."""
        request = self._request("POST", url, what, content=body, headers={"content-type": type})
        return await self._ask(request, what, seconds, max_bytes)

    def _request(
        self,
        method: str,
        url: str,
        what: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Request:
        try:
            request = self._client.build_request(method, url, content=content, headers=headers)
            for key in self._keys:
                if key.is_for(request.url):
                    request.headers[key.header] = key.value.reveal()
        except (httpx2.InvalidURL, ValueError):
            raise EndorsementsUnavailable(f"{what}: its configured URL is none") from None
        if request.url.scheme not in ("http", "https") or not request.url.host:
            raise EndorsementsUnavailable(f"{what}: expected an http or https URL")
        return request

    async def _ask(
        self, request: httpx2.Request, what: str, seconds: float, max_bytes: int
    ) -> Answer:
        deadline = trio.current_time() + seconds
        with trio.move_on_at(deadline):
            for tries_left in reversed(range(TRIES)):
                outcome = await self._try(request, what, max_bytes)
                if isinstance(outcome, Answer):
                    return outcome
                pause = _pause(TRIES - tries_left, outcome.retry_after_s)
                if tries_left == 0 or trio.current_time() + pause >= deadline:
                    raise outcome
                await trio.sleep(pause)
        raise EndorsementsUnavailable(f"{what}: {_host(request)} gave no answer in {seconds:g} s")

    async def _try(
        self, request: httpx2.Request, what: str, max_bytes: int
    ) -> Answer | EndorsementsUnavailable:
        """An answer, or a failure that may pass.

        Raises:
            EndorsementsUnavailable: a failure that would only repeat.
        """
        host = _host(request)
        try:
            response = await self._client.send(request, stream=True)
            try:
                status = response.status_code
                if status == 200:
                    return await _read(response, f"{what}: {host}", max_bytes)
                if status == 429 or status >= 500:
                    return EndorsementsUnavailable(
                        f"{what}: {host} answered {status}",
                        retry_after_s=_retry_after_s(response.headers.get("retry-after")),
                    )
            finally:
                # An unread body ends its connection; that must happen even when cancelled.
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await response.aclose()
        except httpx2.HTTPError as error:
            reason = type(error).__name__
            return EndorsementsUnavailable(f"{what}: {host} cannot be asked ({reason})")
        if status == 404:
            raise EndorsementsUnavailable(f"{what}: {host} does not have it")
        if 300 <= status < 400:
            raise EndorsementsUnavailable(f"{what}: {host} sends elsewhere (status {status})")
        raise EndorsementsUnavailable(f"{what}: {host} answered {status}")


async def _read(response: httpx2.Response, what: str, max_bytes: int) -> Answer:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise EndorsementsUnavailable(f"{what} sent a compressed answer, which was not asked for")
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > max_bytes:
            raise EndorsementsUnavailable(f"{what} sent more than {max_bytes} bytes")
        parts.append(part)
    return Answer(b"".join(parts), dict(response.headers))


def _pause(tried: int, wished_s: int | None) -> float:
    pause: float = _PAUSE_S * 2 ** (tried - 1)
    return max(pause * (1 + random.SystemRandom().random()), wished_s or 0)


def _retry_after_s(text: str | None) -> int | None:
    """RFC 9110 section 10.2.3: seconds, or a date; None for anything else."""
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return min(int(text), _MAX_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text)
        left = until - datetime.datetime.now(datetime.UTC)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return None
    return min(max(0, round(left.total_seconds())), _MAX_RETRY_AFTER_S)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port  # of a scheme's own port there is none


def _host(request: httpx2.Request) -> str:
    """Whom we asked, as far as a message may say: no path, no query, no user."""
    return request.url.host

"""`dcv proxy URL`: verification for clients in any language, as a local process.

    client ── HTTP, loopback ── dcv proxy ══ TLS, pinned ══ appliance
                                    └── the steps of `verified`, on every answer

It forwards what it is asked, over `AsyncVerifiedTransport`, and hands on what holds. What does not
is a 502 with an OpenAI error object; in a stream, whose head has gone, an error event and an end
that HTTP calls broken, never `[DONE]`. There is no way around: no verification, no answer.

Whoever reaches the listener may ask, with the key where one was given; so it is on loopback unless
told otherwise, and web pages (requests with an `Origin`) are refused.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

import h11
import httpx2
import trio

from appliance.errors import ApplianceError, VerificationIncomplete
from appliance.log import Log, configure_log
from appliance.verifier.arguments import add_rules, credential
from appliance.verifier.bundle import MAX_CONTENT_BYTES
from appliance.verifier.check import load_rules
from appliance.verifier.fetching import reason
from appliance.verifier.session import CONNECT_S
from appliance.verifier.transport import READ_S, AsyncVerifiedTransport
from appliance.verifier.verdict import EXIT_NOT_CHECKED, Outcome
from appliance.verifier.verified import Accept, streams
from appliance.wire.canonical import JsonObject, canonical_json

DEFAULT_LISTEN = "127.0.0.1:8080"
MAX_AT_ONCE = 64
"""Exchanges; each may keep a request and an answer."""

PLACE_S = 10.0
"""For one of them to end, where all are running."""

IDLE_S = 75.0
HEAD_AND_BODY_S = 60.0
WRITE_S = 60.0
READ_BYTES = 65_536

DROPPED = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"),  # of one hop
        *("transfer-encoding", "content-length", "host", "expect"),
    }
)

Address: TypeAlias = tuple[str, int]


class _ClientGone(Exception):  # noqa: N818  # not an error of ours
    """The local client left, or speaks something else."""


GONE = (_ClientGone, trio.BrokenResourceError, trio.ClosedResourceError)


def add_proxy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `proxy`."""
    proxy = commands.add_parser(
        "proxy",
        help="verify every answer for clients in any language",
        description="Listen on loopback and forward OpenAI requests to an appliance that is verified "
        "first, over the TLS keys that were verified, each answer held against its receipt. What "
        "does not hold is a 502, or in a stream an error event and a broken end. One line of JSON "
        "per verified answer on standard error, without its content.",
        epilog="Exit status: 0 stopped by SIGINT or SIGTERM, 2 bad arguments, files that cannot be "
        "read, or the address is taken.",
    )
    proxy.add_argument("url", metavar="URL", help="https://HOST:8443")
    proxy.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="ADDRESS:PORT", help="default: %(default)s"
    )
    add_rules(proxy)
    proxy.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="the API key to present, instead of what clients send",
    )
    proxy.add_argument(
        "--unsafe-accept-warning",
        action="store_true",
        help="hand on answers under evidence with reservations, whatever they are",
    )
    proxy.set_defaults(command=proxy_command)


def proxy_command(arguments: argparse.Namespace) -> int:
    """`dcv proxy`: until it is stopped."""
    log = configure_log(format="json", level="info", stream=sys.stderr)
    try:
        rules = load_rules(arguments.policy, arguments.reference)
        address = parse_address(arguments.listen)
        headers = {} if arguments.api_key_file is None else credential(arguments.api_key_file)
        accept: Accept = "unsafe_warning" if arguments.unsafe_accept_warning else "affirming"
        transport = AsyncVerifiedTransport(
            arguments.url, rules, accept=accept, on_verified=partial(_note, log)
        )
    except ApplianceError as error:
        log.error("not_started", code=error.code, error=error.message)
        return EXIT_NOT_CHECKED
    return trio.run(partial(_until_stopped, address, transport, headers, log))


def parse_address(text: str) -> Address:
    """`127.0.0.1:8080` or `[::1]:8080`; an address, never a name.

    Raises:
        VerificationIncomplete: not that.
    """
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 16:
        raise VerificationIncomplete(f"--listen: expected ADDRESS:PORT, got {text[:80]}")
    return str(address), number


async def _until_stopped(
    address: Address, transport: AsyncVerifiedTransport, headers: Mapping[str, str], log: Log
) -> int:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            listeners = await trio.open_tcp_listeners(address[1], host=address[0])
        except OSError as error:
            log.error("not_started", error=f"cannot listen: {error.strerror}")
            return EXIT_NOT_CHECKED
        host, port = listeners[0].socket.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            log.warning("listens_beyond_loopback", address=host)
        shown = f"[{host}]" if ":" in host else host
        log.info("listening", url=f"http://{shown}:{port}/v1", appliance=transport.url)
        async with (
            httpx2.AsyncClient(
                transport=transport,
                base_url=transport.url,
                timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
                trust_env=False,
                follow_redirects=False,
            ) as client,
            trio.open_nursery() as nursery,
        ):
            proxy = _Proxy(client, headers, log)
            nursery.start_soon(partial(trio.serve_listeners, proxy.serve, listeners))
            # Nobody has asked yet; what is wrong is better known now.
            nursery.start_soon(proxy.first_look, transport)
            async for number in signals:
                log.info("stopping", signal=signal.Signals(number).name)
                break
            nursery.cancel_scope.cancel()
    return 0


class _Proxy:
    """Every connection's."""

    def __init__(self, client: httpx2.AsyncClient, headers: Mapping[str, str], log: Log) -> None:
        self._client, self._headers, self._log = client, headers, log
        self._places = trio.CapacityLimiter(MAX_AT_ONCE)

    async def first_look(self, transport: AsyncVerifiedTransport) -> None:
        """Verify before the first request. That it fails is said, and tried again for each."""
        try:
            await transport.verify()
        except ApplianceError as error:
            self._refused(error, "/")

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection, to its end; however it ends, it ends alone."""
        connection = _Connection(stream)
        async with stream:
            try:
                while await self._exchange(connection):
                    connection.next()
            except GONE:
                return

    async def _exchange(self, connection: _Connection) -> bool:
        """One request and its answer; whether there may be another."""
        head = await connection.head()
        if head is None:
            return False
        with trio.move_on_after(HEAD_AND_BODY_S) as in_time:
            body = await connection.body()
        if in_time.cancelled_caught:
            return False
        problem = _refusal(head, body)
        if problem is not None or body is None:
            await connection.whole(*(problem or (413, _error("request_too_large", "too large"))))
            return False
        return await self._forward(connection, head, body)

    async def _forward(self, connection: _Connection, head: h11.Request, body: bytes) -> bool:
        """Given up where the client leaves meanwhile, so that the appliance ends its generation."""
        another = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.cancel_when_gone, nursery.cancel_scope)
            with suppress(*GONE):
                another = await self._in_turn(connection, head, body)
            nursery.cancel_scope.cancel()
        return another

    async def _in_turn(self, connection: _Connection, head: h11.Request, body: bytes) -> bool:
        with trio.move_on_after(PLACE_S) as in_time:
            await self._places.acquire()
        if in_time.cancelled_caught:
            problem = _error("overloaded", f"{MAX_AT_ONCE} exchanges are running")
            await connection.whole(503, problem, again=True)
            return True
        try:
            return await self._answer(connection, head, body)
        finally:
            self._places.release()

    async def _answer(self, connection: _Connection, head: h11.Request, body: bytes) -> bool:
        path = head.target.decode("ascii")
        try:
            request = self._client.build_request(
                head.method.decode("ascii"), path, content=body or None, headers=self._onward(head)
            )
        except httpx2.InvalidURL:
            await connection.whole(400, _error("invalid_request", "expected a path"))
            return True
        try:
            response = await self._client.send(request, stream=True)
        except (ApplianceError, httpx2.RequestError) as error:
            await connection.whole(502, self._refused(error, path))
            return True
        try:
            await connection.begin(response.status_code, _kept(response))
            try:
                async for part in response.aiter_raw():
                    await connection.part(part)
            except (ApplianceError, httpx2.RequestError) as error:
                problem = self._refused(error, path)
                if streams(response):
                    # What was handed on may end between an event's line and its blank one.
                    await connection.part(b"\n\ndata: " + problem + b"\n\n")
                return False  # and no end: what came is not an answer
            await connection.end()
            return True
        finally:
            with trio.move_on_after(CONNECT_S, shield=True):
                await response.aclose()

    def _onward(self, head: h11.Request) -> list[tuple[bytes, bytes]]:
        """As bytes: what a client says of itself needs not be ASCII."""
        replaced = DROPPED | {name.lower() for name in self._headers}
        kept = [
            (name, value) for name, value in head.headers if name.decode("ascii") not in replaced
        ]
        own = [
            (name.encode("ascii"), value.encode("ascii")) for name, value in self._headers.items()
        ]
        return [*kept, *own]

    def _refused(self, error: Exception, path: str) -> bytes:
        """Said on standard error, and as the client is told."""
        ours = isinstance(error, ApplianceError)
        code = error.code if isinstance(error, ApplianceError) else "appliance_unreachable"
        message = error.message if isinstance(error, ApplianceError) else reason(error)
        self._log.error("refused", path=path.partition("?")[0][:128], code=code, error=message)
        return _error(code, message, about="the appliance was not verified: " if ours else "")


class _Connection:
    """HTTP/1.1 with one local client."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER)

    async def head(self) -> h11.Request | None:
        """None where the client leaves, or says nothing for too long."""
        with trio.move_on_after(IDLE_S):
            event = await self._event()
            return event if isinstance(event, h11.Request) else None
        return None

    async def body(self) -> bytes | None:
        """None where it is too large; the rest of it is not read then."""
        body = bytearray()
        if self._http.they_are_waiting_for_100_continue:
            await self._send(
                h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            )
        while True:
            event = await self._event()
            if isinstance(event, h11.EndOfMessage):
                return bytes(body)
            if not isinstance(event, h11.Data):
                raise _ClientGone
            body += event.data
            if len(body) > MAX_CONTENT_BYTES:
                return None

    async def cancel_when_gone(self, scope: trio.CancelScope) -> None:
        """Watch for the client's end of the connection, without taking what it sends on."""
        with suppress(OSError):  # such as a reset
            if await self._stream.socket.recv(1, socket.MSG_PEEK):
                return  # the next request; of one that pipelines, writing shows when it has left
        scope.cancel()

    async def whole(self, status: int, body: bytes, *, again: bool = False) -> None:
        """An answer of our own; `again` where another try may succeed."""
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if not again:  # the openai package would try, and again be refused
            headers.append(("x-should-retry", "false"))
        await self._send(h11.Response(status_code=status, headers=headers))
        await self.part(body)
        await self.end()

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send(h11.Response(status_code=status, headers=headers))

    async def part(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    def next(self) -> None:
        """Raises: _ClientGone: there is no next request on this connection."""
        try:
            self._http.start_next_cycle()
        except h11.ProtocolError:
            raise _ClientGone from None

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError:
                raise _ClientGone from None
            if event is not h11.NEED_DATA:
                assert not isinstance(event, type) or event is h11.PAUSED
                return event
            self._http.receive_data(bytes(await self._stream.receive_some(READ_BYTES)))

    async def _send(self, event: h11.Event) -> None:
        try:
            data = self._http.send(event) or b""
        except h11.LocalProtocolError:
            raise _ClientGone from None
        with trio.move_on_after(WRITE_S) as in_time:
            await self._stream.send_all(data)
        if in_time.cancelled_caught:
            raise _ClientGone


def _refusal(head: h11.Request, body: bytes | None) -> tuple[int, bytes] | None:
    """Status and body, of what is not forwarded."""
    if head.http_version != b"1.1":  # before it, a stream that breaks off looks like one that ends
        return 505, _error("http_version", "expected HTTP/1.1")
    if any(name == b"origin" for name, _ in head.headers):
        return 403, _error("origin_refused", "web pages may not ask in your name")
    if not re.fullmatch(rb"/(?!/)[!-~]*", head.target):  # behind two slashes would be a host
        return 400, _error("invalid_request", "expected a path")
    if body is None:
        return 413, _error("request_too_large", f"expected at most {MAX_CONTENT_BYTES} bytes")
    return None


def _kept(response: httpx2.Response) -> list[tuple[bytes, bytes]]:
    return [
        (name, value)
        for name, value in response.headers.raw
        if name.lower().decode("latin-1") not in DROPPED
    ]


def _error(code: str, message: str, *, about: str = "") -> bytes:
    error: JsonObject = {
        "message": about + message,
        "type": "server_error",
        "param": None,
        "code": code,
    }
    return canonical_json({"error": error})


def _note(log: Log, outcome: Outcome) -> None:
    """One line: what was verified, and nothing that was said."""
    parts = outcome.claims.get("submods")
    receipt = parts.get("receipt") if isinstance(parts, dict) else None
    verdict = None if outcome.verdict is None else outcome.verdict.value
    checks = sorted({placed.finding.check for placed in outcome.findings})
    if not isinstance(receipt, dict):
        keyset = outcome.claims.get("workload_keyset_digest")
        log.info("appliance_verified", verdict=verdict, keyset_digest=keyset, reservations=checks)
        return
    told = {name: receipt.get(name) for name in ("receipt_id", "outcome", "model", "bytes")}
    log.info("answer_verified", verdict=verdict, **told, reservations=checks)

"""TLS on an accepted connection: nothing is lost or reordered, whoever is cancelled when."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
import trustme

from appliance.web.tls import TlsStream

DEADLINE_S = 60.0
MIB = 1 << 20

ClientTls = trio.SSLStream[trio.SocketStream]


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    server.set_alpn_protocols(["h2", "http/1.1"])
    client = ssl.create_default_context()
    client.set_alpn_protocols(["http/1.1"])
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[TlsStream, ClientTls]]:
    """Both ends after the handshake; the server's first."""
    server_context, client_context = contexts()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    server = TlsStream(ours, server_context)
    client = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(theirs)),
        client_context,
        server_hostname="localhost",
    )
    try:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                await client.do_handshake()
            yield server, client
    finally:
        server.close()
        await trio.aclose_forcefully(client)


async def read_exactly(stream: TlsStream | ClientTls, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.receive_some(65_536)
        assert part, f"the end after {len(data)} bytes"
        data += part
    return data


async def test_both_sides_hear_each_other_and_know_the_protocol() -> None:
    async with connected() as (server, client):
        assert server.selected_alpn_protocol() == "http/1.1"
        assert server.send_now(b"at once")
        assert await read_exactly(client, 7) == b"at once"
        await client.send_all(b"and back")
        assert await server.receive_some(3) == b"and"
        assert await server.receive_some(100) == b" back"


async def test_a_reader_that_is_cancelled_again_and_again_misses_no_byte() -> None:
    data = random.Random(1).randbytes(MIB)
    received = bytearray()
    async with connected() as (server, client), trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, data)
        scopes = [trio.CancelScope()]

        async def interrupt() -> None:
            while len(received) < len(data):
                scopes[-1].cancel()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(interrupt)
        while len(received) < len(data):
            with scopes[-1]:
                received += await server.receive_some(1000)
            scopes.append(trio.CancelScope())
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_what_the_kernel_does_not_take_at_once_arrives_whole_and_in_order() -> None:
    parts = [random.Random(number).randbytes(200_000) for number in range(10)]
    async with connected() as (server, client), trio.open_nursery() as nursery:
        taken = [server.send_now(part) for part in parts[:5]]
        assert not all(taken)
        for part in parts[5:]:
            with trio.CancelScope() as scope:
                scope.cancel()
                await server.send_all(part)  # encrypted, and not waited for
        nursery.start_soon(server.send_all, b"the end")
        data = await read_exactly(client, 2_000_000 + 7)
    assert data == b"".join(parts) + b"the end"


async def test_many_writers_share_a_connection_that_is_read_slowly() -> None:
    async with connected() as (server, client), trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(server.send_all, bytes([number]) * 50_000)
        data = await read_exactly(client, 1_000_000)
    # One write is never inside another.
    starts = [data[at] for at in range(0, len(data), 50_000)]
    assert data == b"".join(bytes([number]) * 50_000 for number in starts)
    assert sorted(starts) == list(range(20))


@pytest.mark.parametrize("polite", [True, False])
async def test_the_peers_end_is_an_end_with_a_goodbye_or_without(*, polite: bool) -> None:
    async with connected() as (server, client), trio.open_nursery() as nursery:
        # So that nothing is left unread: the end would else be a reset.
        await server.send_all(b"x")
        assert await client.receive_some(1) == b"x"
        if polite:
            nursery.start_soon(client.aclose)
        else:
            client.transport_stream.socket.close()
        assert await server.receive_some(100) == b""


async def test_our_goodbye_is_heard_though_the_peer_still_sends() -> None:
    async with connected() as (server, client), trio.open_nursery() as nursery:
        await client.send_all(b"still talking")
        await server.goodbye()
        assert await client.receive_some(100) == b""
        nursery.start_soon(server.drop_rest)
        await client.transport_stream.send_all(bytes(100_000))
        client.transport_stream.socket.close()


async def test_what_is_no_tls_breaks_the_connection() -> None:
    server_context, _ = contexts()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server = TlsStream(ours, server_context)
    theirs.send(b"GET / HTTP/1.1\r\n\r\n")
    with trio.fail_after(DEADLINE_S), pytest.raises(trio.BrokenResourceError):
        await server.do_handshake()
    server.close()
    theirs.close()
    async with connected() as (server, client):
        await client.transport_stream.send_all(b"\x17\x03\x03\x00\x05hello")
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some(100)


async def test_closing_wakes_whoever_waits_and_stays_closed() -> None:
    async with connected() as (server, _):

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await server.receive_some(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            server.close()
            server.close()
        for use in (server.send_all(b"x"), server.receive_some(1), server.goodbye()):
            with pytest.raises(trio.ClosedResourceError):
                await use
        with pytest.raises(trio.ClosedResourceError):
            server.send_now(b"x")

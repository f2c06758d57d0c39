"""TLS on an accepted connection: OpenSSL between two buffers and a socket, without layers.

Trio's own SSLStream does the same over any stream, and locks, checkpoints and retries for what
may go wrong with any. Here there is one kind of stream, one task reads, and what the kernel does
not take at once is kept in order. So a token goes out in three calls: encrypt, fetch, send
(docs/adr/0011).

Errors are Trio's: BrokenResourceError where the peer is gone or speaks no TLS, ClosedResourceError
where we have closed.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl

import trio

RECEIVE_BYTES = 1 << 16


class TlsStream:
    """One connection, from its handshake on.

    What is encrypted leaves in that order, whichever task encrypted it; a task that is cancelled
    while it waits for the kernel takes nothing with it. `send_all` may be called by any task,
    `receive_some` by one at a time, `close` by any at any time.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Take over a connected, non-blocking socket."""
        self._socket = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = b""  # encrypted, and not taken by the kernel yet
        self._waiting = trio.Lock()  # only one task waits for the kernel, it sends for all
        self._closed = False

    async def do_handshake(self) -> None:
        """Shake hands.

        Raises:
            BrokenResourceError, ClosedResourceError: the peer is gone, or it failed.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                with contextlib.suppress(trio.BrokenResourceError):
                    self._push()  # the alert that says why
                raise trio.BrokenResourceError from error
            else:
                await self._flush()
                return

    def selected_alpn_protocol(self) -> str | None:
        """What was agreed on in the handshake."""
        return self._tls.selected_alpn_protocol()

    def send_now(self, data: bytes) -> bool:
        """Encrypt and send; whether the kernel took it all. If not, `send_all` sends the rest.

        Raises:
            BrokenResourceError, ClosedResourceError: the connection is gone.
        """
        self._encrypt(data)
        return self._push()

    async def send_all(self, data: bytes) -> None:
        """Encrypt and send, behind what is on its way; after a cancellation the rest leaves with
        what is sent next.

        Args:
            data: empty to send the rest of what was encrypted before.

        Raises:
            BrokenResourceError, ClosedResourceError: the connection is gone.
        """
        self._encrypt(data)
        await self._flush()

    async def receive_some(self, max_bytes: int) -> bytes:
        """What the peer says next; b"" at its end, with a goodbye or without. Cancelled, it has
        taken nothing.

        Raises:
            BrokenResourceError, ClosedResourceError: the connection is gone, or what came is not
                TLS.
        """
        while True:
            self._must_be_open()
            try:
                data = self._tls.read(max_bytes)
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as error:
                raise trio.BrokenResourceError from error
            else:
                return data  # no checkpoint from here on: a cancellation must not take it along
            # What came may want an answer of TLS itself, such as a new key.
            await self._flush()
            await self._fill()

    async def goodbye(self) -> None:
        """Tell the peer that nothing more will come, without waiting for its own goodbye.

        Raises:
            BrokenResourceError, ClosedResourceError: the connection is gone.
        """
        self._must_be_open()
        # It says goodbye and then looks for the peer's, which need not be there yet.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()

    async def drop_rest(self) -> None:
        """End our side of the connection, then read and drop until the peer ends its own.

        Raises:
            BrokenResourceError, ClosedResourceError: the connection is gone.
        """
        self._must_be_open()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        while await self._receive():
            pass

    def close(self) -> None:
        """Close the socket, whoever uses it. Idempotent."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def _encrypt(self, data: bytes) -> None:
        self._must_be_open()
        try:
            if data:
                self._tls.write(data)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError from error

    def _push(self) -> bool:
        """Hand the kernel what is encrypted; whether it took all of it."""
        data = self._outgoing.read()
        if self._unsent:
            data = self._unsent + data
        elif not data:
            return True
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._gone(error) from error
        self._unsent = data[sent:] if sent < len(data) else b""
        return not self._unsent

    async def _flush(self) -> None:
        """Wait until the kernel has taken everything; nothing is lost by cancelling."""
        self._must_be_open()
        if self._push():
            return
        async with self._waiting:
            while not self._push():
                await trio.lowlevel.wait_writable(self._socket)

    async def _fill(self) -> None:
        """Take what the peer sent next, or its end."""
        data = await self._receive()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._gone(error) from error

    def _must_be_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the connection was closed here")

    def _gone(self, error: OSError) -> Exception:
        if self._closed or error.errno == errno.EBADF:
            return trio.ClosedResourceError("the connection was closed here")
        return trio.BrokenResourceError("the connection is gone")

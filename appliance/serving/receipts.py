"""Receipts, kept: found at once, on disk soon, there after a restart, gone in time.

    begin, add, … ── memory ── every 20 ms, in a thread ── SQLite (WAL)
                        └───────────── find ─────────────────┘

What is added is found from that moment on, in memory until it is on disk; nothing an exchange
does waits for the disk. When an exchange begins, a row is written that says only so. If the
service is killed, that row is what the next start finds: the receipt is lost, and telling so is
all that is left to do.

How durable: a batch that was committed survives a SIGKILL of the service. A power failure may
take the last ones; it takes the keys and every open exchange, too, and commits are not synced for
that reason. No row holds a prompt or a completion: a receipt has digests, evidence is the
hardware's.

A disk that is full, read-only or broken is no reason to stop answering: the newest receipts are
kept in memory, within a bound, until writing works again. A database that is damaged is renamed,
for whoever wants to look at it, and a new one begun. Each says so in one line of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from appliance.errors import Overloaded, ReceiptLost, RouteNotFound
from appliance.log import Log
from appliance.serving.epochs import Epoch
from appliance.serving.receipt_database import (
    Batch,
    Begun,
    DiskFails,
    ReceiptDatabase,
    ReceiptLimits,
    SignedReceipt,
    epoch_bytes,
    epoch_json,
)
from appliance.wire.canonical import canonical_json
from appliance.wire.encoding import encode_base64

BATCH_S = 0.02
"""Between two batches: what is added meanwhile shares one commit and one trip to the thread."""

RETRY_S = 5.0
"""Between two attempts while the disk fails."""

FLUSH_S = 5.0
"""For the last batch, when the service ends."""

MAX_ID = 256
"""Characters of an id that is looked up; ours are shorter."""

_T = TypeVar("_T")


class ReceiptStore:
    """The receipts of one state directory; one process at a time.

    `run` is its task: it opens the database, writes, and flushes when cancelled, so it is ended
    after the last exchange. The methods that add are synchronous and take microseconds.

    Args:
        folder: created if it is missing, for this user alone.
        now: Unix seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        now: Callable[[], float],
        log: Log,
        limits: ReceiptLimits | None = None,
    ) -> None:
        self._limits = limits or ReceiptLimits()
        self._now = now
        self._log = log
        self._database = ReceiptDatabase(folder, self._limits, now, log)
        # One thread at a time touches the database, in the order of the calls.
        self._turn = trio.CapacityLimiter(1)
        self._pending = Batch()
        self._writing = Batch()
        self._memory_bytes = 0
        self._dropped = 0
        # Exchanges of this run that have no receipt yet, under both names.
        self._open: dict[str, Begun] = {}
        self._open_chats: dict[str, str] = {}
        self._added = 0
        self._written = 0
        self._failing = False
        self._wanted = trio.Event()
        self._attempted = trio.Event()

    # ------------------------------------------------------------------------------- adding

    def begin(self, receipt_id: str, *, chat_id: str | None, tenant: str) -> None:
        """An exchange is open: until `add` or `forget` there is no receipt of this id."""
        begun = Begun(receipt_id, chat_id, tenant, self._now())
        self._open[receipt_id] = begun
        if chat_id is not None:
            self._open_chats[chat_id] = receipt_id
        self._pending.begun[receipt_id] = begun
        self._change()

    def forget(self, receipt_id: str) -> None:
        """The exchange leaves no receipt after all."""
        self._close(receipt_id)
        if self._pending.begun.pop(receipt_id, None) is None:  # its row is written, or about to be
            self._pending.forgotten.add(receipt_id)
            self._change()

    def add(self, receipt: SignedReceipt) -> None:
        """Keep a finished receipt, whether its exchange was begun here or not."""
        self._close(receipt.receipt_id)
        self._pending.begun.pop(receipt.receipt_id, None)
        self._pending.finished[receipt.receipt_id] = (receipt, self._now())
        self._memory_bytes += len(receipt.data)
        self._change()

    def add_epoch(self, epoch: Epoch) -> None:
        """Keep an epoch's evidence as long as receipts cite it; before the first of them ends."""
        if epoch.evidence_digest not in self._pending.epochs:
            self._pending.epochs[epoch.evidence_digest] = epoch
            self._memory_bytes += epoch_bytes(epoch)
            self._change()

    def add_report(self, keyset_digest: bytes, report: bytes) -> None:
        """Keep a keyset's null-form report as long as receipts cite the keyset."""
        self._pending.reports[keyset_digest] = report
        self._memory_bytes += len(report)
        self._change()

    def _close(self, receipt_id: str) -> None:
        begun = self._open.pop(receipt_id, None)
        if begun is not None and begun.chat_id is not None:
            self._open_chats.pop(begun.chat_id, None)

    def _change(self) -> None:
        self._added += 1
        self._wanted.set()
        self._bound_memory()

    def _bound_memory(self) -> None:
        while self._memory_bytes > self._limits.max_memory_bytes and self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        """Give up one thing that waits; False when nothing of size is left."""
        waiting = self._pending
        if waiting.finished:
            receipt, _ = waiting.finished.pop(next(iter(waiting.finished)))
            self._memory_bytes -= len(receipt.data)
        elif waiting.epochs:
            self._memory_bytes -= epoch_bytes(waiting.epochs.pop(next(iter(waiting.epochs))))
        else:
            return False
        if self._dropped == 0:
            self._log.error("receipts_dropped", why="memory is full while the disk fails")
        self._dropped += 1
        return True

    # ------------------------------------------------------------------------------- finding

    async def find(self, identifier: str, tenant: str) -> bytes:
        """A receipt by its id, or by that of the answer it is about.

        Raises:
            RouteNotFound: there is none, its exchange still runs, or it is another tenant's.
            ReceiptLost: the service was killed while the exchange ran.
            Overloaded: it may be on a disk that cannot be read now.
        """
        if not (
            0 < len(identifier) <= MAX_ID and identifier.isascii() and identifier.isprintable()
        ):
            raise _not_found()
        for receipt, _ in self._in_memory():
            if receipt.tenant == tenant and identifier in (receipt.receipt_id, receipt.chat_id):
                return receipt.data
        if identifier in self._open or identifier in self._open_chats:
            raise _not_found()
        found = await self._read(partial(self._database.find, identifier, tenant))
        if found is None:
            raise _not_found()
        if found.body is None:
            if any(found.receipt_id in batch.forgotten for batch in (self._pending, self._writing)):
                raise _not_found()
            raise ReceiptLost("the service was killed while this exchange was open")
        return found.body

    async def find_epoch(self, evidence_digest: bytes, tenant: str) -> bytes:
        """An epoch's evidence, for a tenant with a receipt that cites it.

        Raises:
            RouteNotFound: there is none, or no receipt of the tenant's cites it.
            Overloaded: it may be on a disk that cannot be read now.
        """
        cited = any(
            receipt.tenant == tenant and evidence_digest in receipt.evidence
            for receipt, _ in self._in_memory()
        )
        for batch in (self._pending, self._writing):
            if cited and (epoch := batch.epochs.get(evidence_digest)) is not None:
                return canonical_json(epoch_json(epoch, encode_base64))
        reader = partial(self._database.find_epoch, evidence_digest, None if cited else tenant)
        found = await self._read(reader)
        if found is None:
            raise _not_found()
        return found

    async def find_report(self, keyset_digest: bytes) -> bytes | None:
        """The null-form report of a keyset, earlier starts of the service included.

        Raises:
            Overloaded: it may be on a disk that cannot be read now.
        """
        for batch in (self._pending, self._writing):
            if (report := batch.reports.get(keyset_digest)) is not None:
                return report
        return await self._read(partial(self._database.find_report, keyset_digest))

    def _in_memory(self) -> Iterator[tuple[SignedReceipt, float]]:
        yield from self._pending.finished.values()
        yield from self._writing.finished.values()

    async def _read(self, work: Callable[[], _T]) -> _T:
        try:
            return await self._in_thread(work)
        except DiskFails:
            raise Overloaded("receipts cannot be read from disk now", retry_after_s=5) from None

    # ------------------------------------------------------------------------------- writing

    async def written(self) -> None:
        """Wait until what was added so far would survive a SIGKILL, or the disk fails; the deadline
        is the caller's."""
        wanted = self._added
        while self._written < wanted and not self._failing:
            await self._attempted.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the database, say so, and write until cancelled; then write what is left.

        Raises nothing on account of the disk.
        """
        try:
            await self._write()
            task_status.started()
            while True:
                await trio.sleep(RETRY_S if self._failing else BATCH_S)
                await self._wanted.wait()
                await self._write()
        finally:
            with trio.move_on_after(FLUSH_S, shield=True):
                await self._write()
                await self._in_thread(self._database.close)
            if self._pending or self._writing:
                left = len(self._pending.finished) + len(self._writing.finished)
                self._log.error("receipts_not_written", receipts=left)

    async def _write(self) -> None:
        """Write all that waits, or keep it for the next time."""
        # What a cancelled attempt left may be on disk or not: it is written once more.
        batch = self._writing.with_later(self._pending)
        self._writing, self._pending, self._wanted = batch, Batch(), trio.Event()
        added = self._added
        try:
            await self._in_thread(partial(self._database.write, batch))
        except DiskFails:
            self._failing = True
            # Back in line, so that the bound on memory sees all of it.
            self._pending, self._writing = batch.with_later(self._pending), Batch()
            self._wanted.set()
        else:
            self._failing, self._dropped, self._written = False, 0, added
            self._writing = Batch()
        self._memory_bytes = self._pending.size
        self._bound_memory()
        self._attempted.set()
        self._attempted = trio.Event()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        # Abandoned when cancelled: a disk that hangs must not hold up the end of the service.
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._turn)


def _not_found() -> RouteNotFound:
    # The same words whatever the reason: which ids exist is for their tenant alone.
    return RouteNotFound("there is no such receipt, or it is not yours, or it is not ready")


__all__ = ["ReceiptLimits", "ReceiptStore", "SignedReceipt"]

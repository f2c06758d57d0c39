"""Fresh GPU evidence for everybody who waits, at the pace of the device.

A GPU takes a while for a report and makes one at a time. So whoever comes while it is busy waits
for the next **epoch**: one Merkle tree over the commitments of all who wait, one collection whose
nonce commits to its root, one appraisal; then all of them go on, each with the path from its own
leaf (protocol.md section 2). An epoch is closed the moment the device is free, so nobody waits
for two whole collections. Only after an idle time is it left open for those who come just then.

    device      │ collect 1          │ collect 2          │ collect 3
    appraisal                        │ 1 │                │ 2 │
    members                              │ 1 go on            │ 2 go on

What `run` starts is all that talks to the device. Who waits may be cancelled at any moment: before
the epoch is formed it leaves no leaf, afterwards its leaf stays and nobody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from appliance.errors import (
    ApplianceError,
    AttesterError,
    AttesterUnavailable,
    EvidenceError,
    Overloaded,
)
from appliance.log import Log
from appliance.rats.result import AttestationResult
from appliance.wire.commitments import Inclusion, Kind, epoch_nonce, gpu_evidence_digest
from appliance.wire.evidence import GpuEvidence
from appliance.wire.merkle import MAX_LEAVES, MerkleTree

T = TypeVar("T")

MAX_WAITING = 8 * MAX_LEAVES
"""Members in line; far beyond what stands there. A request that is refused leaves it at once, and
one that is read, or waits for its place, is in a bounded line for that."""

GATHER_TURNS = 8
"""Of the event loop in which nobody came, until an epoch after an idle time is closed. A request
whose bytes are there takes six to stand in line; for one that is alone they are 0.2 ms."""

GATHER_SHARE = 0.5
"""Of what the last collection took, at most, for as long as others come."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """One collection of GPU evidence that was appraised and not contraindicated.

    Attributes:
        keyset_digest: 32 bytes, the keyset's that was current.
        evidence_digest: 32 bytes, over `gpus`.
        collected_at: Unix seconds.
    """

    keyset_digest: bytes
    tree: MerkleTree
    gpus: tuple[GpuEvidence, ...]
    result: AttestationResult
    evidence_digest: bytes
    collected_at: float

    @property
    def nonce(self) -> bytes:
        """What every report in `gpus` carries, 32 bytes."""
        return epoch_nonce(self.keyset_digest, self.tree.size, self.tree.root)


@dataclass(frozen=True, slots=True)
class Attested:
    """A member's share of an epoch."""

    epoch: Epoch
    inclusion: Inclusion


@dataclass(slots=True, eq=False)
class Member:
    """Somebody in line for the next epoch, or in the one that is being formed."""

    kind: Kind
    commitment: bytes
    settled: trio.Event = field(default_factory=trio.Event)
    attested: Attested | None = None
    error: ApplianceError | None = None

    def settle(self, attested: Attested | None, error: ApplianceError | None) -> None:
        """Tell it what its wait came to."""
        self.attested, self.error = attested, error
        self.settled.set()

    async def wait(self) -> Attested:
        """Wait for the share; cancelled, it can be waited for again.

        Raises:
            AttesterError, EvidenceError: as `Epochs.join`.
        """
        await self.settled.wait()
        if self.error is not None:
            raise self.error
        assert self.attested is not None
        return self.attested


Collect = Callable[[bytes, Callable[[], None]], Awaitable[tuple[GpuEvidence, ...]]]
Appraise = Callable[[tuple[GpuEvidence, ...], bytes], Awaitable[AttestationResult]]


class Epochs:
    """Forms epochs, one after the other.

    Args:
        collect: evidence of every GPU over a 32-byte nonce; raises AttesterError. Calls what it is
            given besides once the device has been asked.
        appraise: the verdict on it; raises EvidenceError where it does not hold.
        keyset_digest: the current one, 32 bytes.
        deadline_s: of one collection and its appraisal.
        failures: collections that may fail in a row.
        withdraw: told when the appliance must not go on: evidence that does not hold, at once;
            a device that fails, after `failures`.
        now: Unix seconds.
    """

    def __init__(
        self,
        *,
        collect: Collect,
        appraise: Appraise,
        keyset_digest: Callable[[], bytes],
        deadline_s: float,
        failures: int,
        withdraw: Callable[[ApplianceError], None],
        now: Callable[[], float],
        log: Log,
    ) -> None:
        self._collect = collect
        self._appraise = appraise
        self._keyset_digest = keyset_digest
        self._deadline_s = deadline_s
        self._failures_allowed = failures
        self._withdraw = withdraw
        self._now = now
        self._log = log
        self._waiting: list[Member] = []
        self._wanted = trio.Event()
        self._asked = trio.Event()  # unset while the next epoch is left open for who comes
        self._asked.set()
        self._running = trio.CancelScope()  # of `run`
        self._settling = trio.Lock()  # in the order in which they were collected
        self._ended: ApplianceError | None = None
        self._collection_s = 0.0  # what the last one took
        self.failures = 0
        self.count = 0
        self.last: Epoch | None = None

    @property
    def ended(self) -> ApplianceError | None:
        """Why there will be no further epoch; None while there will."""
        return self._ended

    @property
    def waiting(self) -> int:
        """Members of the next epoch so far."""
        return len(self._waiting)

    async def join(self, kind: Kind, commitment: bytes) -> Attested:
        """Wait for evidence that covers a commitment; its deadline is the caller's.

        Raises:
            AttesterError: this epoch's collection failed; another try may succeed.
            EvidenceError: the evidence does not hold; the appliance is withdrawing.
            Overloaded: too many wait.
        """
        member = self.enter(kind, commitment)
        try:
            return await member.wait()
        except trio.Cancelled:
            self.leave(member)
            raise

    def enter(self, kind: Kind, commitment: bytes) -> Member:
        """Stand in line, for whoever cannot wait in one go; `leave` ends that at any time.

        Raises:
            AttesterError, EvidenceError: there will be no further epoch.
            Overloaded: too many wait.
        """
        if self._ended is not None:
            raise self._ended
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded("too many are waiting for evidence", retry_after_s=1)
        member = Member(kind, commitment)
        self._waiting.append(member)
        self._wanted.set()
        return member

    async def make_way(self) -> None:
        """For a member: let those who come in the same moment stand in line first. Where the device
        is idle and about to be asked, this waits until it has been: `GATHER_SHARE` of a collection
        at most, and as long as the question takes to be sent, or to fail by its own deadline."""
        if not self._asked.is_set():
            await self._asked.wait()

    def leave(self, member: Member) -> None:
        """No longer wait, if it still does. Idempotent."""
        if not member.settled.is_set() and member in self._waiting:
            self._waiting.remove(member)

    def reuse(self, kind: Kind, *, unsafe_max_age_s: float) -> Attested | None:
        """The last epoch, for somebody whose commitment it does not cover, if it is not older than
        this; None if it is, or if the keyset has changed. The share says so: it has no leaf."""
        epoch = self.last
        if epoch is None or not self.age_s() <= unsafe_max_age_s or self._ended is not None:
            return None
        if epoch.keyset_digest != self._keyset_digest():
            return None
        inclusion = Inclusion(
            kind=kind,
            keyset_digest=epoch.keyset_digest,
            tree_size=epoch.tree.size,
            leaf_index=None,
            path=None,
            root=epoch.tree.root,
        )
        return Attested(epoch, inclusion)

    async def run(self) -> None:
        """Form epochs until cancelled, or until the appliance must withdraw."""
        try:
            async with trio.open_nursery() as nursery:
                self._running = nursery.cancel_scope
                while self._ended is None:
                    if not self._waiting:
                        self._wanted = trio.Event()
                        if self._asked.is_set():
                            self._asked = trio.Event()
                        await self._wanted.wait()
                        await self._gather()
                    members = self._waiting[:MAX_LEAVES]
                    if members:  # else who set the event left again
                        del self._waiting[: len(members)]
                        # Until the device is free: the rest goes on beside the next epoch.
                        await nursery.start(self._serve, members)
        finally:
            self._let_go(_ending() if self._ended is None else self._ended)

    async def _gather(self) -> None:
        """The device is idle: wait for those who come at the same moment as the first.

        Else he alone is in the first epoch, and of a burst everybody but him waits for two.
        """
        until = trio.current_time() + GATHER_SHARE * self._collection_s
        turns = 0
        while turns < GATHER_TURNS and trio.current_time() < until:
            before = len(self._waiting)
            await trio.lowlevel.checkpoint()
            turns = 0 if len(self._waiting) > before else turns + 1

    async def _serve(self, members: list[Member], *, task_status: trio.TaskStatus[None]) -> None:
        """One epoch, for members who may be gone when it ends; tells when the device is free."""
        epoch = None
        error: ApplianceError | None = None
        try:
            epoch = await self._form(members, task_status.started)
        except AttesterError as failure:
            error = self._count_failure(failure)
        except EvidenceError as failure:
            self._end(failure)
            error = failure
        finally:
            if epoch is None and error is None:  # cancelled, or a defect
                error = _ending() if self._ended is None else self._ended
            for index, member in enumerate(members):
                share = None
                if epoch is not None:
                    share = Attested(epoch, _inclusion(epoch, member, index))
                member.settle(share, error)

    async def _form(self, members: list[Member], device_is_free: Callable[[], None]) -> Epoch:
        # 1. The tree, and the nonce over its root.
        tree = MerkleTree.over([member.commitment for member in members])
        keyset_digest = self._keyset_digest()
        nonce = epoch_nonce(keyset_digest, tree.size, tree.root)
        # 2. Every GPU's evidence over it.
        began = trio.current_time()
        collect = partial(self._collect, nonce, self._asked.set)
        try:
            gpus = await self._in_time(began + self._deadline_s, collect)
        except (AttesterError, EvidenceError):
            self._asked.set()
            async with self._settling:  # counted after the epochs before it
                device_is_free()
                await trio.lowlevel.checkpoint_if_cancelled()  # one of them may have ended it all
                raise
        self._asked.set()
        self._collection_s = trio.current_time() - began
        collected_at = self._now()
        # 3. Appraised, behind the epochs before it, before anybody goes on. What those take is not
        #    of this one's time.
        async with self._settling:
            device_is_free()
            await trio.lowlevel.checkpoint_if_cancelled()
            deadline = trio.current_time() + self._deadline_s - self._collection_s
            result = await self._in_time(deadline, partial(self._appraise, gpus, nonce))
            result.require()
            epoch = Epoch(
                keyset_digest=keyset_digest,
                tree=tree,
                gpus=gpus,
                result=result,
                evidence_digest=gpu_evidence_digest(gpus),
                collected_at=collected_at,
            )
            self.failures = 0
            self.count += 1
            self.last = epoch
        return epoch

    async def _in_time(self, deadline: float, step: Callable[[], Awaitable[T]]) -> T:
        """What a step of an epoch comes to."""
        try:
            with trio.fail_at(deadline):
                return await step()
        except trio.TooSlowError:
            raise AttesterUnavailable(
                f"expected GPU evidence within {self._deadline_s:g} s"
            ) from None

    def _count_failure(self, failure: AttesterError) -> AttesterError:
        self.failures += 1
        self._log.warning(
            "evidence_not_collected", code=failure.code, error=failure.message, times=self.failures
        )
        if self.failures >= self._failures_allowed:
            self._end(failure)
        return failure

    def _end(self, error: ApplianceError) -> None:
        """No further epoch, nor the one that is being collected; whoever waits is told why."""
        self._withdraw(error)
        self._let_go(error)
        self._running.cancel()

    def _let_go(self, error: ApplianceError) -> None:
        self._ended = error
        for member in self._waiting:
            member.settle(None, error)
        self._waiting.clear()
        self._asked.set()

    def age_s(self) -> float:
        """Seconds since the last evidence that was accepted was collected."""
        return math.inf if self.last is None else self.age_of_s(self.last)

    def age_of_s(self, epoch: Epoch) -> float:
        """Seconds since its evidence was collected."""
        return max(0.0, self._now() - epoch.collected_at)


def _ending() -> ApplianceError:
    return AttesterUnavailable("the appliance is ending")


def _inclusion(epoch: Epoch, member: Member, index: int) -> Inclusion:
    return Inclusion(
        kind=member.kind,
        keyset_digest=epoch.keyset_digest,
        tree_size=epoch.tree.size,
        leaf_index=index,
        path=epoch.tree.path(index),
        root=epoch.tree.root,
    )

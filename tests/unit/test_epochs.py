"""Epochs: nobody waits for two collections, nobody is lost, nobody harms another."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    Contraindicated,
    DeviceFault,
    Overloaded,
    Unauthentic,
)
from appliance.log import configure_log
from appliance.rats.result import AttestationResult, Finding, Tier
from appliance.serving import epochs as epochs_module
from appliance.serving.epochs import Attested, Epochs
from appliance.wire.commitments import report_commitment
from appliance.wire.evidence import GpuEvidence
from appliance.wire.merkle import root_of

KEYSET = bytes(range(32))
AFFIRMED = AttestationResult(Tier.AFFIRMING, {})
REPORT_S = 0.15


@dataclass
class Device:
    """A device that makes one report at a time, on whatever clock runs."""

    report_s: float = REPORT_S
    nonces: list[bytes] = field(default_factory=list)
    busy: bool = False
    fault: Callable[[int], ApplianceError | None] = lambda _number: None

    async def collect(self, nonce: bytes, asked: Callable[[], None]) -> tuple[GpuEvidence, ...]:
        assert not self.busy, "the device was asked twice at once"
        self.busy = True
        asked()
        try:
            self.nonces.append(nonce)
            await trio.sleep(self.report_s)
            error = self.fault(len(self.nonces))
            if error is not None:
                raise error
            return (GpuEvidence("simulated", nonce, b"chain"),)
        finally:
            self.busy = False


async def affirm(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
    assert gpus[0].report == nonce
    return AFFIRMED


def make(
    device: Device,
    withdrawn: list[ApplianceError] | None = None,
    appraise: Callable[[tuple[GpuEvidence, ...], bytes], Awaitable[AttestationResult]] = affirm,
    keyset_digest: Callable[[], bytes] = lambda: KEYSET,
    *,
    failures: int = 3,
) -> Epochs:
    return Epochs(
        collect=device.collect,
        appraise=appraise,
        keyset_digest=keyset_digest,
        deadline_s=30,
        failures=failures,
        withdraw=([] if withdrawn is None else withdrawn).append,
        now=trio.current_time,
        log=configure_log(format="json", level="error"),
    )


def commitment(number: int) -> bytes:
    return report_commitment(number.to_bytes(32, "big"))


def check(attested: Attested, number: int) -> None:
    """The share is what protocol.md section 2 promises."""
    inclusion = attested.inclusion
    assert inclusion.leaf_index is not None
    assert inclusion.path is not None
    root = root_of(commitment(number), inclusion.leaf_index, inclusion.tree_size, inclusion.path)
    assert root == inclusion.root == attested.epoch.tree.root
    assert attested.epoch.gpus[0].report == inclusion.nonce


async def test_256_requests_at_once_share_two_reports(autojump_clock: trio.abc.Clock) -> None:
    device = Device()
    epochs = make(device)
    waited: list[float] = []

    async def one(number: int) -> None:
        started = trio.current_time()
        check(await epochs.join("request", commitment(number)), number)
        waited.append(trio.current_time() - started)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        async with trio.open_nursery() as requests:
            for number in range(256):
                requests.start_soon(one, number)
        owner.cancel_scope.cancel()
    assert len(waited) == 256
    assert len(device.nonces) <= 2
    assert max(waited) <= 2.0 * REPORT_S + 1e-6


async def test_who_comes_when_the_first_does_is_in_the_first_epoch(
    autojump_clock: trio.abc.Clock,
) -> None:
    device = Device()
    epochs = make(device)
    waited: list[float] = []

    async def one(number: int) -> None:
        for _ in range(number % 7):  # its bytes are there, it is on its way through the server
            await trio.lowlevel.checkpoint()
        started = trio.current_time()
        check(await epochs.join("request", commitment(number)), number)
        waited.append(trio.current_time() - started)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        await one(0)  # how long a report takes is known from here on
        await trio.sleep(1)
        async with trio.open_nursery() as requests:
            for number in range(256):
                requests.start_soon(one, number)
        owner.cancel_scope.cancel()
    assert len(device.nonces) == 2
    # Nobody waits for the others longer than the event loop takes to see to them.
    assert waited == pytest.approx([REPORT_S] * 257)


async def test_the_device_works_on_while_an_epoch_is_appraised(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It once waited for each appraisal, and for all whom that had woken."""
    device = Device()
    concluded: list[bytes] = []

    async def appraise(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        await trio.sleep(REPORT_S / 2)
        concluded.append(nonce)
        return await affirm(gpus, nonce)

    epochs = make(device, appraise=appraise)
    settled: list[float] = []

    async def one(number: int) -> None:
        check(await epochs.join("request", commitment(number)), number)
        settled.append(trio.current_time())

    began = trio.current_time()
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        async with trio.open_nursery() as requests:
            for number in range(4):
                requests.start_soon(one, number)
                await trio.sleep(0.9 * REPORT_S)
        owner.cancel_scope.cancel()
    assert concluded == device.nonces
    # Back to back on the device; each is appraised half a report later.
    assert [at - began for at in settled] == pytest.approx(
        [(number + 1.5) * REPORT_S for number in range(4)]
    )


async def test_appraisals_that_take_longer_than_the_device_keep_their_order(
    autojump_clock: trio.abc.Clock,
) -> None:
    device = Device()
    concluded: list[bytes] = []

    async def appraise(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        await trio.sleep(3 * REPORT_S / len(device.nonces))  # the first ones longest
        concluded.append(nonce)
        return await affirm(gpus, nonce)

    epochs = make(device, appraise=appraise)

    async def one(number: int) -> None:
        check(await epochs.join("request", commitment(number)), number)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        async with trio.open_nursery() as requests:
            for number in range(6):
                requests.start_soon(one, number)
                await trio.sleep(0.9 * REPORT_S)
        owner.cancel_scope.cancel()
    assert concluded == device.nonces


async def test_who_makes_way_goes_on_once_the_device_is_asked(
    autojump_clock: trio.abc.Clock,
) -> None:
    device = Device()
    epochs = make(device)
    went_on: list[tuple[float, int]] = []

    async def one(number: int) -> None:
        member = epochs.enter("request", commitment(number))
        await epochs.make_way()
        went_on.append((trio.current_time(), epochs.waiting))
        check(await member.wait(), number)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        await epochs.join("request", commitment(0))  # how long a report takes is known from here on
        await trio.sleep(1)
        began = trio.current_time()
        async with trio.open_nursery() as requests:
            for number in range(8):
                requests.start_soon(one, number)
                await trio.lowlevel.checkpoint()
            await trio.sleep(REPORT_S / 3)
            requests.start_soon(one, 8)  # the device is busy: nothing to make way for
        owner.cancel_scope.cancel()
    assert len(device.nonces) == 3
    assert went_on[:8] == [(began, 0)] * 8
    [(late, waiting)] = went_on[8:]
    assert late == pytest.approx(began + REPORT_S / 3)
    assert waiting == 1


async def test_nobody_makes_way_for_ever_when_epochs_end(autojump_clock: trio.abc.Clock) -> None:
    epochs = make(Device())
    epochs._asked = trio.Event()  # as while an epoch is left open
    with trio.fail_after(1):
        async with trio.open_nursery() as owner:
            owner.start_soon(epochs.make_way)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as ended:
                ended.start_soon(epochs.run)
                await trio.testing.wait_all_tasks_blocked()
                ended.cancel_scope.cancel()


async def test_who_keeps_coming_holds_up_the_first_for_half_a_report_at_most(
    mock_clock: trio.testing.MockClock,
) -> None:
    device = Device()
    epochs = make(device)
    begun: list[float] = []

    async def one(number: int) -> None:
        check(await epochs.join("request", commitment(number)), number)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        mock_clock.autojump_threshold = 0
        await one(0)
        await trio.sleep(1)
        mock_clock.autojump_threshold = math.inf  # only time that is taken by computing passes
        first = trio.current_time()
        for number in range(1000):
            owner.start_soon(one, number)
            await trio.lowlevel.checkpoint()
            mock_clock.jump(0.001)
            if device.busy:
                begun.append(trio.current_time() - first)
                break
        owner.cancel_scope.cancel()
    assert begun[0] <= REPORT_S / 2 + 0.01  # some turns of the loop, which take 1 ms each here


async def test_a_steady_200_a_second_make_at_most_7_reports_a_second(
    autojump_clock: trio.abc.Clock,
) -> None:
    device = Device()
    epochs = make(device)
    waited: list[float] = []
    dice = random.Random(1)
    began = trio.current_time()

    async def one(number: int) -> None:
        started = trio.current_time()
        check(await epochs.join("request", commitment(number)), number)
        waited.append(trio.current_time() - started)

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        async with trio.open_nursery() as requests:
            for number in range(2000):
                requests.start_soon(one, number)
                await trio.sleep(dice.expovariate(200))
        seconds = trio.current_time() - began
        owner.cancel_scope.cancel()
    assert len(device.nonces) / seconds <= 7
    assert sorted(waited)[int(0.99 * len(waited))] <= 2.2 * REPORT_S


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1), st.one_of(st.none(), st.floats(0.001, 0.5)), st.integers(0, 9999)
        ),
        min_size=1,
        max_size=40,
    ),
    st.sets(st.integers(1, 20), max_size=2),
)
def test_everybody_is_settled_whatever_arrives_cancels_and_fails(
    arrivals: list[tuple[float, float | None, int]], faulty: set[int]
) -> None:
    """Each member gets a valid share, a typed error, or its own cancellation; nothing else."""
    device = Device(fault=lambda number: DeviceFault("fault") if number in faulty else None)
    outcomes: list[str] = []

    async def one(epochs: Epochs, at: float, patience: float | None, number: int) -> None:
        await trio.sleep(at)
        with trio.CancelScope() as scope:
            if patience is not None:
                scope.deadline = trio.current_time() + patience
            try:
                check(await epochs.join("request", commitment(number)), number)
                outcomes.append("attested")
            except DeviceFault:
                outcomes.append("fault")
        if scope.cancelled_caught:
            outcomes.append("cancelled")

    async def live() -> None:
        epochs = make(device)
        async with trio.open_nursery() as owner:
            owner.start_soon(epochs.run)
            with trio.fail_after(60):
                async with trio.open_nursery() as requests:
                    for at, patience, number in arrivals:
                        requests.start_soon(one, epochs, at, patience, number)
            assert epochs.waiting == 0
            owner.cancel_scope.cancel()

    trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(outcomes) == len(arrivals)


async def test_a_device_that_keeps_failing_withdraws_after_its_count(
    autojump_clock: trio.abc.Clock,
) -> None:
    withdrawn: list[ApplianceError] = []
    epochs = make(Device(fault=lambda _: DeviceFault("broken")), withdrawn)
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(3):
            assert not withdrawn
            with pytest.raises(DeviceFault):
                await epochs.join("request", commitment(number))
        assert [type(error) for error in withdrawn] == [DeviceFault]
        with pytest.raises(DeviceFault):  # nobody waits for an epoch that will never be
            await epochs.join("request", commitment(9))


async def test_one_good_report_forgets_earlier_failures(autojump_clock: trio.abc.Clock) -> None:
    withdrawn: list[ApplianceError] = []
    device = Device(fault=lambda number: DeviceFault("x") if number % 3 else None)
    epochs = make(device, withdrawn)
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(9):
            try:
                check(await epochs.join("request", commitment(number)), number)
            except DeviceFault:
                continue
        owner.cancel_scope.cancel()
    assert not withdrawn


@pytest.mark.parametrize("how", ["raises", "concludes"])
async def test_evidence_that_does_not_hold_withdraws_at_once(
    how: str, autojump_clock: trio.abc.Clock
) -> None:
    withdrawn: list[ApplianceError] = []
    finding = Finding(Tier.CONTRAINDICATED, "nvidia_gpu.measurement", "a", "b", "do c")

    async def refuse(_gpus: tuple[GpuEvidence, ...], _nonce: bytes) -> AttestationResult:
        if how == "raises":
            raise Unauthentic("bad signature")
        return AttestationResult(Tier.CONTRAINDICATED, {}, (finding,))

    epochs = make(Device(), withdrawn, refuse)
    expected = Unauthentic if how == "raises" else Contraindicated
    seen: list[type[ApplianceError]] = []

    async def one(number: int) -> None:
        try:
            await epochs.join("request", commitment(number))
        except ApplianceError as error:
            seen.append(type(error))

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(3):
            owner.start_soon(one, number)
            await trio.sleep(0.01)  # the last two wait for the next epoch, which never comes
    assert seen == [expected] * 3
    assert [type(error) for error in withdrawn] == [expected]


async def test_evidence_that_does_not_hold_ends_the_epoch_that_is_being_collected(
    autojump_clock: trio.abc.Clock,
) -> None:
    withdrawn: list[ApplianceError] = []
    device = Device()

    async def refuse(_gpus: tuple[GpuEvidence, ...], _nonce: bytes) -> AttestationResult:
        await trio.sleep(REPORT_S / 2)
        raise Unauthentic("bad signature")

    epochs = make(device, withdrawn, refuse)
    seen: list[float] = []

    async def one(number: int) -> None:
        with pytest.raises(Unauthentic):
            await epochs.join("request", commitment(number))
        seen.append(trio.current_time())

    async with trio.open_nursery() as requests, trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(3):
            requests.start_soon(one, number)
            await trio.sleep(REPORT_S * 0.7)
    assert len(device.nonces) == 2
    assert not device.busy
    assert len(seen) == 3
    assert seen == pytest.approx([seen[0]] * 3)  # nobody waits for a collection that is for nothing
    assert [type(error) for error in withdrawn] == [Unauthentic]


async def test_an_appraisal_that_hangs_fails_its_epoch_and_withdraws_after_its_count(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It once stopped every epoch for good, and nobody was told."""
    withdrawn: list[ApplianceError] = []

    async def hang(_gpus: tuple[GpuEvidence, ...], _nonce: bytes) -> AttestationResult:
        await trio.sleep_forever()
        raise AssertionError

    epochs = make(Device(), withdrawn, hang)
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(3):
            assert not withdrawn
            with pytest.raises(AttesterUnavailable, match="within 30 s"):
                await epochs.join("request", commitment(number))
        owner.cancel_scope.cancel()
    assert len(withdrawn) == 1


async def test_an_appraisal_that_hangs_takes_no_time_from_the_next_epoch(
    autojump_clock: trio.abc.Clock,
) -> None:
    """The next one waited for it and then had failed, too: one defect was counted twice."""
    withdrawn: list[ApplianceError] = []
    device = Device()

    async def appraise(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        await trio.sleep(math.inf if nonce == device.nonces[0] else 2 * REPORT_S)
        return await affirm(gpus, nonce)

    epochs = make(device, withdrawn, appraise, failures=2)
    outcomes: dict[int, str] = {}

    async def one(number: int) -> None:
        try:
            check(await epochs.join("request", commitment(number)), number)
            outcomes[number] = "attested"
        except AttesterUnavailable:
            outcomes[number] = "failed"

    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        async with trio.open_nursery() as requests:
            for number in range(3):
                requests.start_soon(one, number)
                await trio.sleep(REPORT_S / 2)
        owner.cancel_scope.cancel()
    assert outcomes == {0: "failed", 1: "attested", 2: "attested"}
    assert not withdrawn


async def test_epochs_end_once_for_the_first_reason(autojump_clock: trio.abc.Clock) -> None:
    """A device that failed behind evidence that did not hold once had the last word."""
    withdrawn: list[ApplianceError] = []
    device = Device(fault=lambda number: DeviceFault("later") if number == 2 else None)

    async def refuse(_gpus: tuple[GpuEvidence, ...], _nonce: bytes) -> AttestationResult:
        await trio.sleep(2 * REPORT_S)
        raise Unauthentic("bad signature")

    epochs = make(device, withdrawn, refuse, failures=1)
    seen: list[type[ApplianceError]] = []

    async def one(number: int) -> None:
        try:
            await epochs.join("request", commitment(number))
        except ApplianceError as error:
            seen.append(type(error))

    async with trio.open_nursery() as requests, trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        for number in range(2):
            requests.start_soon(one, number)
            await trio.sleep(REPORT_S / 2)
    assert seen == [Unauthentic, Unauthentic]
    assert [type(error) for error in withdrawn] == [Unauthentic]
    assert isinstance(epochs.ended, Unauthentic)


async def test_nobody_makes_way_for_a_device_that_failed_before_it_was_asked(
    autojump_clock: trio.abc.Clock,
) -> None:
    """He waited for the appraisal of the epoch before, too."""

    async def collect(nonce: bytes, asked: Callable[[], None]) -> tuple[GpuEvidence, ...]:
        nonces.append(nonce)
        if len(nonces) == 2:
            raise DeviceFault("gone")
        asked()
        return (GpuEvidence("simulated", nonce, b"chain"),)

    async def slowly(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        await trio.sleep(20)
        return await affirm(gpus, nonce)

    nonces: list[bytes] = []
    epochs = make(Device(), appraise=slowly)
    epochs._collect = collect
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        first = epochs.enter("request", commitment(0))
        await trio.sleep(1)  # it is being appraised, and the device is idle
        second = epochs.enter("request", commitment(1))
        with trio.fail_after(1):
            await epochs.make_way()
        check(await first.wait(), 0)
        with pytest.raises(DeviceFault):
            await second.wait()
        owner.cancel_scope.cancel()


async def test_a_device_that_hangs_is_a_typed_error(autojump_clock: trio.abc.Clock) -> None:
    epochs = make(Device(report_s=1e6))
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        with pytest.raises(AttesterUnavailable, match="within 30 s"):
            await epochs.join("request", commitment(0))
        owner.cancel_scope.cancel()


async def test_the_line_is_bounded(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs_module, "MAX_WAITING", 2)
    epochs = make(Device())
    async with trio.open_nursery() as owner:
        for number in range(2):
            owner.start_soon(epochs.join, "request", commitment(number))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Overloaded):
            await epochs.join("request", commitment(9))
        owner.cancel_scope.cancel()
    assert epochs.waiting == 0


async def test_its_end_lets_everybody_go(autojump_clock: trio.abc.Clock) -> None:
    epochs = make(Device())
    async with trio.open_nursery() as requests, trio.open_nursery() as owner:
        owner.start_soon(epochs.run)

        async def one(number: int) -> None:
            with pytest.raises(AttesterUnavailable, match="ending"):
                await epochs.join("request", commitment(number))

        for number in range(2):  # one in the epoch, one in line for the next
            requests.start_soon(one, number)
            await trio.sleep(0.01)
        owner.cancel_scope.cancel()


async def test_an_epoch_is_used_again_while_it_is_recent_and_of_this_keyset(
    autojump_clock: trio.abc.Clock,
) -> None:
    keyset = [KEYSET]
    epochs = make(Device())
    epochs._keyset_digest = lambda: keyset[0]
    assert epochs.reuse("request", unsafe_max_age_s=10) is None  # there is none yet
    async with trio.open_nursery() as owner:
        owner.start_soon(epochs.run)
        first = await epochs.join("request", commitment(0))
        await trio.sleep(5)
        again = epochs.reuse("request", unsafe_max_age_s=10)
        assert again is not None
        assert again.epoch is first.epoch
        assert (again.inclusion.leaf_index, again.inclusion.path) == (None, None)
        keyset[0] = bytes(32)
        assert epochs.reuse("request", unsafe_max_age_s=10) is None
        keyset[0] = KEYSET
        await trio.sleep(6)
        assert epochs.reuse("request", unsafe_max_age_s=10) is None
        owner.cancel_scope.cancel()

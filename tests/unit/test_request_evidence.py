"""A request's evidence: in line early, never old, and told only where it matters."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from appliance.errors import (
    ApplianceError,
    AttestationFailed,
    DeviceFault,
    EngineDied,
    Overloaded,
    Unauthentic,
)
from appliance.rats.result import AttestationResult
from appliance.serving import epochs as epochs_module
from appliance.serving.admission import Exchange
from appliance.serving.epochs import Epochs
from appliance.web.evidence import FRESH_S, RequestEvidence
from appliance.wire.evidence import GpuEvidence
from tests.unit.test_admission import admit, serving
from tests.unit.test_epochs import REPORT_S, Device, affirm, check, commitment, make

WITHIN_S = 5.0


def evidence_for(epochs: Epochs, number: int, *, unsafe_max_age_s: float = 0) -> RequestEvidence:
    return RequestEvidence(
        epochs, commitment(number), within_s=WITHIN_S, unsafe_max_age_s=unsafe_max_age_s
    )


@pytest.fixture
async def exchange() -> Exchange:
    return await admit(serving())


async def test_it_is_collected_while_the_request_is_read(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    device = Device()
    epochs = make(device)
    nursery.start_soon(epochs.run)
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    evidence = evidence_for(epochs, 0)
    await evidence.make_way()
    assert device.busy
    await trio.sleep(REPORT_S)  # the request is read, and waits for its place
    check(await evidence.attested(exchange), 0)
    assert trio.current_time() == began + REPORT_S


@pytest.mark.parametrize(("place_after_s", "reports"), [(FRESH_S, 1), (FRESH_S + 0.1, 2)])
async def test_where_a_place_is_long_in_coming_it_is_collected_anew(
    autojump_clock: trio.abc.Clock,
    nursery: trio.Nursery,
    exchange: Exchange,
    place_after_s: float,
    reports: int,
) -> None:
    device = Device(report_s=0.25)
    epochs = make(device)
    nursery.start_soon(epochs.run)
    evidence = evidence_for(epochs, 0)
    await trio.sleep(device.report_s + place_after_s)
    asked = trio.current_time()
    attested = await evidence.attested(exchange)
    check(attested, 0)
    assert len(device.nonces) == reports
    assert attested.epoch.collected_at >= asked - FRESH_S


async def test_time_that_an_appraisal_takes_counts(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    device = Device()

    async def appraise(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        await trio.sleep(FRESH_S + 1 if len(device.nonces) == 1 else 0)
        return await affirm(gpus, nonce)

    epochs = make(device, appraise=appraise)
    nursery.start_soon(epochs.run)
    evidence = evidence_for(epochs, 0)
    await trio.sleep(REPORT_S + FRESH_S + 1.1)
    check(await evidence.attested(exchange), 0)
    assert len(device.nonces) == 2


async def test_a_device_that_fails_is_a_refusal(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    epochs = make(Device(fault=lambda _: DeviceFault("fault")))
    nursery.start_soon(epochs.run)
    with pytest.raises(AttestationFailed, match="device_fault"):
        await evidence_for(epochs, 0).attested(exchange)


async def test_a_device_that_failed_before_the_place_was_there_is_asked_again(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    epochs = make(Device(fault=lambda number: DeviceFault("fault") if number == 1 else None))
    nursery.start_soon(epochs.run)
    evidence = evidence_for(epochs, 0)
    await trio.sleep(2 * REPORT_S)
    check(await evidence.attested(exchange), 0)


async def test_evidence_is_not_used_once_later_evidence_did_not_hold(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    """Its share was there, and it was not yet forwarded when the appliance withdrew."""
    withdrawn: list[ApplianceError] = []
    device = Device(fault=lambda number: Unauthentic("forged") if number == 2 else None)
    epochs = make(device, withdrawn)
    nursery.start_soon(epochs.run)
    evidence = evidence_for(epochs, 0)
    await trio.sleep(2 * REPORT_S)
    with pytest.raises(Unauthentic):
        await epochs.join("request", commitment(1))
    with pytest.raises(AttestationFailed, match="unauthentic"):
        await evidence.attested(exchange)
    assert len(withdrawn) == 1


async def test_a_full_line_is_told_only_if_it_still_is_when_the_place_is_there(
    autojump_clock: trio.abc.Clock,
    nursery: trio.Nursery,
    exchange: Exchange,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epochs_module, "MAX_WAITING", 1)
    epochs = make(Device())
    first, second, third = (evidence_for(epochs, number) for number in range(3))
    await second.make_way()  # it is not in line: nothing to make way for
    with pytest.raises(Overloaded):
        await third.attested(exchange)
    nursery.start_soon(epochs.run)
    check(await first.attested(exchange), 0)
    check(await second.attested(exchange), 1)


async def test_who_leaves_before_the_epoch_leaves_no_leaf(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    epochs = make(Device())
    refused, served = evidence_for(epochs, 0), evidence_for(epochs, 1)
    refused.leave()
    refused.leave()
    nursery.start_soon(epochs.run)
    attested = await served.attested(exchange)
    assert attested.epoch.tree.size == 1
    served.leave()


async def test_an_interrupted_exchange_waits_no_longer(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    epochs = make(Device(report_s=1000))
    nursery.start_soon(epochs.run)

    async def interrupt() -> None:
        await trio.sleep(1)
        exchange.interrupt(EngineDied("gone"))

    nursery.start_soon(interrupt)
    with pytest.raises(EngineDied):
        await evidence_for(epochs, 0).attested(exchange)
    assert trio.current_time() == pytest.approx(1)


async def test_evidence_that_takes_too_long_is_a_refusal(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    epochs = make(Device(report_s=1000))
    nursery.start_soon(epochs.run)
    with pytest.raises(AttestationFailed, match="within 5 s"):
        await evidence_for(epochs, 0).attested(exchange)


async def test_under_its_name_earlier_evidence_is_used_and_nobody_stands_in_line(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery, exchange: Exchange
) -> None:
    """Who does not stand in line once made way for an epoch that nobody began."""
    epochs = make(Device())
    nursery.start_soon(epochs.run)
    first = await epochs.join("request", commitment(0))
    await trio.sleep(5)
    evidence = evidence_for(epochs, 1, unsafe_max_age_s=60)
    with trio.fail_after(0.01):
        await evidence.make_way()
        attested = await evidence.attested(exchange)
    assert attested.epoch is first.epoch
    assert attested.inclusion.leaf_index is None
    assert epochs.waiting == 0
    exchange.interrupt(EngineDied("gone"))
    with pytest.raises(EngineDied):
        await evidence.attested(exchange)

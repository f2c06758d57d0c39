"""Reports: a bounded line for clients, and a place for the appliance that nobody can take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
import trio

from appliance.config import Attestation
from appliance.errors import ApplianceError, Overloaded, RateLimited
from appliance.log import configure_log
from appliance.rats.result import AttestationResult
from appliance.serving import epochs as epochs_module
from appliance.serving.epochs import Epoch, Epochs
from appliance.serving.identity import Identity
from appliance.serving.image_facts import ImageFacts
from appliance.serving.keys import create_signing_key
from appliance.serving.reattestation import AGAIN_S, Reattestation
from appliance.serving.reports import MAX_WAITING_REPORTS, Reports
from appliance.wire.evidence import CpuEvidence
from tests.unit.test_epochs import AFFIRMED, Device, commitment, make

INTERVAL_S = 60.0


@dataclass
class Machine:
    """An appliance's reports over a CPU that takes a while for a quote."""

    quote_s: float
    quotes: list[float] = field(default_factory=list)
    withdrawn: list[ApplianceError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reports = Reports(
            Identity(
                manifest={},
                instance={},
                policy={},
                image=ImageFacts(),
                receipt_key=create_signing_key("receipt"),
                checkpoint_key=create_signing_key("checkpoint"),
                spki_sha256=bytes(32),
            ),
            quote=self.quote,
            lifetime_s=86_400,
            now=trio.current_time,
            publish=lambda _digest, _report: None,
        )
        self.epochs: Epochs = make(
            Device(), self.withdrawn, keyset_digest=lambda: self.reports.keyset_digest
        )
        self.reports.use(self.epochs)

    async def quote(self, _report_data: bytes) -> CpuEvidence:
        await trio.sleep(self.quote_s)
        self.quotes.append(trio.current_time())
        return CpuEvidence("simulated", {"report": b""}, {})

    def reattestation(self) -> Reattestation:
        async def appraise(_data: bytes, _nonce: bytes | None) -> AttestationResult:
            return AFFIRMED

        async def refresh(_epoch: Epoch) -> None:
            pass

        return Reattestation(
            Attestation(cpu="simulated", interval_s=INTERVAL_S),
            self.reports,
            self.epochs,
            appraise=appraise,
            refresh=refresh,
            withdraw=self.withdrawn.append,
            random_bytes=bytes,
            now=trio.current_time,
            log=configure_log(format="json", level="error"),
        )


async def test_all_of_one_epoch_do_not_pass_the_bound_on_waiting_reports(
    autojump_clock: trio.abc.Clock,
) -> None:
    machine, told = Machine(quote_s=0.3), Counter[str]()

    async def ask(number: int) -> None:
        try:
            await machine.reports.report(number.to_bytes(32, "big"))
            told["report"] += 1
        except RateLimited:
            told["refused"] += 1

    async with trio.open_nursery() as owner:
        owner.start_soon(machine.epochs.run)
        async with trio.open_nursery() as clients:
            for number in range(40):
                clients.start_soon(ask, number)
        assert told == {"report": MAX_WAITING_REPORTS, "refused": 40 - MAX_WAITING_REPORTS}
        # Who was served or left makes room again.
        with trio.move_on_after(0.1):
            await machine.reports.report(bytes(32))
        await machine.reports.report(bytes(32))
        owner.cancel_scope.cancel()


async def test_a_full_line_of_clients_cannot_end_or_delay_reattestation(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It once left the root nursery as RateLimited, and the appliance with it."""
    machine = Machine(quote_s=20.0)  # so that the whole line would take longer than its deadline
    reattestation = machine.reattestation()

    async def flood(number: int) -> None:
        while True:
            try:
                await machine.reports.report(number.to_bytes(32, "big"))
            except RateLimited:
                await trio.sleep(1)

    async with trio.open_nursery() as owner:
        owner.start_soon(machine.epochs.run)
        for number in range(40):
            owner.start_soon(flood, number)
        owner.start_soon(reattestation.run)
        # Its interval, the quote under way, its own quote, and an epoch or two.
        await trio.sleep(INTERVAL_S * 1.1 + 2 * machine.quote_s + 2)
        assert reattestation.result is AFFIRMED
        owner.cancel_scope.cancel()
    assert machine.withdrawn == []


async def test_the_appliance_tries_again_soon_where_too_many_wait_for_evidence(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(quote_s=0.1)
    reattestation = machine.reattestation()
    monkeypatch.setattr(epochs_module, "MAX_WAITING", 1)
    async with trio.open_nursery() as owner:
        in_line = machine.epochs.enter("request", commitment(1))
        with pytest.raises(Overloaded):
            await reattestation.once()
        owner.start_soon(reattestation.run)
        await trio.sleep(INTERVAL_S * 1.1 + 1)
        verdict = reattestation.health()["verdict"]
        assert verdict == "none"
        machine.epochs.leave(in_line)
        owner.start_soon(machine.epochs.run)
        await trio.sleep(AGAIN_S + 1)
        assert reattestation.result is AFFIRMED
        owner.cancel_scope.cancel()
    assert machine.withdrawn == []

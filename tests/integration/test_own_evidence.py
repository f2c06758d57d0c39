"""`serving.own_evidence`: what a machine's quotes are endorsed with, and what becomes of it.

The collector is played over its socket, AMD's key distribution service over HTTP.
"""

from __future__ import annotations

import datetime
import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import structlog
import trio

from appliance.attester.client import connect_attester
from appliance.attester.messages import FrameStream, Hello, Response
from appliance.config import MeasuredConfig
from appliance.endorsements.collect import Endorsements
from appliance.errors import Unauthentic
from appliance.rats.model import Anchors
from appliance.rats.schemes import sev_snp
from appliance.serving.own_evidence import PROBE, OwnEvidence
from appliance.wire.evidence import CpuEvidence
from tests.fakes.amd_evidence import NOW, Guest, revocation_list
from tests.fakes.vendors import AmdKds, VendorServer

DAY = datetime.timedelta(days=1)
CRL_PATH = "/vcek/v1/Milan/crl"
VLEK_CRL_PATH = "/vlek/v1/Milan/crl"


class Machine:
    """A machine and the vendor of its CPU, started by `start`.

    Attributes:
        evidence: what its collector answers with. now: what its clock says.
        amd, kds: AMD's service and what serves it. own: the machine's evidence, as the gateway sees it.
    """

    def __init__(self, guest: Guest, evidence: CpuEvidence) -> None:
        self.guest, self.evidence, self.now = guest, evidence, NOW
        lists = {path: revocation_list(guest.roots) for path in (CRL_PATH, VLEK_CRL_PATH)}
        self.amd = AmdKds({}, crls=lists)
        self.kds = VendorServer(self.amd)
        self.own: OwnEvidence

    async def start(self, nursery: trio.Nursery, folder: Path) -> None:
        await self.kds.start(nursery)
        path = folder / "attester.sock"
        await nursery.start(self._collect, path)
        config = msgspec.convert(
            {
                "model": {"id": "m", "path": "/m", "files": {}},
                "attestation": {
                    "cpu": "sev_snp",
                    "gpu": "unsafe_none",
                    "kds_url": self.kds.url,
                    "endorsements_dir": str(folder / "endorsements"),
                    "endorsement_s": 5.0,
                },
            },
            MeasuredConfig,
            strict=False,
        )
        attester = await nursery.start(self._connect, str(path), config)
        anchors = Anchors(amd=(self.guest.roots,))
        endorsements = await nursery.start(self._endorse, config, anchors)
        self.own = OwnEvidence(config, attester, endorsements, anchors, now=self.clock)

    def clock(self) -> float:
        return self.now.timestamp()

    async def _collect(
        self, path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.bind(str(path))
        sock.listen()
        async with trio.SocketListener(sock) as listener:
            task_status.started()
            async with await listener.accept() as stream:
                frames = FrameStream(stream)
                hello = Hello("sev_snp", None, 0)
                while (asked := await frames.receive()) is not None:
                    number = asked["id"]
                    assert isinstance(number, int)
                    told = hello if asked["op"] == "hello" else self.evidence
                    await frames.send(Response(number, told.to_json()).to_json())

    async def _connect(
        self, path: str, config: MeasuredConfig, task_status: trio.TaskStatus[object]
    ) -> None:
        await connect_attester(
            path, config.attestation, lost=lambda error: None, task_status=task_status
        )

    async def _endorse(
        self, config: MeasuredConfig, anchors: Anchors, task_status: trio.TaskStatus[Endorsements]
    ) -> None:
        async with Endorsements(
            config.attestation,
            anchors,
            authenticate_rim=lambda document, at: (),
            log=structlog.get_logger(),
            now=lambda: self.now,
        ) as endorsements:
            task_status.started(endorsements)
            await trio.sleep_forever()

    @property
    def asked(self) -> list[str]:
        return [request.path for request in self.kds.requests]


async def machine(
    nursery: trio.Nursery, folder: Path, guest: Guest, evidence: CpuEvidence | None = None
) -> Machine:
    one = Machine(guest, guest.evidence() if evidence is None else evidence)
    await one.start(nursery, folder)
    return one


def judged(quote: CpuEvidence, one: Machine) -> sev_snp.SevSnpClaims:
    return sev_snp.authenticate(quote, roots=(one.guest.roots,), at=one.now)


@pytest.mark.parametrize(
    ("guest", "path"),
    [
        (Guest(vlek=True), VLEK_CRL_PATH),
        (Guest(version=2), CRL_PATH),
        (Guest(report={0x1A0: bytes(64)}), CRL_PATH),
    ],
    ids=["a loaded key", "a report that names no product", "a masked chip"],
)
async def test_the_hosts_certificate_is_kept_and_its_revocation_list_is_fetched(
    nursery: trio.Nursery, tmp_path: Path, guest: Guest, path: str
) -> None:
    one = await machine(nursery, tmp_path, guest)
    await one.own.refresh_cpu()
    quote = await one.own.quote(PROBE)
    assert quote.endorsements["vek"] == one.evidence.endorsements["vek"]
    assert judged(quote, one).revocation_checked
    assert one.asked == [path]


async def test_a_list_that_the_host_hands_out_gives_way_to_amds(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    guest = Guest()
    old = revocation_list(guest.roots, end=NOW - DAY)
    one = await machine(nursery, tmp_path, guest, guest.evidence(crl=old))
    assert not judged(await one.own.quote(PROBE), one).revocation_checked
    await one.own.refresh_cpu()
    assert judged(await one.own.quote(PROBE), one).revocation_checked


async def test_the_hosts_certificate_of_new_firmware_counts_at_once(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    one = await machine(nursery, tmp_path, Guest())
    await one.own.refresh_cpu()
    newer = Guest(svns=(4, 1, 25, 219))
    one.evidence = newer.evidence()
    quote = await one.own.quote(PROBE)
    assert judged(quote, one).reported_tcb.snp == 25


async def test_a_list_that_lapses_while_amd_is_away_is_a_warning_and_no_end(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    one = await machine(nursery, tmp_path, Guest())
    one.amd.crls[CRL_PATH] = revocation_list(one.guest.roots, end=NOW + DAY)
    await one.own.refresh_cpu()
    one.kds.fault.garbage = True
    one.now = NOW + 2 * DAY
    # At the next re-attestation, and once the vendors were asked again.
    for _ in range(2):
        claims = judged(await one.own.quote(PROBE), one)
        assert not claims.revocation_checked
        await one.own.refresh_cpu()


async def test_a_report_that_does_not_parse_is_evidence_that_does_not_hold(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unknown = replace(Guest().evidence(), parts={"report": b"\x09" + bytes(1183)})
    one = await machine(nursery, tmp_path, Guest(), unknown)
    with pytest.raises(Unauthentic, match="parses"):
        await one.own.refresh_cpu()

"""SEV-SNP and TDX through configfs-tsm, over an imitation of the kernel's side."""

from __future__ import annotations

import datetime
import errno
import threading
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.attester.configfs_tsm import ATTEMPTS, ConfigfsTsm
from appliance.attester.simulated import pki, sev_snp
from appliance.config import Attestation
from appliance.errors import DeviceFault, Malformed, ProviderAbsent
from appliance.rats.model import AmdRoots
from appliance.rats.schemes import sev_snp as scheme
from tests.fakes.configfs_tsm import Entry, FakeTsm
from tests.unit.test_attester_certificate_table import VCEK_GUID, VLEK_GUID, table

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
DATA = b"\x5a" * 32
PADDED = DATA.ljust(64, b"\0")


def snp_report(inblob: bytes) -> bytes:
    return inblob.ljust(0x4A0, b"\1")


def snp(**options: object) -> FakeTsm:
    return FakeTsm(**{"report": snp_report, **options})  # type: ignore[arg-type]


async def test_a_report_stands_over_the_padded_data_and_leaves_nothing_behind() -> None:
    tsm = snp()
    evidence = await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert evidence.scheme == "sev_snp"
    assert evidence.parts == {"report": snp_report(PADDED)}
    assert evidence.endorsements == {}
    assert tsm.entries == {}
    assert len(tsm.made) == 1


async def test_a_tdx_quote_has_no_auxblob() -> None:
    tsm = FakeTsm(provider="tdx_guest", report=lambda inblob: b"quote" + inblob, auxblob=None)
    evidence = await ConfigfsTsm("tdx", root=tsm).collect(bytes(64))
    assert evidence.scheme == "tdx"
    assert evidence.parts == {"quote": b"quote" + bytes(64)}
    assert tsm.entries == {}


async def test_the_hosts_certificates_become_endorsements_and_authenticate() -> None:
    chip_id = bytes(range(64))
    key, vcek = pki.make_vcek(chip_id=chip_id, tcb=sev_snp.TCB)
    ask = pki.fixed("amd_ask").certificate
    tsm = snp(
        report=lambda inblob: sev_snp.encode_report(
            key, report_data=inblob, chip_id=chip_id, report_id=bytes(32)
        ),
        auxblob=table((VCEK_GUID, der(vcek)), (ASK_GUID, der(ask))),
    )
    evidence = await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    roots = AmdRoots(
        "Milan", *(pki.fixed(name).certificate for name in ("amd_ark", "amd_ask", "amd_asvk"))
    )
    assert evidence.endorsements["authorities"] == pki.fixed("amd_ask").pem
    assert scheme.authenticate(evidence, roots=(roots,), at=NOW).report_data == PADDED


async def test_a_vlek_goes_before_a_vcek() -> None:
    tsm = snp(auxblob=table((VCEK_GUID, b"chip's"), (VLEK_GUID, b"provider's")))
    evidence = await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert evidence.endorsements == {"vek": b"provider's"}


async def test_a_table_that_does_not_parse_is_malformed() -> None:
    with pytest.raises(Malformed):
        await ConfigfsTsm("sev_snp", root=snp(auxblob=b"\1" * 100)).collect(DATA)


@pytest.mark.parametrize("wanted", ["sev_snp", "tdx"])
async def test_another_tee_than_the_configured_one_is_absence(wanted: str) -> None:
    other = {"sev_snp": "tdx_guest", "tdx": "sev_guest"}[wanted]
    tsm = snp(provider=other)
    with pytest.raises(ProviderAbsent, match=f"got `{other}`"):
        await ConfigfsTsm(wanted, root=tsm).collect(DATA)
    assert tsm.entries == {}


async def test_no_configfs_is_absence(tmp_path: Path) -> None:
    provider = ConfigfsTsm("sev_snp", root=tmp_path / "missing")
    with pytest.raises(ProviderAbsent, match="No such file"):
        await provider.collect(DATA)


async def test_a_folder_that_is_not_configfs_is_absence_and_stays_clean(tmp_path: Path) -> None:
    attestation = Attestation(cpu="tdx", tsm_dir=str(tmp_path))
    with pytest.raises(ProviderAbsent):
        await ConfigfsTsm.from_settings(attestation).collect(DATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EWOULDBLOCK, errno.EINTR])
async def test_a_busy_tee_is_asked_again(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    tsm = snp(read_errors=[number, number])
    evidence = await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert evidence.parts == {"report": snp_report(PADDED)}
    assert len(set(tsm.made)) == 3
    assert tsm.entries == {}


async def test_a_tee_that_stays_busy_is_a_fault(autojump_clock: trio.testing.MockClock) -> None:
    tsm = snp(read_errors=[errno.EBUSY] * 100)
    with pytest.raises(DeviceFault, match="5 attempts failed, the last one: Device or resource"):
        await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert len(tsm.made) == ATTEMPTS
    assert tsm.entries == {}


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EIO, DeviceFault),
        (errno.EFBIG, DeviceFault),
        (errno.EACCES, DeviceFault),
        (errno.ENXIO, ProviderAbsent),
    ],
)
async def test_another_error_is_not_tried_again(number: int, error: type[Exception]) -> None:
    tsm = snp(read_errors=[number])
    with pytest.raises(error, match="configfs-tsm: "):
        await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert len(tsm.made) == 1
    assert tsm.entries == {}


async def test_a_report_that_somebody_disturbed_is_asked_for_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disturbed: list[Entry] = []

    def intrude(entry: Entry) -> None:
        if not disturbed:
            disturbed.append(entry)
            entry.write(b"somebody else's data")

    tsm = snp(intruder=intrude)
    evidence = await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert evidence.parts == {"report": snp_report(PADDED)}
    assert len(tsm.made) == 2


@pytest.mark.parametrize("forgiving", [False, True])
async def test_data_that_the_kernel_did_not_take_never_become_a_report(
    autojump_clock: trio.testing.MockClock, forgiving: bool
) -> None:
    """close(2) cannot say that it refused; `outblob` does, and so does `generation`."""
    tsm = snp(refuse_inblob=True, forgiving=forgiving)
    with pytest.raises(DeviceFault):
        await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert tsm.entries == {}


@pytest.mark.parametrize("length", [0, 1183, 1185])
async def test_a_snp_report_of_another_length_is_a_fault(length: int) -> None:
    tsm = snp(report=lambda _inblob: bytes(length))
    with pytest.raises(DeviceFault, match="expected"):
        await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert tsm.entries == {}


@pytest.mark.parametrize("length", [0, (1 << 20) + 1])
async def test_a_quote_out_of_bounds_is_a_fault(length: int) -> None:
    tsm = FakeTsm(provider="tdx_guest", report=lambda _inblob: bytes(length))
    with pytest.raises(DeviceFault, match="expected a blob of 1 to"):
        await ConfigfsTsm("tdx", root=tsm).collect(DATA)


async def test_a_caller_that_gives_up_leaves_nothing_behind() -> None:
    tsm = snp(hang=threading.Event())
    assert tsm.hang is not None
    with trio.move_on_after(0.05) as deadline:
        await ConfigfsTsm("sev_snp", root=tsm).collect(DATA)
    assert deadline.cancelled_caught
    assert tsm.reading.is_set()
    tsm.hang.set()
    with trio.fail_after(10):
        while tsm.entries:
            await trio.sleep(0.005)


ASK_GUID = bytes.fromhex("4ab7b379bbac4fe4a02f05aef327c782")


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)

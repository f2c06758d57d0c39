"""`wire.nvidia_gpu`: opaque fields, versions, names of reference values, firmware digests."""

from __future__ import annotations

import contextlib
import random

import pytest

from appliance.errors import Malformed
from appliance.wire.nvidia_gpu import (
    NvidiaReport,
    driver_rim_id,
    format_vbios_version,
    gpu_identity,
    parse_dice_fwid,
    parse_report,
    switch_identity,
    switch_rim_id,
    vbios_rim_id,
)
from tests.fakes.nvidia_evidence import (
    FWID,
    Report,
    composite_device_id,
    der,
    der_fwid,
    dice_tcb_info,
    encode_fields,
    encode_report,
    gpu_fields,
)


def report(fields: list[tuple[int, bytes]]) -> NvidiaReport:
    return parse_report(encode_report(Report(opaque=encode_fields(fields))) + bytes(96))


def test_a_gpus_fields_are_read() -> None:
    identity = gpu_identity(report(gpu_fields()))
    assert identity.driver_version == "595.71.05"
    assert identity.vbios_version == "96.00.9F.00.04"
    assert (identity.project, identity.project_sku, identity.chip_sku) == ("1010", "0210", "886")
    assert identity.nvdec0_status == b"\x55"
    assert identity.protected_pcie is False
    assert identity.feature_flag == 0
    assert identity.opaque_data_version == 1
    assert identity.switches == ()
    assert driver_rim_id("GH100", identity) == "NV_GPU_DRIVER_GH100_595.71.05"
    assert vbios_rim_id(identity) == "NV_GPU_VBIOS_1010_0210_886_96009F0004"


def test_blackwells_reference_values_are_named_after_the_chip_it_reports() -> None:
    plain = gpu_identity(report(gpu_fields()))
    assert driver_rim_id("GB100", plain) == "NV_GPU_CC_DRIVER_GB100_595.71.05"
    named = gpu_identity(report(gpu_fields(chip_info=b"GB202\0garbage")))
    assert named.chip_info == "GB202"
    assert driver_rim_id("GB100", named) == "NV_GPU_CC_DRIVER_GB202_595.71.05"


def test_a_lowercase_board_has_an_uppercase_name() -> None:
    identity = gpu_identity(report(gpu_fields(project=b"g520\0")))
    assert vbios_rim_id(identity) == "NV_GPU_VBIOS_G520_0210_886_96009F0004"


@pytest.mark.parametrize(
    ("value", "version"),
    [
        ("009f009604000000", "96.00.9F.00.04"),
        ("0074009620000000", "96.00.74.00.20"),
        ("008800970f000000", "97.00.88.00.0F"),
        ("00a5009601000000", "96.00.A5.00.01"),
    ],
)
def test_a_vbios_version_is_written_in_nvidias_order(value: str, version: str) -> None:
    assert format_vbios_version(bytes.fromhex(value)) == version


def test_a_switch_spells_its_version_out_and_gives_its_own_identifier() -> None:
    gpus = bytes(range(8)) + bytes(8) + bytes(range(8))
    fields = [(6, b"96.10.55.00.01"), (22, bytes(range(1, 9))), (26, gpus)]
    identity = switch_identity(report(fields))
    assert identity.vbios_version == "96.10.55.00.01"
    assert identity.pdi == "0102030405060708"
    assert identity.gpus == ("0001020304050607",)
    assert switch_rim_id(identity) == "NV_SWITCH_BIOS_5612_0002_890_9610550001"


def test_the_switches_a_gpu_is_linked_to_are_listed_once_each() -> None:
    two = bytes(range(8)) + bytes(range(10, 18)) + bytes(range(8)) + bytes(8)
    identity = gpu_identity(report(gpu_fields(switch_pdi=two)))
    assert identity.switches == ("0001020304050607", "0a0b0c0d0e0f1011")


def test_unknown_fields_are_kept_by_their_number() -> None:
    parsed = report([*gpu_fields(), (4711, b"new")])
    assert parsed.fields["type_4711"] == b"new"


def test_a_field_that_comes_twice_is_refused() -> None:
    for again in ((3, b"1.2.3"), (4711, b"")):
        with pytest.raises(Malformed, match="twice"):
            report([*gpu_fields(), (4711, b"new"), again])


def test_the_versioned_format_is_refused_by_name() -> None:
    versioned = b"NVDAOD" + b"\0\0" + b"\2\0\0\0" + encode_fields(gpu_fields())
    with pytest.raises(Malformed, match=r"NVDAOD.*CUDA 13\.5") as caught:
        parse_report(encode_report(Report(opaque=versioned)) + bytes(96))
    assert caught.value.field == "opaque"


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_field_that_runs_past_the_end_is_refused(cut: int) -> None:
    opaque = encode_fields([(3, b"595")])[:-cut]
    with pytest.raises(Malformed, match="bytes"):
        parse_report(encode_report(Report(opaque=opaque)) + bytes(96))


@pytest.mark.parametrize(
    "changed",
    [
        {"driver_version": None},
        {"driver_version": b"\0"},
        {"driver_version": b"595 71"},
        {"driver_version": b"595\x0071"},
        {"driver_version": b"../../etc"},
        {"driver_version": b"\xff\xfe"},
        {"vbios_version": None},
        {"vbios_version": bytes(7)},
        {"project": b"10/10"},
        {"protected_pcie_status": b"\x00"},
        {"feature_flag": b""},
        {"feature_flag": bytes(9)},
        {"switch_pdi": bytes(7)},
    ],
)
def test_values_that_have_not_their_form_are_refused(changed: dict[str, bytes | None]) -> None:
    (name,) = changed
    with pytest.raises(Malformed) as caught:
        gpu_identity(report(gpu_fields(**changed)))
    assert caught.value.field == f"opaque.{name}"


def test_a_firmware_digest_of_another_length_is_refused() -> None:
    assert report(gpu_fields()).fwid == FWID
    assert report(gpu_fields(fwid=None)).fwid is None
    with pytest.raises(Malformed, match="48"):
        _ = report(gpu_fields(fwid=FWID[:32])).fwid


@pytest.mark.parametrize("version", [b"", b"96.10.55.00", b"96.10.55.00.01.02", b"96.10.5G.00.01"])
def test_a_switch_bios_version_that_is_none_is_refused(version: bytes) -> None:
    with pytest.raises(Malformed):
        switch_identity(report([(6, version)]))


def test_both_forms_of_the_firmwares_digest_are_read() -> None:
    assert parse_dice_fwid(composite_device_id()) == FWID
    assert parse_dice_fwid(dice_tcb_info(FWID, bytes(48))) == FWID


def test_the_smallest_tcb_info_has_nothing_but_the_digest() -> None:
    assert parse_dice_fwid(b"\x30\x41" + der(0xA6, der_fwid(FWID))) == FWID


def test_the_first_firmware_digest_counts() -> None:
    assert parse_dice_fwid(dice_tcb_info(bytes(48), FWID)) == bytes(48)


SPKI = der(0x30, b"")


@pytest.mark.parametrize(
    "extension",
    [
        b"",
        FWID,
        composite_device_id() + b"\0",
        composite_device_id()[:-1],
        der(0x31, der(0x02, b"\x01"), SPKI, der_fwid(FWID)),
        der(0x30, der(0x02, b"\x01"), der_fwid(FWID)),
        der(0x30, der(0x02, b"\x01"), SPKI, der_fwid(FWID), der_fwid(FWID)),
        der(0x30, der(0x02, b"\x01"), SPKI, der_fwid(FWID[:32])),
        der(0x30, der(0x02, b"\x01"), SPKI, der_fwid(FWID, "608648016503040201")),
        der(0x30, der(0x02, b"\x01"), SPKI, der(0x30, der(0x04, FWID))),
        der(0x30, der(0xA6, der_fwid(FWID)), der(0xA6, der_fwid(FWID))),
        der(0x30, der(0x87, b""), der(0xA6, der_fwid(FWID))),
        der(0x30, der(0xA6)),
        der(0x30, der(0x80, der_fwid(FWID))),
        b"\x30\x80" + der_fwid(FWID) + b"\0\0",
        b"\x30\x81\x05" + der(0x02, b"\x01\x02\x03"),
        b"\x3f\x01\x00",
        b"\x30\x81\x41" + der(0xA6, der_fwid(FWID)),
        b"\x30\x82\x00\x41" + der(0xA6, der_fwid(FWID)),
    ],
)
def test_a_dice_extension_of_another_form_is_refused(extension: bytes) -> None:
    with pytest.raises(Malformed):
        parse_dice_fwid(extension)


def test_ten_thousand_random_reports_raise_nothing_but_malformed() -> None:
    chance = random.Random(2)
    for _ in range(10_000):
        opaque = chance.randbytes(chance.randrange(0, 40))
        with contextlib.suppress(Malformed):
            parsed = parse_report(
                encode_report(Report(blocks=[b"\x01\x01\x03\x00\x80\0\0"], opaque=opaque))
                + bytes(96)
            )
            gpu_identity(parsed)


def test_ten_thousand_random_extensions_raise_nothing_but_malformed() -> None:
    chance = random.Random(3)
    good = composite_device_id(), dice_tcb_info(FWID)
    for round_ in range(10_000):
        changed = bytearray(good[round_ % 2])
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        with contextlib.suppress(Malformed):
            parse_dice_fwid(bytes(changed))

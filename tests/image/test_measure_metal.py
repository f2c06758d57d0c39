"""What SEV-SNP and TDX will measure, against another implementation and against the specifications."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevsnpmeasure.guest import calc_launch_digest  # type: ignore[import-untyped]
from sevsnpmeasure.sev_mode import SevMode  # type: ignore[import-untyped]
from sevsnpmeasure.vcpu_types import CPU_SIGS  # type: ignore[import-untyped]

from appliance.rats.reference import parse_reference_values
from image.measure.events import extend, kernel_events
from image.measure.firmware import FirmwareError, table
from image.measure.sev_snp import Guest, launch_digest
from image.measure.tdx import mrtd, rtmr1, rtmr2
from image.measure.uki import PeError, authenticode
from tests.image.firmware_files import (
    HASHES_AT,
    METADATA_BEFORE_END,
    SEV_HASHES,
    SEV_METADATA,
    SEV_RESET,
    SEV_SECTIONS,
    SIZE,
    TDX_METADATA,
    TDX_SECTIONS,
    firmware_file,
    sev_firmware,
    tdx_firmware,
)
from tests.image.pe_images import pe_image

ROOT = Path(__file__).parent.parent.parent

KERNEL = pe_image({".text": b"kernel"})
CMDLINE = f"ro roothash={'0' * 63}7"
SECTIONS = {
    ".linux": KERNEL,
    ".osrel": b"ID=dcv\n",
    ".cmdline": CMDLINE.encode(),
    ".initrd": b"initrd bytes!",
    ".uname": b"6.12.117",
    ".sbat": b"sbat,1\n",
}
UKI = pe_image(SECTIONS)
GUEST = Guest(4, "EPYC-v4")


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


# SEV-SNP.


def by_sev_snp_measure(folder: Path, firmware: bytes, uki: bytes, guest: Guest) -> bytes:
    """The same from the package of that name, which has its own parser and its own tables."""
    (folder / "firmware.fd").write_bytes(firmware)
    (folder / "uki.efi").write_bytes(uki)
    files = (str(folder / "firmware.fd"), str(folder / "uki.efi"))
    signature = CPU_SIGS[guest.vcpu_type]
    digest: bytes = calc_launch_digest(
        SevMode.SEV_SNP, guest.vcpus, signature, *files, "", "", guest.features
    )
    return digest


@pytest.mark.parametrize("vcpu_type", sorted(CPU_SIGS))
@pytest.mark.parametrize(("vcpus", "features"), [(1, 1), (2, 0x21), (17, 1)])
def test_the_launch_digest_is_what_sev_snp_measure_says(
    tmp_path: Path, vcpu_type: str, vcpus: int, features: int
) -> None:
    guest = Guest(vcpus, vcpu_type, features)
    firmware = sev_firmware()
    assert launch_digest(firmware, UKI, guest) == by_sev_snp_measure(tmp_path, firmware, UKI, guest)


@pytest.mark.parametrize(
    "guest", [Guest(5, "EPYC-v4"), Guest(4, "EPYC-Milan"), Guest(4, "EPYC-v4", 0x21)]
)
def test_another_guest_has_another_digest(guest: Guest) -> None:
    firmware = sev_firmware()
    assert launch_digest(firmware, UKI, guest) != launch_digest(firmware, UKI, GUEST)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_part_of_the_uki_is_in_the_launch_digest(name: str) -> None:
    changed = pe_image({**SECTIONS, name: SECTIONS[name] + b"!"})
    firmware = sev_firmware()
    assert launch_digest(firmware, changed, GUEST) != launch_digest(firmware, UKI, GUEST)


@pytest.mark.parametrize("offset", [0, SIZE // 2, SIZE - 1])
def test_every_byte_of_the_firmware_is_in_the_launch_digest(offset: int) -> None:
    changed = bytearray(sev_firmware())
    changed[offset] ^= 1
    assert launch_digest(bytes(changed), UKI, GUEST) != launch_digest(sev_firmware(), UKI, GUEST)


def test_a_firmware_that_would_start_any_kernel_is_refused() -> None:
    with pytest.raises(FirmwareError, match="SNP_KERNEL_HASHES"):
        launch_digest(sev_firmware(SEV_SECTIONS[:-1]), UKI, GUEST)


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (SEV_METADATA, "no firmware for SEV-SNP"),
        (SEV_HASHES, "address of the table of hashes"),
        (SEV_RESET, "starts one processor only"),
    ],
    ids=["metadata", "hashes", "reset"],
)
def test_a_firmware_that_lacks_an_entry_is_refused(without: uuid.UUID, words: str) -> None:
    with pytest.raises(FirmwareError, match=words):
        launch_digest(sev_firmware(without=without), UKI, GUEST)


def test_one_processor_needs_no_reset_block() -> None:
    assert len(launch_digest(sev_firmware(without=SEV_RESET), UKI, Guest(1, "EPYC"))) == 48


@pytest.mark.parametrize(
    "sections",
    [
        (*SEV_SECTIONS, SEV_SECTIONS[-1]),
        (*SEV_SECTIONS, (0x90_0000, 0x1000, 7)),
        (*SEV_SECTIONS, (0x90_0001, 0x1000, 1)),
        (*SEV_SECTIONS, (0x90_0000, 0x1001, 1)),
        (*SEV_SECTIONS, (0x90_0000, 0xFFFF_F000, 1)),
        (*SEV_SECTIONS[:-1], (0x81_0000, 0x2000, 0x10)),
        (*SEV_SECTIONS[:-1], (0x82_0000, 0x1000, 0x10)),
        tuple((0x90_0000 + 0x1000 * index, 0x1000, 1) for index in range(65)),
    ],
    ids=["twice", "type", "address", "size", "huge", "two pages", "elsewhere", "many"],
)
def test_sections_that_cannot_be_are_refused(sections: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(FirmwareError):
        launch_digest(sev_firmware(sections), UKI, GUEST)


def test_hashes_that_leave_their_page_are_refused() -> None:
    with pytest.raises(FirmwareError, match="within its own page"):
        launch_digest(sev_firmware(hashes_at=HASHES_AT + 0x3C0), UKI, GUEST)


@pytest.mark.parametrize(
    "guest",
    [Guest(0, "EPYC"), Guest(4097, "EPYC"), Guest(1, "host"), Guest(1, "EPYC", 1 << 64)],
    ids=["none", "many", "type", "features"],
)
def test_a_guest_that_cannot_be_is_refused(guest: Guest) -> None:
    with pytest.raises(FirmwareError):
        launch_digest(sev_firmware(), UKI, guest)


# TDX.


def test_mrtd_is_every_page_and_every_measured_chunk() -> None:
    sections = ((0x2000, 0x1000, 0xFFFF_F000, 0x1000, 0, 1), (0, 0, 0x80_9000, 0x2000, 2, 0))
    firmware = tdx_firmware(sections)
    # Spelled out from "MRTD computation" of Intel's specification: 128 bytes a page that is added, 128
    # and the contents for each 256 bytes that are extended.
    stream = b"MEM.PAGE.ADD\0\0\0\0" + (0xFFFF_F000).to_bytes(8, "little") + bytes(104)
    for at in range(0, 4096, 256):
        stream += b"MR.EXTEND\0\0\0\0\0\0\0" + (0xFFFF_F000 + at).to_bytes(8, "little") + bytes(104)
        stream += firmware[0x2000 + at : 0x2000 + at + 256]
    for address in (0x80_9000, 0x80_A000):
        stream += b"MEM.PAGE.ADD\0\0\0\0" + address.to_bytes(8, "little") + bytes(104)
    assert mrtd(firmware) == sha384(stream)


@pytest.mark.parametrize(("offset", "same"), [(0, True), (0x1000, False), (SIZE - 1, False)])
def test_mrtd_has_the_code_and_not_the_variables(offset: int, same: bool) -> None:
    changed = bytearray(tdx_firmware())
    changed[offset] ^= 1
    assert (mrtd(bytes(changed)) == mrtd(tdx_firmware())) is same


@pytest.mark.parametrize("index", range(len(TDX_SECTIONS)))
def test_mrtd_has_where_each_section_lies(index: int) -> None:
    data, length, address, size, kind, attributes = TDX_SECTIONS[index]
    moved = (data, length, address - 0x100_0000 % address, size, kind, attributes)
    sections = (*TDX_SECTIONS[:index], moved, *TDX_SECTIONS[index + 1 :])
    assert mrtd(tdx_firmware(sections)) != mrtd(tdx_firmware())


@pytest.mark.parametrize(
    "section",
    [
        (0, 0, 0x90_0000, 0x1000, 4, 0),
        (0, 0, 0x90_0000, 0x1000, 3, 2),
        (0, 0, 0x90_0000, 0x1000, 3, 1),
        (0, 0x1000, 0x90_0000, 0x2000, 0, 1),
        (SIZE, 0x1000, 0x90_0000, 0x1000, 0, 1),
        (0, 0, 0x90_0001, 0x1000, 3, 0),
        (0, 0, 0x90_0000, 0x1001, 3, 0),
        (0, 0, 0x90_0000, 1 << 40, 3, 0),
        (0, 0, 1 << 60, 0x1000, 3, 0),
    ],
    ids=["type", "attribute", "host's", "short", "outside", "address", "size", "huge", "far"],
)
def test_a_section_that_cannot_be_measured_is_refused(
    section: tuple[int, int, int, int, int, int],
) -> None:
    with pytest.raises(FirmwareError):
        mrtd(tdx_firmware((*TDX_SECTIONS, section)))


def test_a_firmware_that_is_none_for_tdx_is_refused() -> None:
    with pytest.raises(FirmwareError, match="no firmware for TDX"):
        mrtd(sev_firmware())
    with pytest.raises(FirmwareError, match="version 1"):
        mrtd(tdx_firmware(version=2))


def test_rtmr_1_is_the_programs_in_the_order_of_a_direct_start() -> None:
    said = (b"Calling EFI Application from Boot Option", bytes(4))
    left = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
    events = (
        *(authenticode(UKI, "sha384"), *map(sha384, said), authenticode(KERNEL, "sha384")),
        *map(sha384, left),
    )
    assert rtmr1(UKI) == extend(events, "sha384")


def cpio_member(inode: int, name: str, mode: int, contents: bytes) -> bytes:
    """One of the stub's, by Linux's documentation of the format."""
    fields = [inode, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name) + 1, 0]
    head = "070701" + "".join(f"{field:08x}" for field in fields) + name + "\0"
    return head.encode().ljust(-(-len(head) // 4) * 4, b"\0") + contents


def test_rtmr_2_is_the_sections_then_what_the_kernel_gets() -> None:
    events = []
    for name in (".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"):
        events += [sha384(name.encode() + b"\0"), sha384(SECTIONS[name])]
    events.append(sha384((CMDLINE + "\0").encode("utf-16-le")))
    initrd = SECTIONS[".initrd"].ljust(16, b"\0")
    initrd += cpio_member(1, ".extra", 0o40555, b"")
    initrd += cpio_member(
        2, ".extra/os-release", 0o100444, SECTIONS[".osrel"].ljust(8, b"\0")
    ).replace(b"00000008", b"00000007")
    initrd += cpio_member(0, "TRAILER!!!", 0, b"").replace(b"0000000b", b"0000000B")
    events.append(sha384(initrd))
    assert rtmr2(UKI) == extend(events, "sha384")


def test_an_initrd_alone_is_measured_as_it_is() -> None:
    few = pe_image({name: SECTIONS[name] for name in (".linux", ".cmdline", ".initrd")})
    assert kernel_events(few, "sha384")[1] == sha384(SECTIONS[".initrd"])


def test_control_characters_of_the_command_line_are_spaces() -> None:
    untidy = pe_image({**SECTIONS, ".cmdline": b"\n ro\tquiet \n\0"})
    assert kernel_events(untidy, "sha384")[0] == sha384("ro quiet\0".encode("utf-16-le"))


@pytest.mark.parametrize("name", SECTIONS)
def test_every_part_of_the_uki_is_in_the_registers(name: str) -> None:
    changed = pe_image({**SECTIONS, name: SECTIONS[name] + b"!"})
    assert rtmr1(changed) != rtmr1(UKI)
    assert rtmr2(changed) != rtmr2(UKI)


@pytest.mark.parametrize(
    "sections",
    [
        {name: data for name, data in SECTIONS.items() if name != ".initrd"},
        {name: data for name, data in SECTIONS.items() if name != ".cmdline"},
        {**SECTIONS, ".cmdline": b" \n"},
        {**SECTIONS, ".cmdline": "ro größe".encode()},
    ],
    ids=["no initrd", "no command line", "empty", "not ascii"],
)
def test_what_the_kernel_measures_is_not_guessed(sections: dict[str, bytes]) -> None:
    with pytest.raises(PeError):
        rtmr2(pe_image(sections))


# Files that are no firmware.


@pytest.mark.parametrize(
    "data",
    [b"", bytes(4096), bytes(100), sev_firmware()[:-4096], sev_firmware()[1:], sev_firmware()[:64]],
    ids=["empty", "zeros", "short", "end cut", "start cut", "little"],
)
def test_what_is_no_firmware_is_refused(data: bytes) -> None:
    for measure in (mrtd, lambda data: launch_digest(data, UKI, GUEST)):
        with pytest.raises(FirmwareError):
            measure(data)


def test_a_table_that_leads_out_of_itself_is_refused() -> None:
    long = firmware_file({TDX_METADATA: bytes(4)})
    for length in (0, 17, 0xFFFF):
        broken = bytearray(long)
        struct.pack_into("<H", broken, len(long) - 32 - 18 - 18, length)
        with pytest.raises(FirmwareError, match="within the table"):
            table(bytes(broken))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_firmware_is_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    broken = bytearray(data.draw(st.sampled_from([sev_firmware(), tdx_firmware()])))
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([METADATA_BEFORE_END, 160]))
        at = len(broken) - near + data.draw(st.integers(0, 120))
        broken[at] = data.draw(st.integers(0, 255))
    for measure in (mrtd, lambda data: launch_digest(data, b"kernel", Guest(1, "EPYC"))):
        try:
            digest = measure(bytes(broken))
        except FirmwareError:
            continue
        assert len(digest) == 48


# The program.


def measure_files(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "dcv.efi").write_bytes(UKI)
    (tmp_path / "sev.fd").write_bytes(sev_firmware())
    (tmp_path / "tdx.fd").write_bytes(tdx_firmware())
    command = [sys.executable, "-m", "image.measure", str(tmp_path / "dcv.efi")]
    facts = ["--version", "0.1.0", "--commit", "abc", "--profile", "test"]
    out = ["--out", str(tmp_path / "out.json")]
    return subprocess.run(
        [*command, *facts, *out, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_what_is_given_is_written_as_a_relying_party_reads_it(tmp_path: Path) -> None:
    snp = ("--snp-firmware", str(tmp_path / "sev.fd"), "--vcpus", "8,4", "--vcpu-type", "EPYC-v4")
    done = measure_files(tmp_path, *snp, "--tdx-firmware", str(tmp_path / "tdx.fd"))
    assert done.returncode == 0, done.stderr
    (image,) = parse_reference_values((tmp_path / "out.json").read_bytes()).images
    digests = {
        launch_digest(sev_firmware(), UKI, Guest(count, "EPYC-v4")).hex() for count in (4, 8)
    }
    assert image.sev_snp == {"measurement": digests}
    assert image.tdx == {
        "mrtd": {mrtd(tdx_firmware()).hex()},
        "rtmr1": {rtmr1(UKI).hex()},
        "rtmr2": {rtmr2(UKI).hex()},
    }
    (written,) = json.loads((tmp_path / "out.json").read_text())["images"]
    assert written["provenance"] == {
        "profile": "test",
        "sev_snp": {
            "firmware": f"sha256:{hashlib.sha256(sev_firmware()).hexdigest()}",
            "vcpus": [4, 8],
            "vcpu_type": "EPYC-v4",
            "features": 1,
        },
        "tdx": {"firmware": f"sha256:{hashlib.sha256(tdx_firmware()).hexdigest()}"},
    }


def test_what_is_not_given_is_left_out(tmp_path: Path) -> None:
    assert measure_files(tmp_path).returncode == 0
    (image,) = json.loads((tmp_path / "out.json").read_text())["images"]
    assert not {"sev_snp", "tdx"} & image.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tdx-firmware", "sev.fd"), "sev.fd: expected TDX metadata"),
        (
            ("--snp-firmware", "tdx.fd", "--vcpus", "1", "--vcpu-type", "EPYC"),
            "tdx.fd: expected SEV metadata",
        ),
        (
            ("--snp-firmware", "sev.fd", "--vcpus", "1", "--vcpu-type", "host"),
            "expected a processor type of EPYC, ",
        ),
        (("--tdx-firmware", "missing.fd"), "No such file"),
    ],
    ids=["sev for tdx", "tdx for sev", "type", "missing"],
)
def test_what_cannot_be_measured_is_one_line_and_no_file(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    there = [str(tmp_path / one) if one.endswith(".fd") else one for one in options]
    done = measure_files(tmp_path, *there)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("option", ["--snp-firmware", "--vcpus", "--vcpu-type"])
def test_firmware_and_processors_are_told_together(tmp_path: Path, option: str) -> None:
    done = measure_files(tmp_path, option, "8")
    assert done.returncode == 2
    assert "--snp-firmware, --vcpus and --vcpu-type go together" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vcpus", "8"), "--snp-firmware, --vcpus and --vcpu-type go together"),
        (("--tdx-firmware", "missing.fd"), "missing.fd is not a file"),
        (("--tdx-firmware", "x.fd", "--output", "gcp"), "are for --output metal"),
    ],
    ids=["processors", "missing", "cloud"],
)
def test_a_build_says_so_before_it_begins(options: tuple[str, ...], words: str) -> None:
    command = [sys.executable, str(ROOT / "image/build.py"), "test", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert words in done.stderr

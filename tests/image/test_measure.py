"""Predicted registers, against systemd's own tool and against what a machine quoted."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.rats.reference import parse_reference_values
from image.measure.events import extend
from image.measure.registers import pcr04, pcr07_without_keys, pcr11
from image.measure.uki import PeError, authenticode, parse_pe
from tests.image.pe_images import HEADERS, pe_image

ROOT = Path(__file__).parent.parent.parent

KERNEL = pe_image({".text": b"kernel"})
ROOTHASH = "0" * 63 + "7"
SECTIONS = {
    ".linux": b"kernel bytes",
    ".osrel": b"ID=dcv\n",
    ".cmdline": f"ro roothash={ROOTHASH}".encode(),
    ".initrd": b"initrd bytes",
    ".uname": b"6.12.117",
    ".sbat": b"sbat,1\n",
    ".pcrpkey": b"key",
}

# systemd-measure (257.13) calculate --bank=sha256 with these sections' contents as files.
BY_SYSTEMD = {
    (): "11f84ae4886068f2efa4594cde0b27c0517cf425b4ceed18b364d3a3174a8d30",
    ("sysinit", "ready"): "ba1870d00d15f4ee6a48daef3416edca8a78ef0ce89529659d8883ab8f4b7450",
    ("enter-initrd", "leave-initrd", "sysinit", "ready"): (
        "0f0da9f25ebf456623989bb4f0707d40f59dbac96ae1570c15049700b831ec16"
    ),
}


@pytest.mark.parametrize("phases", BY_SYSTEMD, ids=":".join)
def test_pcr_11_is_what_systemd_measure_says(phases: tuple[str, ...]) -> None:
    assert pcr11(pe_image(SECTIONS), phases).hex() == BY_SYSTEMD[phases]


def test_a_section_that_is_not_there_is_not_measured() -> None:
    few = pe_image({name: SECTIONS[name] for name in (".linux", ".cmdline")})
    # The same tool, at its phase sysinit:ready, with --linux and --cmdline alone.
    assert (
        pcr11(few, ("sysinit", "ready")).hex()
        == "dc40459a911cc41b588e3a7e7d915edf3040d2ee86ab57594c0e16034996651b"
    )


def test_the_order_in_the_file_does_not_matter_and_a_signature_of_pcrs_is_not_measured() -> None:
    turned = dict(reversed(SECTIONS.items()))
    assert pcr11(pe_image({".pcrsig": b"{}", **turned})) == pcr11(pe_image(SECTIONS))


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_of_ours_is_in_pcr_11(name: str) -> None:
    changed = {**SECTIONS, name: SECTIONS[name] + b"!"}
    assert pcr11(pe_image(changed)) != pcr11(pe_image(SECTIONS))


def test_pcr_7_is_that_of_a_machine_without_secure_boot_keys() -> None:
    # Quoted by a machine in QEMU with OVMF 2022.11 (Debian 12), 2026-11-23.
    assert (
        pcr07_without_keys().hex()
        == "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068"
    )


def test_pcr_4_is_the_firmwares_two_events_and_both_programs() -> None:
    uki = pe_image({**SECTIONS, ".linux": KERNEL})
    events = (b"Calling EFI Application from Boot Option", bytes(4))
    digests = [hashlib.sha256(one).digest() for one in events]
    assert pcr04(uki) == extend([*digests, authenticode(uki), authenticode(KERNEL)])


def test_a_uki_without_a_kernel_has_no_pcr_4() -> None:
    with pytest.raises(PeError, match="linux"):
        pcr04(pe_image({".cmdline": b"ro"}))


@pytest.mark.parametrize("magic", [0x10B, 0x20B])
def test_a_signature_does_not_change_what_is_hashed(magic: int) -> None:
    plain = pe_image(SECTIONS, magic=magic)
    signed = pe_image(SECTIONS, magic=magic, checksum=0x1234, certificates=b"\x08\0\0\0PKCS")
    assert signed != plain
    assert authenticode(signed) == authenticode(plain)


def test_what_lies_behind_the_sections_is_hashed() -> None:
    assert authenticode(pe_image(SECTIONS, trailer=b"more")) != authenticode(pe_image(SECTIONS))


@pytest.mark.parametrize("offset", [0x80, HEADERS, HEADERS + 20])
def test_a_changed_byte_changes_the_hash(offset: int) -> None:
    data = bytearray(pe_image(SECTIONS))
    data[offset] ^= 1
    assert authenticode(bytes(data)) != authenticode(pe_image(SECTIONS))


def test_contents_are_what_is_loaded() -> None:
    image = parse_pe(pe_image(SECTIONS))
    assert {one.name: image.section(one.name) for one in image.sections} == SECTIONS
    assert image.section(".nothing") is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_images_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    whole = pe_image(SECTIONS)
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if broken:
            at = data.draw(st.integers(0, min(len(broken), HEADERS) - 1))
            broken[at] = data.draw(st.integers(0, 255))
    try:
        digest = authenticode(bytes(broken))
    except PeError:
        return
    assert len(digest) == 32


def test_the_file_is_what_a_relying_party_reads(tmp_path: Path) -> None:
    uki = tmp_path / "dcv.efi"
    uki.write_bytes(pe_image({**SECTIONS, ".linux": KERNEL}))
    done = measure(uki, tmp_path / "reference-values.json")
    assert done.returncode == 0, done.stderr
    values = parse_reference_values((tmp_path / "reference-values.json").read_bytes())
    digest = hashlib.sha256(uki.read_bytes()).hexdigest()
    image = values.of(f"sha256:{digest}")
    assert image is not None
    assert (image.version, image.commit, image.roothash) == ("0.1.0", "abc", ROOTHASH)
    assert image.pcrs["pcr11"] == {pcr11(uki.read_bytes()).hex()}
    assert image.pcrs["pcr4"] == {pcr04(uki.read_bytes()).hex()}
    assert image.pcrs["pcr7"] == {pcr07_without_keys().hex()}


@pytest.mark.parametrize("cmdline", [b"ro", b"ro roothash=abc", b"roothash=%s roothash=%s"])
def test_a_command_line_that_names_no_one_root_is_refused(tmp_path: Path, cmdline: bytes) -> None:
    text = cmdline.replace(b"%s", ROOTHASH.encode())
    uki = tmp_path / "dcv.efi"
    uki.write_bytes(pe_image({**SECTIONS, ".linux": KERNEL, ".cmdline": text}))
    done = measure(uki, tmp_path / "out.json")
    assert done.returncode == 1
    assert "expected one roothash=" in done.stderr
    assert not (tmp_path / "out.json").exists()


def measure(uki: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "image.measure", str(uki), "--out", str(out)]
    facts = ["--version", "0.1.0", "--commit", "abc", "--profile", "test"]
    return subprocess.run([*command, *facts], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_document_names_how_it_came_to_be(tmp_path: Path) -> None:
    uki = tmp_path / "dcv.efi"
    uki.write_bytes(pe_image({**SECTIONS, ".linux": KERNEL}))
    assert measure(uki, tmp_path / "out.json").returncode == 0
    (image,) = json.loads((tmp_path / "out.json").read_text())["images"]
    assert image["provenance"] == {"profile": "test"}

"""Reference values of an image: `python -m image.measure UKI --out FILE`.

Written in the form that `appliance.rats.reference` reads, for `dcv verify --reference`. The image
is known by the SHA-256 of its UKI, whose command line holds the hash of the root.

What a TPM quotes follows from the UKI alone. What SEV-SNP and TDX measure of a machine that QEMU
starts with the UKI as its kernel depends on its firmware too, and is written where that is given:

    --snp-firmware OVMF.amdsev.fd --vcpus 8,16 --vcpu-type EPYC-v4
    --tdx-firmware OVMF.inteltdx.fd
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from image.measure.firmware import FirmwareError
from image.measure.registers import pcr04, pcr07_without_keys, pcr11
from image.measure.sev_snp import SNP_ACTIVE, Guest, launch_digest
from image.measure.tdx import mrtd, rtmr1, rtmr2
from image.measure.uki import PeError, parse_pe

ROOTHASH = re.compile(rb"(?:^|\s)roothash=([0-9a-f]{64})(?=[\s\0]|$)")

MAX_ALTERNATIVES = 64
"""What a relying party reads of one value (appliance/rats/reference.py)."""

Document = dict[str, object]
T = TypeVar("T")


def digest_name(data: bytes) -> str:
    """As it is written in documents."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def of_uki(uki: bytes) -> Document:
    """What a machine with a TPM shows that boots it from its disk.

    Raises:
        PeError: the UKI is not a PE image, has no kernel, or its command line names no root.
    """
    roots = ROOTHASH.findall(parse_pe(uki).section(".cmdline") or b"")
    if len(roots) != 1:
        raise PeError("expected one roothash= in the section .cmdline")
    return {
        "image_digest": digest_name(uki),
        "roothash": roots[0].decode(),
        "pcrs": {
            "4": [pcr04(uki).hex()],
            "7": [pcr07_without_keys().hex()],
            "11": [pcr11(uki).hex()],
        },
    }


def of_sev_snp(firmware: Path, uki: Path, guests: list[Guest]) -> Document:
    """What SEV-SNP measures of a direct start: one alternative a guest."""
    kernel = uki.read_bytes()
    digests = _from(firmware, lambda data: [launch_digest(data, kernel, one) for one in guests])
    return {"measurement": [one.hex() for one in digests]}


def of_tdx(firmware: Path, uki: Path) -> Document:
    """What TDX measures of a direct start."""
    return {
        "mrtd": [_from(firmware, mrtd).hex()],
        "rtmr1": [_from(uki, rtmr1).hex()],
        "rtmr2": [_from(uki, rtmr2).hex()],
    }


def main() -> int:
    """Exit status 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m image.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("uki", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--snp-firmware", type=Path, help="as QEMU's -bios")
    parser.add_argument("--vcpus", type=_counts, help="as QEMU's -smp; several are alternatives")
    parser.add_argument("--vcpu-type", help="as QEMU's -cpu")
    parser.add_argument(
        "--snp-features",
        type=_number,
        default=SNP_ACTIVE,
        help="SEV_FEATURES; default: %(default)#x, SNP and nothing else",
    )
    parser.add_argument("--tdx-firmware", type=Path, help="as QEMU's -bios")
    arguments = parser.parse_args()
    together = {bool(one) for one in (arguments.snp_firmware, arguments.vcpus, arguments.vcpu_type)}
    if len(together) > 1:
        parser.error("--snp-firmware, --vcpus and --vcpu-type go together")

    image: Document = {"version": arguments.version, "commit": arguments.commit}
    image |= _from(arguments.uki, of_uki)
    provenance: Document = {"profile": arguments.profile}
    if (firmware := arguments.snp_firmware) is not None:
        features, kind = arguments.snp_features, arguments.vcpu_type
        guests = [Guest(count, kind, features) for count in arguments.vcpus]
        image["sev_snp"] = of_sev_snp(firmware, arguments.uki, guests)
        provenance["sev_snp"] = {
            "firmware": _from(firmware, digest_name),
            "vcpus": arguments.vcpus,
            "vcpu_type": kind,
            "features": features,
        }
    if (firmware := arguments.tdx_firmware) is not None:
        image["tdx"] = of_tdx(firmware, arguments.uki)
        provenance["tdx"] = {"firmware": _from(firmware, digest_name)}
    image["provenance"] = provenance
    document = {"api_version": "dcv/1", "images": [image]}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _from(path: Path, measure: Callable[[bytes], T]) -> T:
    """What is measured of a file; one that cannot be ends the program, with its name."""
    try:
        return measure(path.read_bytes())
    except (PeError, FirmwareError, OSError) as error:
        sys.exit(f"measure: {path}: {error}")


def _number(text: str) -> int:
    """Decimal, or `0x21`."""
    return int(text, 0)


def _counts(text: str) -> list[int]:
    """`8,16`."""
    counts = sorted({int(one) for one in text.split(",")})
    if len(counts) > MAX_ALTERNATIVES:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_ALTERNATIVES}")
    return counts


if __name__ == "__main__":
    sys.exit(main())

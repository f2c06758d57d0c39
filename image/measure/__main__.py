"""Reference values of an image: `python -m image.measure UKI --out FILE`.

Written in the form that `appliance.rats.reference` reads, for `dcv verify --reference`. The image
is known by the SHA-256 of its UKI, whose command line holds the hash of the root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from image.measure.registers import pcr04, pcr07_without_keys, pcr11
from image.measure.uki import PeError, parse_pe

ROOTHASH = re.compile(rb"(?:^|\s)roothash=([0-9a-f]{64})(?=[\s\0]|$)")


def reference_values(uki: bytes, *, version: str, commit: str, profile: str) -> dict[str, object]:
    """The document.

    Raises:
        PeError: the UKI is not a PE image, has no kernel, or its command line names no root.
    """
    roots = ROOTHASH.findall(parse_pe(uki).section(".cmdline") or b"")
    if len(roots) != 1:
        raise PeError("expected one roothash= in the section .cmdline")
    return {
        "api_version": "dcv/1",
        "images": [
            {
                "image_digest": f"sha256:{hashlib.sha256(uki).hexdigest()}",
                "version": version,
                "commit": commit,
                "roothash": roots[0].decode(),
                "pcrs": {
                    "4": [pcr04(uki).hex()],
                    "7": [pcr07_without_keys().hex()],
                    "11": [pcr11(uki).hex()],
                },
                "provenance": {"profile": profile},
            }
        ],
    }


def main() -> int:
    """Exit status 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m image.measure", description=__doc__)
    parser.add_argument("uki", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        document = reference_values(
            arguments.uki.read_bytes(),
            version=arguments.version,
            commit=arguments.commit,
            profile=arguments.profile,
        )
    except (PeError, OSError) as error:
        print(f"measure: {arguments.uki}: {error}", file=sys.stderr)
        return 1
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

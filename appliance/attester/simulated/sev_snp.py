"""AMD's format, written: a SEV-SNP attestation report, version 3.

Source: 56860 (SEV Secure Nested Paging Firmware ABI) revision 1.56, table 22.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
SCALAR_BYTES = 72

POLICY = 1 << 16 | 1 << 17
"""SMT is allowed; bit 17 is reserved and must be one."""

POLICY_DEBUG = 1 << 19

MEASUREMENT = hashlib.sha384(b"simulated launch measurement").digest()
TCB = (3, 0, 8, 115)
"""Boot loader, TEE, SNP, microcode."""

MILAN = (0x19, 0x01, 0x01)
"""CPUID family, model, stepping."""


def encode_report(
    key: ec.EllipticCurvePrivateKey,
    *,
    report_data: bytes,
    chip_id: bytes,
    report_id: bytes,
    policy: int = POLICY,
    tcb: Sequence[int] = TCB,
) -> bytes:
    """The report of a guest at VMPL 0, signed by a VCEK.

    Args:
        key: P-384, the VCEK. report_data, chip_id: 64 bytes. report_id: 32 bytes.
    """
    assert len(report_data) == len(chip_id) == 64
    assert len(report_id) == 32
    bootloader, tee, snp, microcode = tcb
    version = bytes([bootloader, tee, 0, 0, 0, 0, snp, microcode])
    firmware = bytes([4, 55, 1, 0])  # build, minor, major
    fields = {
        0x000: (3).to_bytes(4, "little"),
        0x008: policy.to_bytes(8, "little"),
        0x034: (1).to_bytes(4, "little"),  # ECDSA P-384 with SHA-384
        0x038: version,  # CURRENT_TCB
        0x040: (1).to_bytes(8, "little"),  # PLATFORM_INFO: SMT is on
        0x050: report_data,
        0x090: MEASUREMENT,
        0x140: report_id,
        0x160: b"\xff" * 32,  # REPORT_ID_MA: there is no migration agent
        0x180: version,  # REPORTED_TCB
        0x188: bytes(MILAN),
        0x1A0: chip_id,
        0x1E0: version,  # COMMITTED_TCB
        0x1E8: firmware,  # current
        0x1EC: firmware,  # committed
        0x1F0: version,  # LAUNCH_TCB
    }
    report = bytearray(REPORT_BYTES)
    for offset, value in fields.items():
        report[offset : offset + len(value)] = value
    signed = bytes(report[:SIGNED_BYTES])
    for place, scalar in enumerate(
        decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
    ):
        start = SIGNED_BYTES + place * SCALAR_BYTES
        report[start : start + SCALAR_BYTES] = scalar.to_bytes(SCALAR_BYTES, "little")
    return bytes(report)

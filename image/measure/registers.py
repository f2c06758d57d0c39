"""What a TPM's PCRs will hold once the image has booted from its disk: one function a register.

    PCR 4   the firmware starts our UKI, whose stub starts the kernel inside of it
    PCR 7   Secure Boot's state, for a machine without keys; with keys it is the machine's own
    PCR 11  the stub measures each section of the UKI

PCR 0 to 3 are the firmware's and the machine's, 5 the disk's table, 9 what the kernel measures of its
inputs (PCR 11 has all of ours in it), 12 must stay zero. systemd's own measurements, of the boot's
phases into 11 and of the machine's identifier into 15, are off in our image: they would come after the
firmware's log is closed.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable

from image.measure.events import (
    CALLING_APPLICATION,
    SEPARATOR,
    extend,
    hashed,
    program_events,
    section_events,
)

BANK = "sha256"

GLOBAL_VARIABLE = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
SECURITY_DATABASE = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")

SECURE_BOOT_VARIABLES = (
    ("SecureBoot", GLOBAL_VARIABLE),
    ("PK", GLOBAL_VARIABLE),
    ("KEK", GLOBAL_VARIABLE),
    ("db", SECURITY_DATABASE),
    ("dbx", SECURITY_DATABASE),
)
"""In the order in which they are measured (TCG PC Client Platform Firmware Profile 1.06, 3.3.4.8)."""


def pcr04(uki: bytes) -> bytes:
    """The firmware's boot manager starts the UKI, without a boot loader or shim before it.

    Raises:
        PeError: the UKI, or the kernel in it, is not a PE image.
    """
    before = (hashed(CALLING_APPLICATION, BANK), hashed(SEPARATOR, BANK))
    return extend((*before, *program_events(uki, BANK)), BANK)


def pcr07_without_keys() -> bytes:
    """Secure Boot is off, and four variables are not there. So says OVMF; a cloud's firmware may
    have other variables, and then PCR 7 is taken from the machine, once, by who trusts it then."""
    values = {"SecureBoot": b"\0"}
    variables = (
        _variable(name, vendor, values.get(name, b"")) for name, vendor in SECURE_BOOT_VARIABLES
    )
    return extend((*(hashed(one, BANK) for one in variables), hashed(SEPARATOR, BANK)), BANK)


def pcr11(uki: bytes, phases: Iterable[str] = ()) -> bytes:
    """Each section that is there, then the phases' words.

    Args:
        phases: of systemd-pcrphase, as `sysinit` and `ready`; our image has none.

    Raises:
        PeError: the UKI is not a PE image.
    """
    words = (hashed(word.encode(), BANK) for word in phases)
    return extend((*section_events(uki, BANK), *words), BANK)


def _variable(name: str, vendor: uuid.UUID, value: bytes) -> bytes:
    """UEFI_VARIABLE_DATA (10.2.6)."""
    head = vendor.bytes_le + struct.pack("<QQ", len(name), len(value))
    return head + name.encode("utf-16-le") + value

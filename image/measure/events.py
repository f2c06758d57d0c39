"""The events of a boot: what firmware, stub and kernel measure of a UKI, each in its order.

Every function takes the hash: SHA-256 for the PCRs that a TPM quotes, SHA-384 for a TDX guest's RTMRs.
The stub is systemd's of version 257, the kernel's own is that of Linux 6.12.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from image.measure.uki import PeError, PeImage, authenticode, parse_pe

SEPARATOR = bytes(4)
"""EV_SEPARATOR: the firmware is done (TCG PC Client Platform Firmware Profile 1.06, 3.3.4.1)."""

CALLING_APPLICATION = b"Calling EFI Application from Boot Option"
"""EV_EFI_ACTION, same place, 10.4.4; without a terminating zero."""

EXIT_INVOKED = b"Exit Boot Services Invocation"
EXIT_SUCCEEDED = b"Exit Boot Services Returned with Success"
"""Two more: the kernel takes the machine over."""

MEASURED_SECTIONS = (
    *(".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat"),
    *(".pcrpkey", ".profile", ".dtbauto", ".hwids"),
)
"""The stub's canonical order; `.pcrsig` is not measured (systemd 257, src/fundamental/uki.h)."""

HANDED_ON = {
    ".pcrsig": "tpm2-pcr-signature.json",
    ".pcrpkey": "tpm2-pcr-public-key.pem",
    ".osrel": "os-release",
    ".profile": "profile",
}
"""Sections that the stub appends to the initrd as archives of one file, in this order (stub.c)."""

EXTRA = ".extra"
"""The folder of these files."""

FOLDER_MODE, FILE_MODE = 0o040555, 0o100444

TRAILER = b"070701%032d%08d%048d0000000B%08dTRAILER!!!\0\0\0\0" % (0, 1, 0, 0)
"""Of the stub's archives; the one number in upper case."""


def extend(events: Iterable[bytes], algorithm: str = "sha256") -> bytes:
    """The register after these digests, from zero."""
    register = bytes(hashlib.new(algorithm).digest_size)
    for event in events:
        register = hashed(register + event, algorithm)
    return register


def hashed(data: bytes, algorithm: str) -> bytes:
    """One digest."""
    return hashlib.new(algorithm, data).digest()


def program_events(uki: bytes, algorithm: str) -> tuple[bytes, bytes]:
    """The UKI and the kernel in it, which the stub hands to the firmware's LoadImage as well.

    Raises:
        PeError: one of them is not a PE image.
    """
    kernel = parse_pe(uki).section(".linux")
    if kernel is None:
        raise PeError("expected a section .linux")
    return authenticode(uki, algorithm), authenticode(kernel, algorithm)


def section_events(uki: bytes, algorithm: str) -> list[bytes]:
    """Of the stub: name (with its zero) and contents of each section that is there.

    Raises:
        PeError: the UKI is not a PE image.
    """
    image = parse_pe(uki)
    events = []
    for name in MEASURED_SECTIONS:
        contents = image.section(name)
        if contents is not None:
            events += [hashed(name.encode() + b"\0", algorithm), hashed(contents, algorithm)]
    return events


def kernel_events(uki: bytes, algorithm: str) -> tuple[bytes, bytes]:
    """Of the kernel: its command line and its initrd, as the stub hands them over.

    Raises:
        PeError: the UKI is not a PE image, or does not have both.
    """
    image = parse_pe(uki)
    return hashed(_load_options(image), algorithm), hashed(_initrd(image), algorithm)


def _load_options(image: PeImage) -> bytes:
    """UTF-16 with its zero; control characters are spaces, none of them at the ends."""
    contents = (image.section(".cmdline") or b"").partition(b"\0")[0]
    if not contents.isascii():
        raise PeError("expected a command line in ASCII")
    text = "".join(" " if one <= " " or one == "\x7f" else one for one in contents.decode())
    if not text.strip(" "):
        raise PeError("expected a section .cmdline")
    return (text.strip(" ") + "\0").encode("utf-16-le")


def _initrd(image: PeImage) -> bytes:
    """Microcode, our own, then the stub's archives, each padded to four bytes where there is more
    than one (systemd 257, combine_initrds)."""
    parts = [image.section(".ucode"), image.section(".initrd")]
    for section, name in HANDED_ON.items():
        contents = image.section(section)
        parts.append(None if contents is None else _archive(name, contents))
    there = [part for part in parts if part]
    if not image.section(".initrd"):
        raise PeError("expected a section .initrd")
    return there[0] if len(there) == 1 else b"".join(map(_padded, there))


def _archive(name: str, contents: bytes) -> bytes:
    """A cpio of the folder and one file in it, as the stub writes it (pack_cpio_literal)."""
    folder = _member(EXTRA, FOLDER_MODE, 1, b"")
    return folder + _member(f"{EXTRA}/{name}", FILE_MODE, 2, contents) + TRAILER


def _member(name: str, mode: int, inode: int, contents: bytes) -> bytes:
    """Linux, Documentation/driver-api/early-userspace/buffer-format.rst, magic 070701."""
    fields = (inode, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(contents)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)

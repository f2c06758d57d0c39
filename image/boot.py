"""Boot an image in QEMU with OVMF and a software TPM: `python image/boot.py DISK [--port N]`.

The host plays the cloud vendor: it makes the TPM's attestation key, certifies it under the
published test root (image/mkosi/test-tpm-root.pem) and puts the certificate where Google does.
Then the machine starts, with the disk as a read-only original, one forwarded port, and no way out.

Serial output goes to --log. Ends when the machine does, or on SIGINT or SIGTERM, which end it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.oid import NameOID

ROOT_FILE: Final = Path(__file__).resolve().parent / "mkosi/test-tpm-root.pem"
VENDOR: Final = b"DCV published test TPM vendor"
"""Anybody can issue under this root, which is why nobody may trust it."""

STRANGER: Final = b"somebody else"

AK_HANDLE: Final = "0x81010001"
AK_CERTIFICATE_INDEX: Final = "0x01C10000"
STORAGE_KEY_TEMPLATE: Final = (
    *("-g", "sha256", "-G", "ecc256:null:aes128cfb", "-a"),
    "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt",
)
STORAGE_KEY: Final = "storage-key"
"""Of `provision_tpm`: the file with the key that secrets are sealed to (image/seal.py)."""

AK_ATTRIBUTES: Final = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"

FIRMWARE: Final = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARIABLES: Final = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
GUEST_PORT: Final = 8443
CPUS: Final = "1"
"""QEMU without KVM lets one processor run an instruction while another one patches it, which a Linux
that starts does a lot: with two, one boot of a dozen ended in an oops."""
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
LIBC: Final = ctypes.CDLL(None)
START_S: Final = 10.0

# A filter of swtpm's own kills it on some kernels: then QEMU says "Broken pipe".
SWTPM: Final = ("swtpm", "socket", "--tpm2", "--seccomp", "action=none")


def main() -> int:
    """Returns QEMU's exit status: 0 also for a guest that panicked."""
    parser = argparse.ArgumentParser(prog="image/boot.py", description=__doc__)
    parser.add_argument("disk", type=Path)
    parser.add_argument("--port", type=int, default=GUEST_PORT, help="on 127.0.0.1")
    parser.add_argument("--log", type=Path, default=Path("serial.log"))
    parser.add_argument("--memory", default="2048", help="MiB")
    parser.add_argument("--cpus", default=CPUS)
    parser.add_argument("--accel", default="tcg,thread=multi", help="as QEMU spells it")
    parser.add_argument("--smbios", action="append", default=[], help="as QEMU spells it")
    parser.add_argument(
        "--kernel", type=Path, help="a UKI that is started instead of the disk's, as on bare metal"
    )
    parser.add_argument("--second-disk", type=Path, help="read-only original, not booted from")
    parser.add_argument(
        "--words",
        type=Path,
        help="socket to be made: what a test machine is asked (`test` profile)",
    )
    parser.add_argument(
        "--key",
        choices=("certified", "stranger", "none"),
        default="certified",
        help="the TPM's attestation key: as it should be, certified by somebody unknown, not there",
    )
    parser.add_argument(
        "--tpm", type=Path, help="folder of `provision_tpm`, of which a copy is used; not --key"
    )
    arguments = parser.parse_args()
    die_with_caller()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(130))
    with tempfile.TemporaryDirectory(prefix="dcv-vm-") as name:
        folder = Path(name)
        if arguments.tpm is not None:
            shutil.copytree(arguments.tpm / "tpm", folder / "tpm")
        elif arguments.key == "none":
            (folder / "tpm").mkdir()
        else:
            provision_tpm(folder, secret=VENDOR if arguments.key == "certified" else STRANGER)
        with vm_tpm(folder) as control:
            variables = shutil.copy(FIRMWARE_VARIABLES, folder / "variables.fd")
            command = qemu_command(
                arguments.disk,
                variables=Path(variables),
                tpm=control,
                log=arguments.log,
                port=arguments.port,
                memory=arguments.memory,
                cpus=arguments.cpus,
                accel=arguments.accel,
                smbios=arguments.smbios,
                kernel=arguments.kernel,
                second_disk=arguments.second_disk,
                words=arguments.words,
            )
            with running(command) as machine:
                return machine.wait()


def qemu_command(
    disk: Path,
    *,
    variables: Path,
    tpm: Path,
    log: Path,
    port: int,
    memory: str,
    cpus: str,
    accel: str,
    smbios: Sequence[str] = (),
    kernel: Path | None = None,
    second_disk: Path | None = None,
    words: Path | None = None,
) -> list[str]:
    """A machine with nothing in it but what is named here."""
    extra = [one for value in smbios for one in ("-smbios", value)]
    if kernel is not None:
        extra += ["-kernel", str(kernel)]
    if second_disk is not None:
        extra += ["-drive", f"if=none,id=second,format=raw,snapshot=on,file={second_disk}"]
        extra += ["-device", "virtio-blk-pci,drive=second"]
    if words is not None:
        extra += ["-chardev", f"socket,id=words,path={words},server=on,wait=off"]
        extra += ["-device", "virtio-serial-pci"]
        extra += ["-device", "virtserialport,chardev=words,name=dcv.test"]
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        # A guest that panics reboots at once (`panic=-1`), and is then over.
        "-no-reboot",
        *("-machine", "q35,smm=off", "-accel", accel, "-cpu", "max,la57=off"),
        *("-smp", cpus, "-m", memory),
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
        *("-drive", f"if=none,id=disk,format=raw,snapshot=on,file={disk}"),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=1"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{GUEST_PORT}"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-chardev", f"socket,id=tpm,path={tpm}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
        *("-device", "tpm-crb,tpmdev=tpm0", "-device", "virtio-rng-pci"),
        *("-serial", f"file:{log}"),
        *extra,
    ]


def provision_tpm(folder: Path, *, secret: bytes = VENDOR) -> None:
    """An attestation key with its certificate, as a cloud's vTPM has them when it is handed over, and
    the public part of the storage key, in a file.

    Args:
        folder: gets the TPM's state in `tpm`. secret: of who certifies it.
    """
    (folder / "tpm").mkdir()
    socket = folder / "provision"
    server = (
        *("--tpmstate", f"dir={folder / 'tpm'}", "--server", f"type=unixio,path={socket}"),
        *("--ctrl", f"type=unixio,path={socket}.ctrl", "--flags", "not-need-init,startup-clear"),
    )

    def tool(name: str, *arguments: str, stdin: bytes = b"") -> None:
        command = [name, "-T", f"swtpm:path={socket}", *arguments]
        subprocess.run(command, input=stdin, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    with running([*SWTPM, *server]):
        _wait_for(socket, Path(f"{socket}.ctrl"))
        tool(
            *("tpm2_createprimary", "-C", "e", "-G", "rsa2048:rsassa-sha256:null", "-g", "sha256"),
            *("-a", AK_ATTRIBUTES, "-c", "ak.ctx"),
        )
        tool("tpm2_flushcontext", "-t")
        tool("tpm2_readpublic", "-c", "ak.ctx", "-f", "der", "-o", "ak.der")
        tool("tpm2_flushcontext", "-t")
        tool("tpm2_evictcontrol", "-C", "o", "-c", "ak.ctx", AK_HANDLE)
        tool("tpm2_flushcontext", "-t")
        key = load_der_public_key((folder / "ak.der").read_bytes())
        assert isinstance(key, rsa.RSAPublicKey)
        certificate = certify(key, secret=secret)
        tool("tpm2_nvdefine", "-C", "o", "-s", str(len(certificate)), AK_CERTIFICATE_INDEX)
        tool("tpm2_nvwrite", "-C", "o", "-i", "-", AK_CERTIFICATE_INDEX, stdin=certificate)
        tool("tpm2_createprimary", "-C", "o", *STORAGE_KEY_TEMPLATE, "-c", "storage.ctx")
        tool("tpm2_flushcontext", "-t")
        tool("tpm2_readpublic", "-c", "storage.ctx", "-o", STORAGE_KEY)
        tool("tpm2_flushcontext", "-t")
        tool("tpm2_shutdown", "-c")


def certify(key: rsa.RSAPublicKey, *, secret: bytes = VENDOR) -> bytes:
    """A certificate of this key in the test vendor's name, DER; its own, if the secret is."""
    vendor = ec.derive_private_key(
        int.from_bytes(hashlib.sha256(secret).digest(), "big"), ec.SECP256R1()
    )
    root = x509.load_pem_x509_certificate(ROOT_FILE.read_bytes())
    now = datetime.datetime.now(tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "DCV TEST AK")]))
        .issuer_name(root.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(vendor, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.DER)


@contextlib.contextmanager
def vm_tpm(folder: Path) -> Iterator[Path]:
    """The same TPM for QEMU, which powers it on; yields its control socket."""
    control = folder / "tpm.sock"
    arguments = ("--tpmstate", f"dir={folder / 'tpm'}", "--ctrl", f"type=unixio,path={control}")
    with running([*SWTPM, *arguments]):
        _wait_for(control)
        yield control


def die_with_caller(number: int = signal.SIGTERM) -> None:
    """A caller that is killed takes this process with it, also after an exec."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end, whichever way this one ends."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_caller,  # noqa: PLW1509  # there is one thread
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + START_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            raise SystemExit("image/boot.py: the software TPM did not start")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())

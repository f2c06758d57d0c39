"""Secrets out of the machine's TPM, once, before the gateway starts: what `dcv unseal` does.

Tried with a software TPM (swtpm 0.7, tpm2-tools 5.4); not tried on hardware.

    1. storage key: a primary key of the owner's hierarchy, made from its template each time; its
       public part is written down, for those who seal (`image/seal.py`)
    2. every sealed secret: TPM2_Import below that key, TPM2_Load, TPM2_Unseal with a policy session
       that has PCR 4, 7, 11 and 12 in it
    3. only when all of them were given out, they are written, a file each, which root alone reads

The TPM keeps nothing. A sealed file comes from a disk of the host's: what is wrong with one ends
this, and the gateway does not start.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from appliance.attester.vtpm import Tpm, open_tpm
from appliance.config import Attestation
from appliance.errors import (
    ApplianceError,
    AttesterError,
    ConfigError,
    DeviceFault,
    Malformed,
    SealRefused,
)
from appliance.log import Log
from appliance.wire.sealed import (
    MAX_BYTES,
    PCRS,
    STORAGE_KEY_ATTRIBUTES,
    SealedSecret,
    parse_sealed,
    parse_storage_key,
    unpack,
)

STORAGE_KEY_FILE = "storage-key"
SECRETS_FOLDER = "secrets"

TPM_S = 120.0
"""For all that the TPM is asked. A secret takes three commands: a tenth of a second with a software TPM,
some seconds with a slow chip."""

POLICY_FAILED = "0x99D"
"""TPM_RC_POLICY_FAIL of the first session (Part 2, 6.6): other PCRs than those it was sealed for."""


async def run_unseal(settings: Attestation, sealed: Path, out: Path, *, log: Log) -> int:
    """Write `out`/storage-key, and a file in `out`/secrets for each line of `sealed`.

    Args:
        settings: `tpm`. sealed: may be missing, and then a TPM without a storage key is no failure:
            nobody asks it for anything.

    Returns:
        The process's exit status: 0, else that of the error, which is logged.
    """
    try:
        secrets = parse_sealed(_read(sealed))
        try:
            storage_key, found = await _in_time(settings, secrets)
        except AttesterError as error:
            if secrets:
                raise
            log.warning("no_storage_key", code=error.code, error=error.message)
            return 0
        _write(out, storage_key, found)
    except ApplianceError as error:
        log.error("unseal_failed", code=error.code, error=error.message, advice=error.advice)
        return error.exit_status
    log.info("unsealed", names=sorted(found))
    return 0


async def _in_time(
    settings: Attestation, secrets: tuple[SealedSecret, ...]
) -> tuple[bytes, dict[str, bytes]]:
    try:
        with trio.fail_after(TPM_S):
            return await unseal(settings, secrets)
    except trio.TooSlowError:
        raise DeviceFault(f"TPM: expected its answers within {TPM_S:g} s") from None


async def unseal(
    settings: Attestation, secrets: tuple[SealedSecret, ...]
) -> tuple[bytes, dict[str, bytes]]:
    """The storage key's TPM2B_PUBLIC, and the secrets by name.

    Raises:
        SealRefused: the TPM does not give one out.
        Malformed: what it gives is not what its line says.
        ProviderAbsent, DeviceFault: there is no TPM, or it failed otherwise.
    """
    with open_tpm(settings.tpm) as tpm:
        parent = str(tpm.path("storage-key"))
        await tpm.run(
            "tpm2_createprimary",
            *("-C", "o", "-g", "sha256", "-G", "ecc256:null:aes128cfb"),
            *("-a", STORAGE_KEY_ATTRIBUTES, "-c", parent),
        )
        await tpm.flush()
        await tpm.run("tpm2_readpublic", "-c", parent, "-o", str(tpm.path("public-key")))
        await tpm.flush()
        storage_key = tpm.read("public-key")
        try:
            parse_storage_key(storage_key)
        except Malformed as error:
            raise DeviceFault(f"TPM: {error.message}") from error
        return storage_key, {one.name: await _unseal(tpm, parent, one) for one in secrets}


async def _unseal(tpm: Tpm, parent: str, one: SealedSecret) -> bytes:
    for name in ("public", "duplicate", "seed"):
        tpm.path(name).write_bytes(getattr(one, name))
    public, private = ("-u", str(tpm.path("public"))), ("-r", str(tpm.path("private")))
    loaded = str(tpm.path("loaded"))
    try:
        wrapped = ("-i", str(tpm.path("duplicate")), "-s", str(tpm.path("seed")))
        await tpm.run("tpm2_import", "-C", parent, *public, *private, *wrapped)
        await tpm.flush()
        await tpm.run("tpm2_load", "-C", parent, *public, *private, "-c", loaded)
        await tpm.flush()
    except DeviceFault as error:
        raise SealRefused(
            f"{one.name}: not sealed to this machine, or damaged ({error.message})"
        ) from error
    policy = "pcr:sha256:" + ",".join(str(pcr) for pcr in PCRS)
    try:
        await tpm.run("tpm2_unseal", "-c", loaded, "-p", policy, "-o", str(tpm.path("secret")))
    except DeviceFault as error:
        why = "the TPM does not give it out"
        if POLICY_FAILED in error.message:
            why = (
                f"sealed for another image or boot: one of PCR {', '.join(map(str, PCRS))} differs"
            )
        raise SealRefused(f"{one.name}: {why} ({error.message})") from error
    await tpm.flush()
    return unpack(one.name, tpm.read("secret"))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"cannot read the sealed secrets: {error.strerror}") from error


def _write(out: Path, storage_key: bytes, secrets: dict[str, bytes]) -> None:
    folder = out / SECRETS_FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _write_file(out / STORAGE_KEY_FILE, storage_key, mode=0o644)
        for name, secret in secrets.items():
            _write_file(folder / name, secret, mode=0o400)
    except OSError as error:
        raise ConfigError(f"cannot write what was unsealed: {error.strerror}") from error


def _write_file(path: Path, data: bytes, *, mode: int) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask is
        file.write(data)

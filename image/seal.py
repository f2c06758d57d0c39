r"""Seal a secret to one machine and one image, without either: `python image/seal.py NAME < SECRET`.

    .venv/bin/python image/seal.py nvidia --storage-key storage-key \
        --reference image/out/gpu/reference-values.json < service-key > nvidia.sealed

`--storage-key` is the machine's, as it publishes it (docs/operate.md says whom to believe about it).
The reference values are the image's; `--pcr 7=HEX` is for a machine whose PCR 7 is not the
predicted one. The secret is read from standard input, without the line end that an editor adds, and
appears nowhere else. The machine gives it out after a boot with exactly these PCRs, and to
whatever runs then.

Standard output is one line for the partition `dcv-sealed`. Numbers of sections are those of the TPM
2.0 Library, revision 1.59.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from appliance.errors import Malformed
from appliance.rats.reference import ImageReference, parse_reference_values
from appliance.wire.sealed import MAX_SEALED_BYTES, PCRS, SealedSecret, pack, parse_storage_key

TPM_ALG_KEYEDHASH = b"\x00\x08"
TPM_ALG_SHA256 = b"\x00\x0b"
TPM_ALG_NULL = b"\x00\x10"
TPM_CC_POLICY_PCR = b"\x00\x00\x01\x7f"

ADMIN_WITH_POLICY, NO_DA = 1 << 7, 1 << 10
ATTRIBUTES = struct.pack(">I", ADMIN_WITH_POLICY | NO_DA)
"""No userWithAuth: nothing but the policy opens it. Neither fixedTPM nor fixedParent, or it could not
be imported; duplicating it again takes a policy that allows that, and this one does not (Part 2, 8.3).
noDA: there is no password to guess."""

SELECT_BYTES = 3
"""Of a PC Client TPM's 24 PCRs."""

PCR_BYTES = 32

_PCR = re.compile(r"(4|7|11|12)=([0-9a-f]{64})\Z")


def main() -> int:
    """Exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="image/seal.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of the secret: a-z, 0-9 and `-`, at most 16")
    parser.add_argument("--storage-key", type=Path, required=True, metavar="FILE")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE")
    parser.add_argument("--image", metavar="DIGEST", help="which one of the reference values")
    parser.add_argument("--pcr", action="append", default=[], metavar="N=HEX")
    arguments = parser.parse_args()
    try:
        references = parse_reference_values(arguments.reference.read_bytes()).images
        pcrs = expected_pcrs(references, image=arguments.image, given=arguments.pcr)
        storage_key = arguments.storage_key.read_bytes()
        secret = sys.stdin.buffer.read(MAX_SEALED_BYTES + 2).removesuffix(b"\n")
        sealed = seal(arguments.name, secret, pcrs=pcrs, storage_key=storage_key)
    except (Malformed, OSError) as error:
        print(f"seal: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(sealed.to_line())
    return 0


def expected_pcrs(
    images: tuple[ImageReference, ...], *, image: str | None, given: list[str]
) -> dict[int, bytes]:
    """The value of each PCR that is sealed to, 32 bytes.

    Args:
        image: `sha256:…`; None where there is only one. given: `N=HEX`, instead of the reference's.

    Raises:
        Malformed: no such image, or a PCR with no value or several.
    """
    found = [one for one in images if image in (None, one.image_digest)]
    if len(found) != 1:
        raise Malformed(f"--image: expected one of the reference values, got {len(found)}")
    values = {12: bytes(PCR_BYTES)}
    for pcr in PCRS:
        alternatives = found[0].pcrs.get(f"pcr{pcr}", frozenset())
        if len(alternatives) == 1:
            values[pcr] = bytes.fromhex(min(alternatives))
    for text in given:
        match = _PCR.match(text)
        if match is None:
            raise Malformed("--pcr: expected 4, 7, 11 or 12, `=` and 64 lowercase hex digits")
        values[int(match[1])] = bytes.fromhex(match[2])
    for pcr in PCRS:
        if len(values.get(pcr, b"")) != PCR_BYTES:
            raise Malformed(
                f"PCR {pcr}: expected one SHA-256 value; say which with --pcr {pcr}=HEX"
            )
    return values


def seal(
    name: str, secret: bytes, *, pcrs: Mapping[int, bytes], storage_key: bytes
) -> SealedSecret:
    """Wrap a secret for TPM2_Import under this storage key.

    Args:
        pcrs: as `expected_pcrs` gives them. storage_key: TPM2B_PUBLIC.

    Raises:
        Malformed: the name, the secret or the storage key.
    """
    x, y = parse_storage_key(storage_key)
    # 1. The object: a TPMT_SENSITIVE (Part 2, 12.3.2.4) and the TPMT_PUBLIC that goes with it. Its
    #    `unique` is the hash of seed and data, which TPM2_Load checks; its name is that of the public
    #    part (Part 1, 16).
    seed = secrets.token_bytes(32)
    data = pack(name, secret)
    sensitive = TPM_ALG_KEYEDHASH + sized(b"") + sized(seed) + sized(data)
    public = (
        TPM_ALG_KEYEDHASH
        + TPM_ALG_SHA256
        + ATTRIBUTES
        + sized(policy_digest(pcrs))
        + TPM_ALG_NULL  # scheme: it is data, and no key
        + sized(sha256(seed + data))
    )
    object_name = TPM_ALG_SHA256 + sha256(public)
    # 2. A seed that only the storage key's TPM can find: one-pass ECDH (Part 1, annex C, 11.4.10.3).
    point, symmetric_seed = share_seed(x, y)
    # 3. The outer wrapper (Part 1, 23.3.2.3), without an inner one: encrypted, then authenticated
    #    together with the name.
    key = kdfa(symmetric_seed, b"STORAGE", object_name, bits=128)
    encryptor = Cipher(AES(key), CFB(bytes(16))).encryptor()
    encrypted = encryptor.update(sized(sensitive)) + encryptor.finalize()
    integrity_key = kdfa(symmetric_seed, b"INTEGRITY", b"", bits=256)
    integrity = hmac.digest(integrity_key, encrypted + object_name, "sha256")
    return SealedSecret(
        name=name,
        public=sized(public),
        duplicate=sized(sized(integrity) + encrypted),
        seed=sized(point),
    )


def policy_digest(pcrs: Mapping[int, bytes]) -> bytes:
    """What a policy session has after TPM2_PolicyPCR (Part 3, 23.7.1) and nothing else, 32 bytes.

    The new digest is over the old one, the command, a TPML_PCR_SELECTION and the hash of the values
    in ascending order.
    """
    select = sum(1 << pcr for pcr in pcrs).to_bytes(SELECT_BYTES, "little")
    selection = struct.pack(">I", 1) + TPM_ALG_SHA256 + bytes([SELECT_BYTES]) + select
    values = b"".join(pcrs[pcr] for pcr in sorted(pcrs))
    return sha256(bytes(32) + TPM_CC_POLICY_PCR + selection + sha256(values))


def share_seed(x: bytes, y: bytes) -> tuple[bytes, bytes]:
    """A TPMS_ECC_POINT for the TPM, and the seed that follows from it and the storage key.

    Raises:
        Malformed: (x, y) is no point of P-256.
    """
    try:
        theirs = ec.EllipticCurvePublicNumbers(
            int.from_bytes(x), int.from_bytes(y), ec.SECP256R1()
        ).public_key()
    except ValueError:
        raise Malformed("storage key: expected a point of P-256") from None
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    numbers = ephemeral.public_key().public_numbers()
    our_x, our_y = numbers.x.to_bytes(32), numbers.y.to_bytes(32)
    shared_x = ephemeral.exchange(ec.ECDH(), theirs)
    # KDFe: one block of 256 bits is all that is asked for.
    seed = sha256(struct.pack(">I", 1) + shared_x + b"DUPLICATE\0" + our_x + x)
    return sized(our_x) + sized(our_y), seed


def kdfa(key: bytes, label: bytes, context: bytes, *, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2; SP 800-108 in counter mode, HMAC-SHA-256), one block of at most 256
    bits."""
    block = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(key, block, "sha256")[: bits // 8]


def sized(data: bytes) -> bytes:
    """A TPM2B: the length in two bytes, then the data."""
    return struct.pack(">H", len(data)) + data


def sha256(data: bytes) -> bytes:
    """32 bytes."""
    return hashlib.sha256(data).digest()


if __name__ == "__main__":
    sys.exit(main())

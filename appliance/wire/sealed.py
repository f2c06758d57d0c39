"""Secrets that one TPM gives out after one boot: written by `image/seal.py`, read by `dcv unseal`.

A line of JSON each, the values in base64:

    {"name": "nvidia", "public": TPM2B_PUBLIC, "duplicate": TPM2B_PRIVATE,
     "seed": TPM2B_ENCRYPTED_SECRET}

`public` has the policy: PCR 4, 7, 11 and 12 have the values that it was sealed for. `duplicate` has
the secret, wrapped for the TPM's storage key as TPM2_Duplicate would (TPM 2.0 Library 1.59, Part 1,
23.3); `seed` opens the wrapping. The name stands in the secret as well, so that a host cannot hand
one secret out under the name of another. What a line says is untrusted until the TPM took it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from appliance.credentials import is_secret
from appliance.errors import Malformed
from appliance.wire.canonical import canonical_json, parse_json_object
from appliance.wire.encoding import decode_base64, encode_base64

PCRS = (4, 7, 11, 12)
"""The image's (4, 11), Secure Boot's (7); and 12, which a changed command line extends: it must be
zero, or whoever starts the machine with `init=` of his own is given the secret."""

MAX_BYTES = 64 << 10
MAX_SECRETS = 16
MAX_SEALED_BYTES = 128
"""MAX_SYM_DATA, what a sealed object holds (Part 2, 11.1.14): `name=secret`."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,15}\Z")
_MAX_PART_BYTES = 1024

_STORAGE_KEY = bytes.fromhex(
    "0023"  # TPM_ALG_ECC
    "000b"  # its name: SHA-256
    "00030472"  # fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, decrypt
    "0000"  # no policy
    "000600800043"  # its children: AES, 128 bits, CFB
    "0010"  # scheme: null
    "0003"  # NIST P-256
    "0010"  # KDF: null
)
"""The TPMT_PUBLIC of a P-256 storage key up to `unique` (Part 2, 12.2.4), as `tpm2_createprimary
-C o -G ecc256:null:aes128cfb` with STORAGE_KEY_ATTRIBUTES makes it. A primary key follows from its
hierarchy's seed and its template, so every boot of a machine has the same."""

STORAGE_KEY_ATTRIBUTES = (
    "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
)

_SIZE = (32).to_bytes(2)
"""In front of each coordinate."""


@dataclass(frozen=True, slots=True)
class SealedSecret:
    """One line.

    Attributes:
        name: 1 to 16 of `a` to `z`, `0` to `9` and `-`.
        public, duplicate, seed: as TPM2_Import takes them, sizes included.
    """

    name: str
    public: bytes
    duplicate: bytes
    seed: bytes

    def to_line(self) -> bytes:
        """Its line, with the end of it."""
        parts = {"public": self.public, "duplicate": self.duplicate, "seed": self.seed}
        encoded = {name: encode_base64(value) for name, value in parts.items()}
        return canonical_json({"name": self.name, **encoded}) + b"\n"


def parse_sealed(data: bytes) -> tuple[SealedSecret, ...]:
    """Lines of sealed secrets; none is fine.

    Raises:
        Malformed: not that form, out of bounds, or a name twice.
    """
    if len(data) > MAX_BYTES:
        raise Malformed(f"sealed secrets: expected at most {MAX_BYTES} bytes")
    lines = data.splitlines()
    if len(lines) > MAX_SECRETS:
        raise Malformed(f"sealed secrets: expected at most {MAX_SECRETS}")
    found = tuple(_parse_line(line, f"sealed[{index}]") for index, line in enumerate(lines))
    if len({one.name for one in found}) != len(found):
        raise Malformed("sealed secrets: expected every name once")
    return found


def pack(name: str, secret: bytes) -> bytes:
    """What is sealed.

    Raises:
        Malformed: no name, no secret, or too long together.
    """
    if not _NAME.match(name):
        raise Malformed("name: expected 1 to 16 of a-z, 0-9 and `-`", field="name")
    packed = name.encode("ascii") + b"=" + secret
    if not is_secret(secret) or len(packed) > MAX_SEALED_BYTES:
        raise Malformed(
            f"secret: expected 1 to {MAX_SEALED_BYTES - len(name) - 1} printable characters, no "
            "blanks, no line end",
            field="secret",
        )
    return packed


def unpack(name: str, data: bytes) -> bytes:
    """The secret that was sealed under this name.

    Raises:
        Malformed: it was sealed under another one, or is none.
    """
    sealed_as, _, secret = data.partition(b"=")
    if sealed_as != name.encode("ascii"):
        raise Malformed(f"{name}: what is sealed in it has another name", field="name")
    if not is_secret(secret):
        raise Malformed(f"{name}: what is sealed in it is no secret", field="secret")
    return secret


def parse_storage_key(data: bytes) -> tuple[bytes, bytes]:
    """Both coordinates of a storage key, 32 bytes each, from its TPM2B_PUBLIC.

    Raises:
        Malformed: not of the one template that is used here, so not a storage key that never left
            its TPM.
    """
    head = (len(_STORAGE_KEY) + len(_SIZE + _SIZE) + 64).to_bytes(2) + _STORAGE_KEY + _SIZE
    point = data[len(head) :]
    if not data.startswith(head) or len(point) != 66 or point[32:34] != _SIZE:
        raise Malformed("storage key: expected a TPM2B_PUBLIC of the template that is used here")
    return point[:32], point[34:]


def _parse_line(line: bytes, where: str) -> SealedSecret:
    document = parse_json_object(line, max_nesting=1)
    match document:
        case {"name": str(name), "public": str(), "duplicate": str(), "seed": str()} if len(
            document
        ) == 4 and _NAME.match(name):
            pass
        case _:
            raise Malformed(f"{where}: expected name, public, duplicate and seed", field=where)
    parts = {
        key: decode_base64(str(document[key]), field=f"{where}.{key}", max_bytes=_MAX_PART_BYTES)
        for key in ("public", "duplicate", "seed")
    }
    return SealedSecret(name, **parts)

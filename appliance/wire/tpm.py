"""TPM 2.0 structures: quotes, signatures, public keys, and PCR values as tpm2-tools write them.

Sources: TCG, Trusted Platform Module Library, Part 2: Structures, revision 1.59: TPMS_ATTEST
(10.12.8), TPMT_SIGNATURE (11.3.4), TPMT_PUBLIC (12.2.4), TPMA_OBJECT (8.3). Everything in them is
big-endian. tpm2-tools 5 writes PCR values in three forms of its own, see `parse_pcrs`.

Nothing parsed here is trustworthy; `rats.schemes.tpm2` checks the signature.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from appliance.errors import Malformed
from appliance.wire.canonical import parse_json_object
from appliance.wire.cursor import Cursor

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

TPM_GENERATED_VALUE = bytes.fromhex("ff544347")
"""In front of everything a TPM makes up itself: a restricted key signs nothing else that has it."""

TPM_ST_ATTEST_QUOTE = bytes.fromhex("8018")

HASHES = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
"""TPM_ALG_ID of the digests that occur (Part 2, table 9)."""

DIGEST_BYTES = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

RSASSA, RSAPSS, ECDSA = 0x0014, 0x0016, 0x0018
SIGNATURES = {RSASSA: "rsassa", RSAPSS: "rsapss", ECDSA: "ecdsa"}

PCRS = 24
"""In a PC Client TPM."""

MAX_SELECTIONS = 16  # TPM2_NUM_PCR_BANKS of the reference TSS
MAX_SELECT_BYTES = 4  # TPM2_PCR_SELECT_MAX: 32 PCRs
MAX_DIGEST_BYTES = 64
MAX_TAGGED_BYTES = MAX_DIGEST_BYTES + 2  # TPM2B_NAME and TPM2B_DATA: an algorithm and its digest
RSA_BYTES = (256, 384, 512)
MAX_ECC_BYTES = 66  # P-521
MAX_PCR_FILE_BYTES = 64 << 10

_FIXED_TPM, _RESTRICTED, _DECRYPT, _SIGN = 1 << 1, 1 << 16, 1 << 17, 1 << 18
_NULL = 0x0010
_RSA, _ECC = 0x0001, 0x0023
_RSAES = 0x0015
_ECDAA = 0x001A
_CURVES: dict[int, ec.EllipticCurve] = {3: ec.SECP256R1(), 4: ec.SECP384R1(), 5: ec.SECP521R1()}


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """Which PCRs of one bank, TPMS_PCR_SELECTION.

    Attributes:
        hash: the bank, by name, or its TPM_ALG_ID as `0x0012` where it has none here.
        pcrs: ascending.
    """

    hash: str
    pcrs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPMS_ATTEST of type TPM_ST_ATTEST_QUOTE.

    Attributes:
        qualified_signer: the TPM2B_NAME of the key and those above it: algorithm and digest.
        extra_data: what the caller wanted in the signature, at most 66 bytes.
        clock: milliseconds the TPM was powered. reset_count: its power cycles. restart_count:
            resumes and hibernations since the last. safe: whether `clock` can have gone back.
        firmware_version: the vendor's.
        selections: the banks and PCRs that `pcr_digest` is over, in its order.
        pcr_digest: hash, by the signature's algorithm, of the values in a row.
    """

    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature and how it was made.

    Attributes:
        algorithm: `rsassa`, `rsapss` or `ecdsa`.
        hash: of the message, by name.
        value: the RSA integer, big-endian, or DER of the ECDSA pair.
    """

    algorithm: str
    hash: str
    value: bytes


@dataclass(frozen=True, slots=True)
class PublicArea:
    """A TPMT_PUBLIC: of a key, or the template of one, whose `unique` is then empty or zeros.

    Attributes:
        name_hash: of the object's name. attributes: TPMA_OBJECT. policy: its digest or empty.
        scheme: TPM_ALG_ID of the only signing scheme it has, TPM_ALG_NULL (0x10) for any.
        scheme_hash: of that scheme, by name; empty for none.
        curve: of an ECC key; None for RSA. key_bits: of the modulus or the curve.
        exponent: of an RSA key.
        unique: an RSA modulus, or both coordinates, big-endian.
    """

    name_hash: str
    attributes: int
    policy: bytes
    scheme: int
    scheme_hash: str
    curve: ec.EllipticCurve | None
    key_bits: int
    exponent: int
    unique: tuple[bytes, ...]

    @property
    def is_restricted_signing_key(self) -> bool:
        """Whether it signs nothing but what its own TPM made up, and never leaves that TPM.

        Only then does a quote's signature say that a TPM quoted (Part 1, 25.1.5: a restricted
        signing key "may only be used to sign a digest produced by the TPM").
        """
        wanted = _FIXED_TPM | _RESTRICTED | _SIGN
        return self.attributes & (wanted | _DECRYPT) == wanted

    def public_key(self) -> PublicKey:
        """The key.

        Raises:
            Malformed: these numbers are none, for example a template's.
        """
        numbers = [int.from_bytes(one) for one in self.unique]
        try:
            if self.curve is None:
                return rsa.RSAPublicNumbers(self.exponent, numbers[0]).public_key()
            x, y = numbers
            return ec.EllipticCurvePublicNumbers(x, y, self.curve).public_key()
        except ValueError:
            raise Malformed("public.unique: expected a key", field="public.unique") from None


def parse_quote(data: bytes) -> Quote:
    """A TPMS_ATTEST, which is what the signature is over.

    Raises:
        Malformed: not a quote, out of bounds, or bytes after its end.
    """
    cursor = Cursor(data, "big")
    cursor.expect(TPM_GENERATED_VALUE, "magic")
    cursor.expect(TPM_ST_ATTEST_QUOTE, "type")
    quote = Quote(
        qualified_signer=_sized(cursor, MAX_TAGGED_BYTES, "qualified_signer"),
        extra_data=_sized(cursor, MAX_TAGGED_BYTES, "extra_data"),
        clock=cursor.unsigned(8, "clock"),
        reset_count=cursor.unsigned(4, "reset_count"),
        restart_count=cursor.unsigned(4, "restart_count"),
        safe=_yes_no(cursor, "safe"),
        firmware_version=cursor.unsigned(8, "firmware_version"),
        selections=_selections(cursor),
        pcr_digest=_sized(cursor, MAX_DIGEST_BYTES, "pcr_digest"),
    )
    cursor.end("quote")
    return quote


def parse_signature(data: bytes) -> Signature:
    """A TPMT_SIGNATURE, or a bare signature, as Azure's tools and `tpm2_quote -f plain` give it.

    A bare one does not say how it was made: 256, 384 or 512 bytes are taken for RSASSA-PKCS1-v1_5,
    a DER sequence for ECDSA, both over SHA-256. A TPMT_SIGNATURE is never that long, and begins
    with a zero byte, so nothing can be read both ways.

    Raises:
        Malformed: neither of the two.
    """
    if len(data) in RSA_BYTES:
        return Signature("rsassa", "sha256", data)
    if data[:1] == b"\x30" and len(data) <= 2 * MAX_ECC_BYTES + 16:
        return Signature("ecdsa", "sha256", data)
    cursor = Cursor(data, "big")
    algorithm = cursor.unsigned(2, "signature.algorithm")
    if algorithm not in SIGNATURES:
        raise cursor.malformed(
            f"expected RSASSA, RSAPSS or ECDSA, got 0x{algorithm:04x}", "signature.algorithm"
        )
    hash = _hash(cursor, "signature.hash")
    if algorithm == ECDSA:
        r = int.from_bytes(_sized(cursor, MAX_ECC_BYTES, "signature.r"))
        s = int.from_bytes(_sized(cursor, MAX_ECC_BYTES, "signature.s"))
        value = encode_dss_signature(r, s)
    else:
        value = _sized(cursor, RSA_BYTES[-1], "signature.value")
        if len(value) not in RSA_BYTES:
            raise cursor.malformed(
                f"expected an RSA signature, got {len(value)} bytes", "signature.value"
            )
    cursor.end("signature")
    return Signature(SIGNATURES[algorithm], hash, value)


def parse_public(data: bytes) -> PublicArea:
    """A TPMT_PUBLIC, or one in a TPM2B_PUBLIC, of an RSA or ECC key.

    The two cannot be mistaken: the first two bytes of a TPMT_PUBLIC are 1 or 0x23, and neither
    is the size of a key.

    Raises:
        Malformed: neither, or a kind of key that signs no quotes.
    """
    cursor = Cursor(data, "big")
    size = int.from_bytes(data[:2])
    if size not in {_RSA, _ECC}:
        cursor.unsigned(2, "public.size")
        if size != cursor.remaining:
            raise cursor.malformed(f"expected {size} bytes, got {cursor.remaining}", "public.size")
    kind = cursor.unsigned(2, "public.type")
    if kind not in {_RSA, _ECC}:
        raise cursor.malformed(f"expected an RSA or ECC key, got 0x{kind:04x}", "public.type")
    name_hash = _hash(cursor, "public.name_algorithm")
    attributes = cursor.unsigned(4, "public.attributes")
    policy = _sized(cursor, MAX_DIGEST_BYTES, "public.policy")
    # TPMT_SYM_DEF_OBJECT: of restricted decryption keys; a size and a mode behind all but NULL.
    if cursor.unsigned(2, "public.symmetric") != _NULL:
        cursor.take(4, "public.symmetric")
    scheme, scheme_hash = _scheme(cursor)
    curve, bits, exponent, unique = _rsa(cursor) if kind == _RSA else _ecc(cursor)
    cursor.end("public")
    return PublicArea(
        name_hash, attributes, policy, scheme, scheme_hash, curve, bits, exponent, unique
    )


def parse_pcrs(data: bytes, *, selected: Sequence[int] = range(PCRS)) -> dict[int, bytes]:
    """The SHA-256 bank out of a file of PCR values, 32 bytes by PCR.

    Four forms are read; banks other than SHA-256 are checked for form and left out:

    - the values in a row (`tpm2_quote -F values`, `tpm2_pcrread -o`), which name no PCR: they are
      those of `selected`, in that order, and must be exactly as many;
    - the serialized form (`tpm2_quote -F serialized`, the default): TPML_PCR_SELECTION and
      TPML_DIGESTs as the TSS has them in memory, little-endian, unused places included;
    - the text of `tpm2_pcrread` and `tpm2_quote`: `sha256:` and lines `4 : 0x<hex>`;
    - JSON: `{"sha256": {"4": "<lowercase hex>"}}`.

    Raises:
        Malformed: none of these, a value twice, or no SHA-256 value at all.
    """
    if len(data) > MAX_PCR_FILE_BYTES:
        raise Malformed("pcrs: expected at most 64 KiB", field="pcrs")
    if data.isascii() and data.lstrip()[:1] == b"{":
        return _json_pcrs(data)
    if data.isascii() and b"sha256" in data:
        return _text_pcrs(data.decode("ascii"))
    if len(data) == 32 * len(selected) and data:
        values = (data[at : at + 32] for at in range(0, len(data), 32))
        return dict(zip(selected, values, strict=True))
    if len(data) >= _SELECTIONS_BYTES and (len(data) - _SELECTIONS_BYTES - 4) % _LIST_BYTES == 0:
        return _serialized_pcrs(data)
    raise Malformed(
        f"pcrs: expected {len(selected)} values of 32 bytes, a serialized file, text or JSON; got "
        f"{len(data)} bytes",
        field="pcrs",
    )


def _selections(cursor: Cursor) -> tuple[PcrSelection, ...]:
    """A TPML_PCR_SELECTION."""
    count = cursor.unsigned(4, "selections")
    if count > MAX_SELECTIONS:
        raise cursor.malformed(f"expected at most {MAX_SELECTIONS} banks", "selections")
    found = []
    for index in range(count):
        field = f"selections[{index}]"
        bank = cursor.unsigned(2, field)
        size = cursor.unsigned(1, field)
        if size > MAX_SELECT_BYTES:
            raise cursor.malformed(f"expected at most {MAX_SELECT_BYTES} bytes of PCRs", field)
        found.append(PcrSelection(_bank(bank), _bits(cursor.take(size, field))))
    return tuple(found)


def _bits(select: bytes) -> tuple[int, ...]:
    """PCR n is bit n % 8 of byte n // 8."""
    bits = int.from_bytes(select, "little")
    return tuple(pcr for pcr in range(8 * len(select)) if bits >> pcr & 1)


def _bank(algorithm: int) -> str:
    return HASHES.get(algorithm, f"0x{algorithm:04x}")


def _scheme(cursor: Cursor) -> tuple[int, str]:
    """TPMT_RSA_SCHEME or TPMT_ASYM_SCHEME: an algorithm and what it takes."""
    scheme = cursor.unsigned(2, "public.scheme")
    if scheme in {_NULL, _RSAES}:
        return scheme, ""
    hash = _hash(cursor, "public.scheme")
    if scheme == _ECDAA:
        cursor.unsigned(2, "public.scheme")
    return scheme, hash


_Parameters = tuple[ec.EllipticCurve | None, int, int, tuple[bytes, ...]]


def _rsa(cursor: Cursor) -> _Parameters:
    bits = cursor.unsigned(2, "public.key_bits")
    # "If this parameter is zero, the exponent is the default of 2^16 + 1" (Part 2, 12.2.3.5).
    exponent = cursor.unsigned(4, "public.exponent") or 65537
    modulus = _sized(cursor, RSA_BYTES[-1], "public.modulus")
    if bits // 8 not in RSA_BYTES or bits % 8 or len(modulus) not in {0, bits // 8}:
        raise cursor.malformed("expected a modulus of 2048, 3072 or 4096 bits", "public.modulus")
    return None, bits, exponent, (modulus,)


def _ecc(cursor: Cursor) -> _Parameters:
    curve = _CURVES.get(cursor.unsigned(2, "public.curve"))
    if curve is None:
        raise cursor.malformed("expected NIST P-256, P-384 or P-521", "public.curve")
    if cursor.unsigned(2, "public.kdf") != _NULL:
        _hash(cursor, "public.kdf")
    x = _sized(cursor, MAX_ECC_BYTES, "public.x")
    y = _sized(cursor, MAX_ECC_BYTES, "public.y")
    return curve, curve.key_size, 0, (x, y)


def _hash(cursor: Cursor, field: str) -> str:
    algorithm = cursor.unsigned(2, field)
    if algorithm not in HASHES:
        raise cursor.malformed(f"expected a known hash, got 0x{algorithm:04x}", field)
    return HASHES[algorithm]


def _sized(cursor: Cursor, most: int, field: str) -> bytes:
    """A TPM2B: its length in two bytes, then as many."""
    length = cursor.unsigned(2, field)
    if length > most:
        raise cursor.malformed(f"expected at most {most} bytes, got {length}", field)
    return cursor.take(length, field)


def _yes_no(cursor: Cursor, field: str) -> bool:
    value = cursor.unsigned(1, field)
    if value > 1:
        raise cursor.malformed(f"expected 0 or 1, got {value}", field)
    return bool(value)


# The serialized form: struct TPML_PCR_SELECTION { UINT32 count; TPMS_PCR_SELECTION [16] }, each
# { UINT16 hash; BYTE sizeofSelect; BYTE pcrSelect[4] } with a byte of padding; then UINT32 and as
# many TPML_DIGEST { UINT32 count; TPM2B_DIGEST { UINT16 size; BYTE buffer[64] } [8] }.
_PLACES = 8
_SELECTIONS_BYTES = 4 + 8 * MAX_SELECTIONS
_LIST_BYTES = 4 + _PLACES * (2 + MAX_DIGEST_BYTES)


def _serialized_pcrs(data: bytes) -> dict[int, bytes]:
    cursor = Cursor(data, "little")
    wanted: list[tuple[str, int]] = []
    count = cursor.unsigned(4, "pcrs.selections")
    if count > MAX_SELECTIONS:
        raise cursor.malformed(f"expected at most {MAX_SELECTIONS} banks", "pcrs.selections")
    for index in range(MAX_SELECTIONS):
        bank = cursor.unsigned(2, "pcrs.selections")
        size = cursor.unsigned(1, "pcrs.selections")
        select = cursor.take(MAX_SELECT_BYTES + 1, "pcrs.selections")
        if size > MAX_SELECT_BYTES:
            raise cursor.malformed(f"expected at most {MAX_SELECT_BYTES} bytes", "pcrs.selections")
        if index < count:
            wanted += [(_bank(bank), pcr) for pcr in _bits(select[:size])]
    digests: list[bytes] = []
    for _ in range(cursor.unsigned(4, "pcrs.lists")):
        digests += _digest_list(cursor)
    cursor.end("pcrs")
    if len(digests) != len(wanted):
        raise cursor.malformed(f"expected {len(wanted)} digests, got {len(digests)}", "pcrs")
    return _sha256_bank((*key, value) for key, value in zip(wanted, digests, strict=True))


def _digest_list(cursor: Cursor) -> list[bytes]:
    count = cursor.unsigned(4, "pcrs.digests")
    if count > _PLACES:
        raise cursor.malformed(f"expected at most {_PLACES} digests", "pcrs.digests")
    found = []
    for place in range(_PLACES):
        size = cursor.unsigned(2, "pcrs.digests")
        buffer = cursor.take(MAX_DIGEST_BYTES, "pcrs.digests")
        if size > MAX_DIGEST_BYTES:
            raise cursor.malformed(f"expected at most {MAX_DIGEST_BYTES} bytes", "pcrs.digests")
        if place < count:
            found.append(buffer[:size])
    return found


_BANK_LINE = re.compile(r"\s*(pcrs|sha1|sha256|sha384|sha512|sm3_256|sha3_\d{3})\s*:\s*\Z")
_VALUE_LINE = re.compile(r"\s*(\d{1,2})\s*:\s*0x((?:[0-9A-Fa-f]{2}){20,64})\s*\Z")


def _text_pcrs(text: str) -> dict[int, bytes]:
    found: list[tuple[str, int, bytes]] = []
    bank = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if title := _BANK_LINE.match(line):
            bank = title[1]
        elif value := _VALUE_LINE.match(line):
            found.append((bank, int(value[1]), bytes.fromhex(value[2])))
        else:
            raise Malformed(f"pcrs: line {number}: expected `<pcr> : 0x<hex>`", field="pcrs")
    return _sha256_bank(found)


def _json_pcrs(data: bytes) -> dict[int, bytes]:
    found: list[tuple[str, int, bytes]] = []
    for bank, values in parse_json_object(data, max_nesting=2).items():
        field = f"pcrs.{bank[:16]}"
        if bank not in DIGEST_BYTES or not isinstance(values, dict):
            raise Malformed(f"{field}: expected a bank and its values", field=field)
        for pcr, value in values.items():
            if not re.fullmatch(r"0|[1-9]\d?", pcr, re.ASCII) or not isinstance(value, str):
                raise Malformed(f"{field}: expected hex by PCR number", field=field)
            if not re.fullmatch(r"(?:[0-9a-f]{2})+", value):
                raise Malformed(f"{field}.{pcr}: expected lowercase hex", field=f"{field}.{pcr}")
            found.append((bank, int(pcr), bytes.fromhex(value)))
    return _sha256_bank(found)


def _sha256_bank(values: Iterable[tuple[str, int, bytes]]) -> dict[int, bytes]:
    """Of (bank, PCR, value) the SHA-256 ones."""
    found: dict[int, bytes] = {}
    for bank, pcr, value in values:
        field = f"pcrs.{bank}.{pcr}"
        if bank != "sha256":
            continue
        if pcr >= 8 * MAX_SELECT_BYTES or pcr in found or len(value) != DIGEST_BYTES[bank]:
            raise Malformed(f"{field}: expected every PCR once, 32 bytes each", field=field)
        found[pcr] = value
    if not found:
        raise Malformed("pcrs: expected values of the SHA-256 bank", field="pcrs")
    return found

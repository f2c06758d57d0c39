"""Who an appliance is: manifest, instance document, keyset and statement (protocol.md section 1).

    workload manifest -> W ┐
    instance document -> I ┴─ subject ─┐
    public keys ───────────────────────┴─ keyset -> keyset_digest ─┐
    nonce ─────────────────────────────────────────────────────────┴─ statement -> report_data

The CPU's quote carries `report_data`, and so binds the workload, the GPUs and every key. Building
a document and reading one are here; whether what was read is true is for `rats` to say.

Manifest and instance document have exactly the members that dcv/1 gives them: "unknown fields are
null, never left out". A document that is hashed and not read could say anything beside its digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256

API_VERSION = "dcv/1"
PURPOSE = "aci.report_data.v1"
ALGORITHM = "ed25519"
CHECKPOINT_ROLE = "checkpoint"
MAX_KEYS = 16
MAX_GPUS = 16
MAX_NAME = 256
MAX_TEXT = 4096

_SPKI_PREFIX = bytes.fromhex("302a300506032b6570032100")
"""What a SubjectPublicKeyInfo of an Ed25519 key begins with (RFC 8410 section 4); the key follows."""

_SUBJECT = re.compile(
    r"dcv:workload:(?P<workload>[0-9a-f]{64}):instance:(?P<instance>[0-9a-f]{64})\Z"
)


def digest_of(document: JsonObject) -> bytes:
    """SHA-256 of the RFC 8785 form of a document, 32 bytes."""
    return hashlib.sha256(canonical_json(document)).digest()


def workload_manifest(
    *,
    image: JsonObject,
    model: JsonObject,
    engine: JsonObject,
    policy: JsonObject,
) -> JsonObject:
    """The workload manifest, the same for equal appliances.

    Args:
        image: `version`, `commit`, `roothash`; null where unknown.
        model: `id`, `revision`, `digest`, `tokenizer_digest`, `chat_template_digest`.
        engine: `name`, `version`, `settings_digest`, `dtype`, `deterministic`, `random_seed`.
        policy: the appliance's own appraisal policy, whole; only its digest goes in.
    """
    return {
        "api_version": API_VERSION,
        "image": image,
        "model": model,
        "engine": engine,
        "policy_digest": format_sha256(digest_of(policy)),
    }


def instance_document(
    *,
    gpus: list[JsonObject],
    checkpoint_key: PublicKey,
    operator_input_digest: str | None,
) -> JsonObject:
    """The instance document, of this boot.

    Args:
        gpus: `scheme`, `device_cert_sha256`, `ueid` of each, in the order in which evidence is
            given from then on.
    """
    keys: list[JsonValue] = [{"role": CHECKPOINT_ROLE, **checkpoint_key.to_json()}]
    listed: list[JsonValue] = list(gpus)
    return {
        "api_version": API_VERSION,
        "gpus": listed,
        "keys": keys,
        "operator_input_digest": operator_input_digest,
    }


def subject_of(workload: bytes, instance: bytes) -> str:
    """The keyset's subject, from the two 32-byte digests."""
    return f"dcv:workload:{workload.hex()}:instance:{instance.hex()}"


def split_subject(subject: str) -> tuple[bytes, bytes]:
    """W and I, 32 bytes each.

    Raises:
        Malformed: not a subject of this protocol.
    """
    found = _SUBJECT.match(subject)
    if found is None:
        raise Malformed("subject: expected dcv:workload:<hex>:instance:<hex>", field="subject")
    return bytes.fromhex(found["workload"]), bytes.fromhex(found["instance"])


def statement(keyset_digest: bytes, nonce: bytes | None) -> bytes:
    """The statement's exact bytes (JCS)."""
    document: JsonObject = {
        "keyset_digest": format_sha256(keyset_digest),
        "nonce": None if nonce is None else nonce.hex(),
        "purpose": PURPOSE,
    }
    return canonical_json(document)


def report_data_of(keyset_digest: bytes, nonce: bytes | None) -> bytes:
    """What the CPU evidence must carry, 32 bytes; zero-padded to 64 where the field is longer."""
    return hashlib.sha256(statement(keyset_digest, nonce)).digest()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 public key under its name.

    Attributes:
        raw: 32 bytes (RFC 8032).
    """

    key_id: str
    raw: bytes

    def to_json(self) -> JsonObject:
        """Its form in keysets and instance documents."""
        return {"key_id": self.key_id, "algo": ALGORITHM, "public_key": self.raw.hex()}

    @property
    def spki_sha256(self) -> bytes:
        """What a keyset would name it by if it were a TLS key, 32 bytes."""
        return hashlib.sha256(_SPKI_PREFIX + self.raw).digest()


@dataclass(frozen=True, slots=True)
class Keyset:
    """`workload_keyset`.

    Attributes:
        subject: names workload and instance.
        not_after: Unix seconds.
        tls: SHA-256 of each TLS key's SubjectPublicKeyInfo, 32 bytes.
    """

    subject: str
    not_after: int
    receipt_keys: tuple[PublicKey, ...]
    tls: tuple[bytes, ...]

    def to_json(self) -> JsonObject:
        """The document that is hashed."""
        receipt_keys: list[JsonValue] = [key.to_json() for key in self.receipt_keys]
        tls: list[JsonValue] = [{"spki_sha256": one.hex()} for one in self.tls]
        return {
            "subject": self.subject,
            "not_after": self.not_after,
            "receipt_signing_keys": receipt_keys,
            "e2ee_public_keys": [],
            "tls_public_keys": tls,
        }

    @property
    def digest(self) -> bytes:
        """`keyset_digest`, 32 bytes."""
        return digest_of(self.to_json())


def parse_keyset(value: JsonValue, *, where: str) -> Keyset:
    """Read a keyset. Nothing in it is trustworthy before its digest was found in a quote.

    "Entries whose algo is not recognized are ignored" (aci/1 section 3.1), but a keyset without a
    receipt key of a known one signs nothing and is refused. `domain` of a TLS key is read over:
    this project compares keys, not names. The digest is taken of the document as received, by the
    caller.

    Raises:
        Malformed: not that form, out of bounds, no receipt key, or one that is there twice: "a
            receipt signing key MUST NOT double as an E2EE or TLS key", and a key_id names one key.
    """
    item = _object(value, where)
    _members(
        item,
        {"subject", "not_after", "receipt_signing_keys", "e2ee_public_keys", "tls_public_keys"},
        where,
    )
    not_after = item["not_after"]
    if isinstance(not_after, bool) or not isinstance(not_after, int) or not_after < 0:
        raise Malformed(f"{where}.not_after: expected Unix seconds", field=f"{where}.not_after")
    place = f"{where}.receipt_signing_keys"
    receipt_keys = tuple(
        _public_key(one, f"{place}[{index}]")
        for index, one in enumerate(_list(item, "receipt_signing_keys", where))
        if _is_known(one, f"{place}[{index}]")
    )
    if not receipt_keys:
        raise Malformed(f"{place}: expected at least one {ALGORITHM} key", field=place)
    tls = tuple(
        _tls_key(one, f"{where}.tls_public_keys[{index}]")
        for index, one in enumerate(_list(item, "tls_public_keys", where))
    )
    _check_one_role_each(receipt_keys, tls, _list(item, "e2ee_public_keys", where), place)
    return Keyset(_text(item, "subject", where), not_after, receipt_keys, tls)


def check_manifest(manifest: JsonObject, *, where: str) -> None:
    """A workload manifest has the version, the members and the kinds of values that dcv/1 has.

    Raises:
        Malformed: it has not.
    """
    _check_form(manifest, _MANIFEST, where)
    _check_version(manifest, where)
    for name, form in _MANIFEST_PARTS.items():
        _check_form(_object(manifest[name], f"{where}.{name}"), form, f"{where}.{name}")


def parse_checkpoint_key(instance: JsonObject, *, where: str) -> PublicKey:
    """The one key of an instance document, which is read whole.

    Raises:
        Malformed: another version, other members than dcv/1 has, values of another kind, or not
            exactly one checkpoint key.
    """
    _check_form(instance, _INSTANCE, where)
    _check_version(instance, where)
    gpus = instance["gpus"]
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise Malformed(f"{where}.gpus: expected at most {MAX_GPUS}", field=f"{where}.gpus")
    for index, one in enumerate(gpus):
        place = f"{where}.gpus[{index}]"
        _check_form(_object(one, place), _GPU, place)
    keys = _list(instance, "keys", where)
    if len(keys) != 1 or _object(keys[0], f"{where}.keys[0]").get("role") != CHECKPOINT_ROLE:
        raise Malformed(f"{where}.keys: expected one checkpoint key", field=f"{where}.keys")
    place = f"{where}.keys[0]"
    item = _object(keys[0], place)
    return _public_key({name: item[name] for name in item if name != "role"}, place)


def check_roles(keyset: Keyset, checkpoint_key: PublicKey, *, where: str) -> None:
    """The checkpoint key is none of the keyset's keys, by name or by value: one role per key.

    Raises:
        Malformed: it is.
    """
    _check_one_role_each((checkpoint_key, *keyset.receipt_keys), keyset.tls, [], where)


def _check_one_role_each(
    keys: tuple[PublicKey, ...], tls: tuple[bytes, ...], e2ee: list[JsonValue], where: str
) -> None:
    """Key ids and keys differ pairwise; a TLS key may be listed for two domains."""
    others = [one for one in e2ee if isinstance(one, dict)]
    names = [key.key_id for key in keys]
    values: list[JsonValue] = [key.raw.hex() for key in keys]
    doubled = (
        len(set(names)) != len(names)
        or len({key.raw for key in keys}) != len(keys)
        or any(key.spki_sha256 in tls for key in keys)
        or any(one.get("key_id") in names or one.get("public_key") in values for one in others)
    )
    if doubled:
        raise Malformed(f"{where}: expected every key once, in one role", field=where)


def _is_known(value: JsonValue, where: str) -> bool:
    return _text(_object(value, where), "algo", where) == ALGORITHM


def _public_key(value: JsonValue, where: str) -> PublicKey:
    item = _object(value, where)
    _members(item, {"key_id", "algo", "public_key"}, where)
    if item["algo"] != ALGORITHM:
        raise Malformed(f"{where}.algo: expected {ALGORITHM}", field=f"{where}.algo")
    raw = decode_hex(_text(item, "public_key", where), field=f"{where}.public_key", length=32)
    return PublicKey(_text(item, "key_id", where), raw)


def _tls_key(value: JsonValue, where: str) -> bytes:
    key = _object(value, where)
    _members({name: key[name] for name in key if name != "domain"}, {"spki_sha256"}, where)
    return decode_hex(_text(key, "spki_sha256", where), field=where, length=32)


# ------------------------------------------------------------------------------- forms of values


def _is_text(value: JsonValue, where: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise Malformed(f"{where}: expected text of at most {MAX_TEXT} characters", field=where)


def _is_digest(value: JsonValue, where: str) -> None:
    parse_sha256(value if isinstance(value, str) else "", field=where)


def _is_hash(value: JsonValue, where: str) -> None:
    decode_hex(value if isinstance(value, str) else "", field=where, length=32)


def _is_flag(value: JsonValue, where: str) -> None:
    if not isinstance(value, bool):
        raise Malformed(f"{where}: expected true or false", field=where)


def _is_count(value: JsonValue, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Malformed(f"{where}: expected a whole number", field=where)


def _is_anything(value: JsonValue, where: str) -> None:
    """Read by whoever called."""


_Check: TypeAlias = Callable[[JsonValue, str], None]
_Form: TypeAlias = Mapping[str, tuple[_Check, bool]]
"""By a member's name: what its value is, and whether it may be unknown (null)."""

_MANIFEST: _Form = {
    "api_version": (_is_text, False),
    "image": (_is_anything, False),
    "model": (_is_anything, False),
    "engine": (_is_anything, False),
    "policy_digest": (_is_digest, False),
}
_MANIFEST_PARTS: Mapping[str, _Form] = {
    "image": {
        "version": (_is_text, True),
        "commit": (_is_text, True),
        "roothash": (_is_text, True),
    },
    "model": {
        "id": (_is_text, True),
        "revision": (_is_text, True),
        "digest": (_is_digest, True),
        "tokenizer_digest": (_is_digest, True),
        "chat_template_digest": (_is_digest, True),
    },
    "engine": {
        "name": (_is_text, True),
        "version": (_is_text, True),
        "settings_digest": (_is_digest, True),
        "dtype": (_is_text, True),
        "deterministic": (_is_flag, True),
        "random_seed": (_is_count, True),
    },
}
_INSTANCE: _Form = {
    "api_version": (_is_text, False),
    "gpus": (_is_anything, False),
    "keys": (_is_anything, False),
    "operator_input_digest": (_is_digest, True),
}
_GPU: _Form = {
    "scheme": (_is_text, False),
    "device_cert_sha256": (_is_hash, False),
    "ueid": (_is_text, True),
}


def _check_form(item: JsonObject, form: _Form, where: str) -> None:
    _members(item, set(form), where)
    for name, (check, nullable) in form.items():
        if not (nullable and item[name] is None):
            check(item[name], f"{where}.{name}")


def _check_version(item: JsonObject, where: str) -> None:
    if item["api_version"] != API_VERSION:
        place = f"{where}.api_version"
        raise Malformed(f"{place}: expected {API_VERSION}", field=place)


def _object(value: JsonValue, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    return value


def _members(item: JsonObject, names: set[str], where: str) -> None:
    if item.keys() != names:
        odd = min(item.keys() ^ names)[:64]
        raise Malformed(
            f"{where}: expected exactly {', '.join(sorted(names))}", field=f"{where}.{odd}"
        )


def _list(item: JsonObject, name: str, where: str) -> list[JsonValue]:
    value = item.get(name)
    if not isinstance(value, list) or len(value) > MAX_KEYS:
        raise Malformed(
            f"{where}.{name}: expected a list of at most {MAX_KEYS}", field=f"{where}.{name}"
        )
    return value


def _text(item: JsonObject, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise Malformed(
            f"{where}.{name}: expected 1 to {MAX_NAME} characters", field=f"{where}.{name}"
        )
    return value

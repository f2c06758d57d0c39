"""Who an appliance is: manifest, instance document, keyset and statement (protocol.md section 1).

    workload manifest -> W ┐
    instance document -> I ┴─ subject ─┐
    public keys ───────────────────────┴─ keyset -> keyset_digest ─┐
    nonce ─────────────────────────────────────────────────────────┴─ statement -> report_data

The CPU's quote carries `report_data`, and so binds the workload, the GPUs and every key. Building
a document and reading one are here; whether what was read is true is for `rats` to say.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.encoding import decode_hex, format_sha256

API_VERSION = "dcv/1"
PURPOSE = "aci.report_data.v1"
MAX_KEYS = 16
MAX_NAME = 256

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
    keys: list[JsonValue] = [{"role": "checkpoint", **checkpoint_key.to_json()}]
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
        return {"key_id": self.key_id, "algo": "ed25519", "public_key": self.raw.hex()}


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

    `domain` of a TLS key is read over: this project compares keys, not names. The digest is
    taken of the document as received, by the caller.

    Raises:
        Malformed: not that form, or out of bounds.
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
    receipt_keys = tuple(
        _public_key(one, f"{where}.receipt_signing_keys[{index}]")
        for index, one in enumerate(_list(item, "receipt_signing_keys", where))
    )
    tls = []
    for index, one in enumerate(_list(item, "tls_public_keys", where)):
        place = f"{where}.tls_public_keys[{index}]"
        key = _object(one, place)
        _members({name: key[name] for name in key if name != "domain"}, {"spki_sha256"}, place)
        tls.append(decode_hex(_text(key, "spki_sha256", place), field=place, length=32))
    _list(item, "e2ee_public_keys", where)
    return Keyset(_text(item, "subject", where), not_after, receipt_keys, tuple(tls))


def parse_checkpoint_key(instance: JsonObject, *, where: str) -> PublicKey:
    """The one checkpoint key of an instance document.

    Raises:
        Malformed: not exactly one, or not that form.
    """
    keys = [
        one
        for one in _list(instance, "keys", where)
        if isinstance(one, dict) and one.get("role") == "checkpoint"
    ]
    if len(keys) != 1:
        raise Malformed(f"{where}.keys: expected one checkpoint key", field=f"{where}.keys")
    key = {name: keys[0][name] for name in keys[0] if name != "role"}
    return _public_key(key, f"{where}.keys[0]")


def _public_key(value: JsonValue, where: str) -> PublicKey:
    item = _object(value, where)
    _members(item, {"key_id", "algo", "public_key"}, where)
    if item["algo"] != "ed25519":
        raise Malformed(f"{where}.algo: expected ed25519", field=f"{where}.algo")
    raw = decode_hex(_text(item, "public_key", where), field=f"{where}.public_key", length=32)
    return PublicKey(_text(item, "key_id", where), raw)


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

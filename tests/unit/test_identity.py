"""Manifest, instance document and keyset: read whole, or refused."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject
from appliance.wire.identity import (
    Keyset,
    PublicKey,
    check_manifest,
    check_roles,
    instance_document,
    parse_checkpoint_key,
    parse_keyset,
    workload_manifest,
)

DIGEST = "sha256:" + "ab" * 32
RECEIPT = PublicKey("receipt-1", b"\x01" * 32)
OTHER = PublicKey("receipt-2", b"\x02" * 32)
CHECKPOINT = PublicKey("checkpoint-1", b"\x03" * 32)
TLS = b"\x04" * 32

MANIFEST = workload_manifest(
    image={"version": "0.1.0", "commit": None, "roothash": "ab" * 32},
    model={
        "id": "m",
        "revision": None,
        "digest": DIGEST,
        "tokenizer_digest": DIGEST,
        "chat_template_digest": None,
    },
    engine={
        "name": "sglang",
        "version": "0.5.23",
        "settings_digest": DIGEST,
        "dtype": "bfloat16",
        "deterministic": True,
        "random_seed": 42,
    },
    policy={},
)
INSTANCE = instance_document(
    gpus=[{"scheme": "nvidia_gpu", "device_cert_sha256": "ab" * 32, "ueid": None}],
    checkpoint_key=CHECKPOINT,
    operator_input_digest=None,
)
KEYSET = Keyset("subject", 1, (RECEIPT, OTHER), (TLS,)).to_json()


def with_value(document: JsonObject, path: str, value: object) -> JsonObject:
    changed: Any = copy.deepcopy(document)
    *above, last = path.split(".")
    item = changed
    for name in above:
        item = item[int(name)] if isinstance(item, list) else item[name]
    item[last] = value
    return dict(changed)


def without(document: JsonObject, path: str) -> JsonObject:
    changed: Any = copy.deepcopy(document)
    *above, last = path.split(".")
    item = changed
    for name in above:
        item = item[int(name)] if isinstance(item, list) else item[name]
    del item[last]
    return dict(changed)


def paths(document: JsonObject, nested: tuple[str, ...]) -> list[str]:
    found = list(document)
    for place in nested:
        item: Any = document
        for name in place.split("."):
            item = item[int(name)] if isinstance(item, list) else item[name]
        found += [f"{place}.{name}" for name in item]
    return found


MANIFEST_PATHS = paths(MANIFEST, ("image", "model", "engine"))
INSTANCE_PATHS = paths(INSTANCE, ("gpus.0", "keys.0"))


def test_documents_as_they_are_made_are_read() -> None:
    check_manifest(MANIFEST, where="$")
    assert parse_checkpoint_key(INSTANCE, where="$") == CHECKPOINT
    assert parse_keyset(KEYSET, where="$").to_json() == KEYSET


@pytest.mark.parametrize("path", MANIFEST_PATHS)
def test_a_manifest_without_a_member_is_refused_because_unknown_is_null(path: str) -> None:
    with pytest.raises(Malformed):
        check_manifest(without(MANIFEST, path), where="$")


@pytest.mark.parametrize("path", INSTANCE_PATHS)
def test_an_instance_document_without_a_member_is_refused(path: str) -> None:
    with pytest.raises(Malformed):
        parse_checkpoint_key(without(INSTANCE, path), where="$")


@pytest.mark.parametrize("path", ["x", "image.x", "model.x", "engine.x"])
def test_a_manifest_with_a_member_more_is_refused(path: str) -> None:
    with pytest.raises(Malformed):
        check_manifest(with_value(MANIFEST, path, None), where="$")


@pytest.mark.parametrize("path", ["x", "gpus.0.x", "keys.0.x"])
def test_an_instance_document_with_a_member_more_is_refused(path: str) -> None:
    with pytest.raises(Malformed):
        parse_checkpoint_key(with_value(INSTANCE, path, None), where="$")


@pytest.mark.parametrize("version", ["evil/9", "dcv/2", "", None, 1])
def test_documents_of_another_version_are_refused(version: object) -> None:
    with pytest.raises(Malformed, match="api_version"):
        check_manifest(with_value(MANIFEST, "api_version", version), where="$")
    with pytest.raises(Malformed, match="api_version"):
        parse_checkpoint_key(with_value(INSTANCE, "api_version", version), where="$")


@pytest.mark.parametrize("value", [[], {}, 1.5, True])
@pytest.mark.parametrize("path", MANIFEST_PATHS)
def test_a_value_of_another_kind_in_a_manifest_is_refused(path: str, value: object) -> None:
    if path == "engine.deterministic" and value is True:
        value = "true"
    with pytest.raises(Malformed):
        check_manifest(with_value(MANIFEST, path, value), where="$")


@pytest.mark.parametrize("value", [{}, 1.5, True, "x" * 5000])
@pytest.mark.parametrize("path", INSTANCE_PATHS)
def test_a_value_of_another_kind_in_an_instance_document_is_refused(
    path: str, value: object
) -> None:
    with pytest.raises(Malformed):
        parse_checkpoint_key(with_value(INSTANCE, path, value), where="$")


@pytest.mark.parametrize(
    "path",
    [path for path in MANIFEST_PATHS if "." in path],
)
def test_whatever_is_unknown_of_a_workload_may_be_null(path: str) -> None:
    check_manifest(with_value(MANIFEST, path, None), where="$")


def test_an_instance_document_has_one_key_and_it_is_for_checkpoints() -> None:
    listed: Any = INSTANCE["keys"]
    (key,) = listed
    for keys in ([], [key, key], [{**key, "role": "receipt"}], [{**key, "algo": "x"}], [1], key):
        with pytest.raises(Malformed, match="keys"):
            parse_checkpoint_key(with_value(INSTANCE, "keys", keys), where="$")


# ------------------------------------------------------------------------------------ the keyset


def keyset_of(*keys: object, e2ee: object = (), tls: object = None) -> JsonObject:
    changed: Any = {**KEYSET, "receipt_signing_keys": list(keys)}
    changed["e2ee_public_keys"] = list(e2ee)  # type: ignore[call-overload]
    if tls is not None:
        changed["tls_public_keys"] = tls
    return dict(changed)


@pytest.mark.parametrize(
    "unknown",
    [
        {"key_id": "pq", "algo": "ml-dsa-65", "public_key": "00" * 1952},
        {"algo": "ed448", "x": [1]},
        {"key_id": RECEIPT.key_id, "algo": "p256", "public_key": RECEIPT.raw.hex()},
    ],
)
def test_a_receipt_key_of_an_unknown_algorithm_is_ignored(unknown: JsonObject) -> None:
    read = parse_keyset(keyset_of(unknown, RECEIPT.to_json()), where="$")
    assert read.receipt_keys == (RECEIPT,)
    with pytest.raises(Malformed, match="at least one ed25519 key"):
        parse_keyset(keyset_of(unknown), where="$")


def test_a_keyset_without_a_receipt_key_is_refused() -> None:
    with pytest.raises(Malformed, match="at least one ed25519 key"):
        parse_keyset(keyset_of(), where="$")


@pytest.mark.parametrize("entry", [1, None, {}, {"algo": None}, {"algo": "ed25519"}])
def test_a_receipt_key_that_is_none_is_refused(entry: object) -> None:
    with pytest.raises(Malformed):
        parse_keyset(keyset_of(RECEIPT.to_json(), entry), where="$")


@pytest.mark.parametrize(
    "twin", [PublicKey(RECEIPT.key_id, OTHER.raw), PublicKey("else", RECEIPT.raw), RECEIPT]
)
def test_a_key_or_its_name_is_in_a_keyset_once(twin: PublicKey) -> None:
    with pytest.raises(Malformed, match="every key once"):
        parse_keyset(keyset_of(RECEIPT.to_json(), twin.to_json()), where="$")


def test_a_receipt_key_is_no_e2ee_or_tls_key() -> None:
    for same in ({"public_key": RECEIPT.raw.hex()}, {"key_id": RECEIPT.key_id}):
        entry = {"key_id": "e", "algo": "x25519", "public_key": "00" * 32, **same}
        with pytest.raises(Malformed, match="in one role"):
            parse_keyset(keyset_of(RECEIPT.to_json(), e2ee=[entry]), where="$")
    tls = [{"spki_sha256": RECEIPT.spki_sha256.hex()}]
    with pytest.raises(Malformed, match="in one role"):
        parse_keyset(keyset_of(RECEIPT.to_json(), tls=tls), where="$")


def test_the_name_of_a_key_as_a_tls_key_is_that_of_its_subject_public_key_info() -> None:
    key = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    public = PublicKey("k", key.public_bytes_raw())
    assert public.spki_sha256 == hashlib.sha256(der).digest()


def test_a_tls_key_may_be_listed_for_two_domains() -> None:
    tls = [{"spki_sha256": TLS.hex(), "domain": one} for one in ("a.example", "b.example")]
    assert parse_keyset(keyset_of(RECEIPT.to_json(), tls=tls), where="$").tls == (TLS, TLS)


@pytest.mark.parametrize(
    "checkpoint",
    [
        PublicKey("checkpoint-1", RECEIPT.raw),
        PublicKey("checkpoint-1", OTHER.raw),
        PublicKey(RECEIPT.key_id, CHECKPOINT.raw),
    ],
)
def test_the_checkpoint_key_is_no_receipt_key(checkpoint: PublicKey) -> None:
    keyset = parse_keyset(KEYSET, where="$")
    check_roles(keyset, CHECKPOINT, where="$")
    with pytest.raises(Malformed, match="in one role"):
        check_roles(keyset, checkpoint, where="$")


def test_the_checkpoint_key_is_no_tls_key() -> None:
    keyset = Keyset("subject", 1, (RECEIPT,), (CHECKPOINT.spki_sha256,))
    with pytest.raises(Malformed, match="in one role"):
        check_roles(keyset, CHECKPOINT, where="$")

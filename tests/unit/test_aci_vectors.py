"""The public constants of aci/1, reproduced byte for byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.wire.canonical import canonical_json, parse_json_object
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import digest_of, report_data_of, statement
from tests.vectors_dir import VECTORS

FILE = VECTORS.parent / "aci-vectors.json"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"the vectors are not here: {FILE.name}")


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


def test_the_keyset_has_the_published_canonical_form_and_digest(vectors: dict[str, Any]) -> None:
    text = vectors["keyset_jcs"].encode()
    keyset = parse_json_object(text, max_nesting=8)
    assert canonical_json(keyset) == text
    assert format_sha256(digest_of(keyset)) == vectors["keyset_digest"]


def test_the_statement_gives_the_published_report_data(vectors: dict[str, Any]) -> None:
    keyset = bytes.fromhex(vectors["keyset_digest"].removeprefix("sha256:"))
    nonce = bytes.fromhex(vectors["nonce"])
    assert report_data_of(keyset, nonce).hex() == vectors["report_data"]
    assert report_data_of(keyset, None).hex() == vectors["report_data_null_nonce"]
    assert statement(keyset, None).endswith(b'"nonce":null,"purpose":"aci.report_data.v1"}')


@pytest.mark.parametrize("what", ["request", "response"])
def test_bodies_hash_as_published(vectors: dict[str, Any], what: str) -> None:
    body = vectors[f"{what}_body"].encode()
    assert format_sha256(hashlib.sha256(body).digest()) == vectors[f"{what}_body_hash"]


def test_the_receipt_signs_as_published(vectors: dict[str, Any]) -> None:
    text = vectors["receipt_signing_input_jcs"].encode()
    signing_input = canonical_json(parse_json_object(text, max_nesting=8))
    assert signing_input == text
    assert hashlib.sha256(text).hexdigest() == vectors["receipt_signing_input_sha256"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vectors["receipt_key_seed_hex"]))
    assert key.public_key().public_bytes_raw().hex() == vectors["receipt_public_key"]
    assert key.sign(signing_input).hex() == vectors["receipt_signature"]

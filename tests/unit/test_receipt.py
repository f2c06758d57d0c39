"""Receipts as values: what is signed, what a reader takes, and what can be recomputed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed, Unauthentic
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json_object,
)
from appliance.wire.commitments import Inclusion, Kind
from appliance.wire.identity import PublicKey
from appliance.wire.openai import (
    Endpoint,
    forwarded_bodies,
    forwarded_body,
    parse_request,
    plan_choices,
)
from appliance.wire.receipt import (
    EMPTY_SHA256,
    MAX_RECEIPT_BYTES,
    MAX_REWRITES,
    MAX_USAGE_BYTES,
    OUTCOMES,
    Ended,
    EngineUsed,
    EventLog,
    GpuAttested,
    OutputComplete,
    RequestCommitted,
    RequestForwarded,
    RequestReceived,
    ResponseReturned,
    Rewrite,
    forwarded_bytes,
    forwarded_hash,
    is_usage,
    parse_receipt,
    read_events,
    receipt_document,
    rewrite_of,
    sign_receipt,
    signing_input,
    verify_signature,
)
from tests.vectors_dir import VECTORS

ACI = VECTORS.parent / "aci-vectors.json"

SECRET = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = PublicKey("receipt-1", SECRET.public_key().public_bytes_raw())


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def inclusion(kind: Kind) -> Inclusion:
    return Inclusion(kind, sha("keyset"), 2, 1, (sha("sibling"),), sha("root"))


COMPLETE = EventLog(
    received=RequestReceived(sha("body")),
    committed=RequestCommitted(sha("commitment"), sha("nonce"), sha("blind")),
    admission=GpuAttested("admission", sha("e1"), inclusion("request"), "affirming", 1_750_000_000),
    forwarded=RequestForwarded(sha("forwarded")),
    engine=EngineUsed(
        sha("W"),
        MAX_SAFE_INTEGER,
        deterministic=True,
        rewrite=(Rewrite({"seed": 5, "rid": "r"}, ("user",)), Rewrite({"seed": 6}, (), 1)),
    ),
    output=OutputComplete(sha("output"), ("stop", None), {"total_tokens": 3}),
    completion=GpuAttested(
        "completion", sha("e2"), inclusion("completion"), "warning", 1_750_000_001, sha("core")
    ),
    ended=Ended("complete", None, 7),
    returned=ResponseReturned(sha("content")),
)
REFUSED = replace(
    COMPLETE,
    admission=None,
    forwarded=None,
    engine=None,
    output=None,
    completion=None,
    ended=Ended("refused", "model_not_found", 7),
)


def document(events: EventLog = COMPLETE) -> JsonObject:
    return receipt_document(
        receipt_id="rcpt-" + "0" * 32,
        chat_id="chatcmpl-1",
        model="m",
        keyset_digest=sha("keyset"),
        endpoint="/v1/chat/completions",
        method="POST",
        served_at=1_750_000_000,
        events=events,
    )


def signed(events: EventLog = COMPLETE) -> bytes:
    return sign_receipt(document(events), key_id=KEY.key_id, sign=SECRET.sign)


def changed(change: Callable[[Any], None]) -> bytes:
    """The receipt with something changed in it, its signature as it was."""
    value = json.loads(signed())
    change(value)
    return json.dumps(value).encode()


def at(value: JsonObject, path: str) -> tuple[Any, Any]:
    """The container and the key that a path like `event_log.2.inclusion` ends in."""
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner: Any = value
    for step in steps:
        inner = inner[step]
    return inner, last


def every_path(value: JsonValue, prefix: str = "") -> list[str]:
    match value:
        case dict():
            items: list[tuple[str, JsonValue]] = list(value.items())
        case list():
            items = [(str(index), one) for index, one in enumerate(value)]
        case _:
            return []
    return [
        path
        for key, one in items
        for path in (f"{prefix}{key}", *every_path(one, f"{prefix}{key}."))
    ]


# ------------------------------------------------------------------------------------- the form


def test_a_receipt_is_read_as_it_was_written() -> None:
    data = signed()
    receipt = parse_receipt(data)
    assert canonical_json(receipt.document) == data
    assert read_events(receipt) == COMPLETE
    assert (receipt.receipt_id, receipt.chat_id, receipt.model) == (
        "rcpt-" + "0" * 32,
        "chatcmpl-1",
        "m",
    )
    assert (receipt.endpoint, receipt.method, receipt.served_at) == (
        "/v1/chat/completions",
        "POST",
        1_750_000_000,
    )
    assert receipt.keyset_digest == sha("keyset")
    assert receipt.key_id == KEY.key_id


def test_the_events_stand_in_the_order_of_the_protocol() -> None:
    types = [event["type"] for event in json.loads(signed())["event_log"]]
    assert types == [
        "request.received",
        "dcv.request",
        "dcv.gpu.attested",
        "request.forwarded",
        "dcv.engine",
        "dcv.output",
        "dcv.gpu.attested",
        "dcv.ended",
        "response.returned",
    ]


def test_a_seed_is_a_decimal_string_and_core_sha256_is_bare_hex() -> None:
    log = json.loads(signed())["event_log"]
    assert log[4]["seed"] == "9007199254740991"
    assert log[6]["core_sha256"] == sha("core").hex()
    assert "core_sha256" not in log[2]
    assert log[4]["rewrite"] == [
        {"set": {"seed": 5, "rid": "r"}, "unset": ["user"]},
        {"set": {"seed": 6}, "unset": [], "prompt_index": 1},
    ]


@pytest.mark.parametrize(
    "events",
    [
        REFUSED,
        replace(REFUSED, admission=COMPLETE.admission),
        replace(REFUSED, ended=Ended("drained", "not_serving", 7)),
        replace(COMPLETE, completion=None),
        replace(COMPLETE, output=OutputComplete(None, (), None), completion=None),
        replace(
            COMPLETE, output=None, completion=None, ended=Ended("client_disconnected", None, 7)
        ),
        replace(COMPLETE, completion=None, ended=Ended("client_disconnected", "x", 7)),
        replace(COMPLETE, output=None, completion=None, ended=Ended("engine_failed", "hung", 7)),
        replace(
            REFUSED,
            ended=Ended("withdrawn", "contraindicated", 0),
            returned=ResponseReturned(EMPTY_SHA256),
        ),
        replace(
            COMPLETE,
            admission=replace(
                COMPLETE.admission,  # type: ignore[type-var]
                inclusion=replace(inclusion("request"), leaf_index=None, path=None),
            ),
        ),
    ],
)
def test_every_ending_has_its_form(events: EventLog) -> None:
    assert read_events(parse_receipt(signed(events))) == events


@pytest.mark.parametrize(
    "events",
    [
        replace(COMPLETE, engine=None),
        replace(COMPLETE, forwarded=None),
        replace(COMPLETE, admission=None),
        replace(COMPLETE, output=None),
        replace(COMPLETE, output=None, completion=None),
        replace(COMPLETE, ended=Ended("complete", "x", 7)),
        replace(COMPLETE, ended=Ended("refused", "x", 7)),
        replace(REFUSED, ended=Ended("refused", None, 7)),
        replace(REFUSED, ended=Ended("refused", "x", 0)),
        replace(REFUSED, returned=ResponseReturned(EMPTY_SHA256)),
        replace(COMPLETE, admission=COMPLETE.completion),
        *(replace(REFUSED, ended=Ended(one, None, 7)) for one in OUTCOMES[2:]),
        replace(REFUSED, output=COMPLETE.output, ended=Ended("drained", "x", 7)),
    ],
)
def test_a_log_that_contradicts_itself_is_neither_signed_nor_read(events: EventLog) -> None:
    with pytest.raises(Malformed, match="event_log: expected"):
        document(events)
    # Somebody else signed it all the same.
    log: list[JsonValue] = [
        one.to_json() for name in EventLog.__slots__ if (one := getattr(events, name)) is not None
    ]
    data = sign_receipt({**document(), "event_log": log}, key_id=KEY.key_id, sign=SECRET.sign)
    with pytest.raises(Malformed):
        read_events(parse_receipt(data))


PATHS = every_path(json.loads(signed()))
FREE = (".set", ".usage")
"""Members whose content is the engine's: any JSON object."""


def of_fixed_form(path: str) -> bool:
    return not any(f"{free}." in path for free in FREE)


@pytest.mark.parametrize("path", [path for path in PATHS if not path.split(".")[-1].isdigit()])
def test_every_member_is_needed(path: str) -> None:
    def remove(value: JsonObject) -> None:
        inner, last = at(value, path)
        del inner[last]

    if not of_fixed_form(path) or path.endswith("prompt_index"):
        read_events(parse_receipt(changed(remove)))
        return
    with pytest.raises(Malformed) as caught:
        read_events(parse_receipt(changed(remove)))
    assert caught.value.field != "$"


@pytest.mark.parametrize("path", [path for path in PATHS if of_fixed_form(path)])
@pytest.mark.parametrize("wrong", [True, -1, 1.5, "", "x" * 600, [], {}, [[]], 2**53 - 1])
def test_a_member_of_another_form_is_malformed(path: str, wrong: JsonValue) -> None:
    """But for the few forms of which the wrong value happens to be one."""
    name = path.rpartition(".")[2]
    takes: dict[str, Any] = {
        "deterministic": [True],
        "unset": [[]],
        "finish_reasons": [[]],
        "usage": [{}],
        "set": [{}],
        "collected_at": [2**53 - 1],
        "served_at": [2**53 - 1],
        "bytes": [2**53 - 1],
        "prompt_index": [2**53 - 1],
        "path": [[]],
    }

    def replace_it(value: JsonObject) -> None:
        inner, last = at(value, path)
        inner[last] = wrong

    if any(wrong == one and type(wrong) is type(one) for one in takes.get(name, [])):
        read_events(parse_receipt(changed(replace_it)))
        return
    with pytest.raises(Malformed):
        read_events(parse_receipt(changed(replace_it)))


@pytest.mark.parametrize("seed", ["05", "+5", "-1", "5.0", "٣", "9007199254740992", " 5", "5\n"])
def test_a_seed_has_one_spelling(seed: str) -> None:
    def spell(value: Any) -> None:
        value["event_log"][4]["seed"] = seed

    with pytest.raises(Malformed, match="seed"):
        read_events(parse_receipt(changed(spell)))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("event_log.2.verdict", "trusted"),
        ("event_log.2.inclusion.kind", "report"),
        ("event_log.6.inclusion.kind", "request"),
        ("event_log.7.outcome", "completed"),
        ("event_log.1.blind", "00" * 31),
        ("event_log.0.body_hash", "00" * 32),
        ("event_log.6.core_sha256", "sha256:" + "00" * 32),
        ("event_log.3.body_hash", "sha256:" + "AA" * 32),
        ("api_version", "dcv/1"),
    ],
)
def test_a_value_that_only_looks_right_is_malformed(path: str, wrong: str) -> None:
    def replace_it(value: JsonObject) -> None:
        inner, last = at(value, path)
        inner[last] = wrong

    with pytest.raises(Malformed) as caught:
        read_events(parse_receipt(changed(replace_it)))
    assert path.rpartition(".")[2] in caught.value.field


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_events_out_of_order_twice_or_unknown_are_malformed(data: st.DataObject) -> None:
    value = json.loads(signed())
    log = value["event_log"]
    match data.draw(st.sampled_from(["swap", "repeat", "unknown"])):
        case "swap":
            first, second = data.draw(
                st.lists(st.integers(0, len(log) - 1), min_size=2, max_size=2, unique=True)
            )
            log[first], log[second] = log[second], log[first]
        case "repeat":
            log.insert(data.draw(st.integers(0, 9)), log[data.draw(st.integers(0, 8))])
        case _:
            log.insert(data.draw(st.integers(0, 9)), {"type": "upstream.verified"})
    with pytest.raises(Malformed):
        read_events(parse_receipt(json.dumps(value).encode()))


def test_a_receipt_is_bounded() -> None:
    with pytest.raises(Malformed, match="at most"):
        parse_receipt(b" " * MAX_RECEIPT_BYTES + signed())

    def rewrite(count: int) -> Callable[[Any], None]:
        def apply(value: Any) -> None:
            value["event_log"][4]["rewrite"] = [{"set": {}, "unset": []}] * count

        return apply

    read_events(parse_receipt(changed(rewrite(MAX_REWRITES))))
    with pytest.raises(Malformed, match="rewrite"):
        read_events(parse_receipt(changed(rewrite(MAX_REWRITES + 1))))


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(deadline=None)
def test_any_other_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_receipt(data)


# -------------------------------------------------------------------------------- the signature


def test_the_signature_verifies_and_covers_every_member() -> None:
    verify_signature(parse_receipt(signed()).document, KEY)
    for path in PATHS:
        if path == "signature":
            continue

        def alter(value: JsonObject, path: str = path) -> None:
            inner, last = at(value, path)
            inner[last] = "receipt-2" if path == "key_id" else [inner[last]]

        with pytest.raises(Unauthentic):
            verify_signature(json.loads(changed(alter)), KEY)


@given(st.integers(0, 64 * 8 - 1))
@settings(max_examples=40, deadline=None)
def test_a_signature_with_a_flipped_bit_never_verifies(bit: int) -> None:
    receipt = parse_receipt(signed())
    flipped = bytearray(receipt.signature)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Unauthentic):
        verify_signature({**receipt.document, "signature": flipped.hex()}, KEY)


def test_another_key_of_the_same_name_and_a_key_that_is_none_do_not_verify() -> None:
    receipt = parse_receipt(signed()).document
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    for raw in (other, b"\xff" * 32):
        with pytest.raises(Unauthentic):
            verify_signature(receipt, PublicKey(KEY.key_id, raw))
    with pytest.raises(Unauthentic, match="receipt-9"):
        verify_signature(receipt, PublicKey("receipt-9", KEY.raw))
    with pytest.raises(Malformed):
        verify_signature({**receipt, "signature": "00"}, KEY)


@pytest.mark.skipif(not ACI.is_file(), reason=f"the vectors are not here: {ACI.name}")
def test_the_published_receipt_of_another_service_is_read_and_verifies() -> None:
    vectors = json.loads(ACI.read_text())
    unsigned = vectors["receipt_signing_input_jcs"]
    data = json.dumps({**json.loads(unsigned), "signature": vectors["receipt_signature"]}).encode()
    receipt = parse_receipt(data)
    assert signing_input(receipt.document) == unsigned.encode()
    key = PublicKey(receipt.key_id, bytes.fromhex(vectors["receipt_public_key"]))
    verify_signature(receipt.document, key)
    with pytest.raises(Unauthentic):
        verify_signature({**receipt.document, "served_at": 1_750_000_001}, key)
    # Its log is not one of dcv/1, and says so.
    with pytest.raises(Malformed, match=r"event_log\[1\]: expected dcv.request"):
        read_events(receipt)


# ----------------------------------------------------------------------------- forwarded bodies

prompts = (
    st.text(max_size=8)
    | st.lists(st.integers(0, 99), min_size=1, max_size=3)
    | st.lists(st.text(max_size=8), min_size=1, max_size=3)
    | st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), min_size=1, max_size=3)
)
options = st.fixed_dictionaries(
    {},
    optional={
        "n": st.none() | st.integers(1, 3),
        "seed": st.none() | st.integers(0, MAX_SAFE_INTEGER),
        "temperature": st.none() | st.floats(0, 2),
        "user": st.text(max_size=3),
        "metadata": st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
        "stream": st.none() | st.booleans(),
        "stream_options": st.none()
        | st.fixed_dictionaries({}, optional={"include_usage": st.none() | st.booleans()}),
        "provider": st.sampled_from([None, {"aci_verified": True}]),
        "stop": st.none() | st.lists(st.text(max_size=3), max_size=2),
    },
)


conversations = st.just([{"role": "user", "content": "CANARY"}])
embedded = st.text(min_size=1, max_size=8).filter(str.strip)  # white space alone is refused
inputs = embedded | st.lists(embedded, min_size=1, max_size=3)
contents: dict[Endpoint, st.SearchStrategy[dict[str, Any]]] = {
    Endpoint.CHAT: st.builds(
        lambda messages, keys: {"messages": messages} | keys, conversations, options
    ),
    Endpoint.COMPLETION: st.builds(
        lambda prompt, keys: {"prompt": prompt} | keys, prompts, options
    ),
    Endpoint.EMBEDDINGS: st.fixed_dictionaries(
        {"input": inputs},
        optional={
            "encoding_format": st.sampled_from([None, "float", "base64"]),
            "user": st.text(max_size=3),
            "tee": st.none() | st.booleans(),
            "provider": st.sampled_from([None, {"aci_verified": True}]),
        },
    ),
}


@pytest.mark.parametrize("endpoint", Endpoint)
@given(data=st.data(), spaced=st.booleans())
@settings(max_examples=200, deadline=None)
def test_forwarded_bytes_are_recomputed_from_the_wire_body_and_the_receipt(
    endpoint: Endpoint, data: st.DataObject, spaced: bool
) -> None:
    content = data.draw(contents[endpoint])
    raw = json.dumps({**content, "model": "m"}, indent=1 if spaced else None).encode()
    body = parse_json_object(raw, max_nesting=64)
    plans = plan_choices(
        parse_request(endpoint, body),
        response_id="cmpl-1",
        seed=5,
        cache_salt="salt",
        max_choices=128,
    )
    sent = [forwarded_body(body, plan) for plan in plans]
    engine = EngineUsed(sha("W"), 5, deterministic=True, rewrite=tuple(map(rewrite_of, plans)))
    told = signed(
        replace(COMPLETE, engine=engine, forwarded=RequestForwarded(forwarded_hash(sent)))
    )
    read = read_events(parse_receipt(told))
    assert read.engine is not None
    recomputed = [forwarded_bytes(raw, rewrite) for rewrite in read.engine.rewrite]
    assert recomputed == sent
    assert list(forwarded_bodies(body, plans)) == sent
    assert read.forwarded == RequestForwarded(hashlib.sha256(b"".join(recomputed)).digest())


def test_keys_from_beyond_the_first_plane_stand_where_jcs_has_them() -> None:
    """By UTF-16 code units U+1F600 comes before U+FB01, by code points behind it."""
    body: JsonObject = {"model": "m", "prompt": ["a", "b"], "\ufb01": 1, "\U0001f600": 2}
    plans = plan_choices(
        parse_request(Endpoint.COMPLETION, body, extra_keys=body),
        response_id="cmpl-1",
        seed=5,
        cache_salt="salt",
        max_choices=128,
    )
    sent = [forwarded_body(body, plan) for plan in plans]
    assert list(forwarded_bodies(body, plans)) == sent


@pytest.mark.parametrize(
    ("usage", "fits"),
    [
        (None, True),
        ({"total_tokens": 2**53 - 1}, True),
        ({"total_tokens": 2**53}, False),
        ({"details": {"cost": 0.5}}, True),
        ({"cost": 1e20}, False),
        ({"cost": float("nan")}, False),
        ({"text": "\ud800"}, False),
        ({"text": "x" * MAX_USAGE_BYTES}, False),
        (json.loads('{"a":' * 17 + "1" + "}" * 17), False),
    ],
)
def test_usage_that_not_every_parser_reads_alike_is_in_no_receipt(
    usage: JsonObject | None, fits: bool
) -> None:
    assert is_usage(usage) is fits
    if fits:
        told = OutputComplete(sha("output"), ("stop",), usage)
        assert read_events(parse_receipt(signed(replace(COMPLETE, output=told)))).output == told


def test_no_prompt_of_several_is_in_a_receipt() -> None:
    body: JsonObject = {"model": "m", "prompt": ["CANARY one", "CANARY two"], "n": 2}
    plans = plan_choices(
        parse_request(Endpoint.COMPLETION, body),
        response_id="cmpl-1",
        seed=5,
        cache_salt="salt",
        max_choices=128,
    )
    rewrites = [rewrite_of(plan) for plan in plans]
    assert [one.prompt_index for one in rewrites] == [0, 0, 1, 1]
    assert "CANARY" not in json.dumps([one.to_json() for one in rewrites])


@pytest.mark.parametrize("body", [{}, {"prompt": "text"}, {"prompt": ["only one"]}])
def test_a_prompt_that_the_body_does_not_have_is_malformed(body: JsonObject) -> None:
    with pytest.raises(Malformed, match="prompt"):
        forwarded_bytes(canonical_json(body), Rewrite({}, (), 1))

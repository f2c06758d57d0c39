"""Checkpoints: what is signed, where it stands in an answer, and that a stream of real events is
proven byte for byte, whatever the timing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import Limits, parse_config
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    DeviceFault,
    EngineStreamFailed,
    InternalError,
    Malformed,
    NotServing,
    Unauthentic,
)
from appliance.log import configure_log
from appliance.rats.result import AttestationResult, Tier, conclude
from appliance.serving.admission import Admission, Exchange
from appliance.serving.auth import Tenant
from appliance.serving.epochs import Epochs
from appliance.serving.exchanges import ExchangeRecord, ReceiptDesk
from appliance.serving.identity import Identity, create_identity
from appliance.serving.image_facts import ImageFacts
from appliance.serving.keys import create_signing_key
from appliance.serving.lifecycle import Lifecycle, State
from appliance.serving.metrics import Metrics
from appliance.serving.receipts import ReceiptStore
from appliance.serving.relay import prepare
from appliance.web.stream import ProvenStreamBody, StreamProof, UncleanEnd
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.checkpoint import (
    COMMENT,
    MAX_CHECKPOINT_BYTES,
    Checkpoint,
    Core,
    checkpoint_chunk,
    checkpoint_comment,
    checkpoint_of_answer,
    find_checkpoints,
    parse_checkpoint,
    parse_comment,
    read_checkpoint,
    sign_checkpoint,
    verify_checkpoint,
)
from appliance.wire.commitments import (
    Inclusion,
    Kind,
    completion_commitment,
    completion_commitment_of,
)
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import PublicKey
from appliance.wire.merkle import root_of
from appliance.wire.openai import Endpoint, Proof, parse_request, plan_choices
from appliance.wire.output import output_of_stream
from appliance.wire.receipt import EventLog, GpuAttested, parse_receipt, read_events
from appliance.wire.sse import DONE_EVENT, PING, PING_LINE, encode_event
from tests.integration.appliance import config_text

SECRET = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = PublicKey("checkpoint-1", SECRET.public_key().public_bytes_raw())


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def inclusion(kind: Kind) -> Inclusion:
    return Inclusion(kind, sha("keyset"), 2, 1, (sha("sibling"),), sha("root"))


CORE = Core(
    seq=3,
    final=True,
    receipt_id="ab" * 16,
    keyset_digest=sha("keyset"),
    request_body_hash=sha("body"),
    prefix_bytes=17,
    prefix_sha256=sha("prefix"),
    output_digest=sha("output"),
    gpu=GpuAttested("admission", sha("e1"), inclusion("request"), "affirming", 1_750_000_000),
    key_id=KEY.key_id,
)
RUNNING = replace(CORE, final=False, output_digest=None)
WHOLE = replace(CORE, prefix_bytes=None, prefix_sha256=None)
COMPLETION = GpuAttested(
    "completion", sha("e2"), inclusion("completion"), "warning", 1_750_000_001, sha("core")
)
DOCUMENT = sign_checkpoint(CORE, COMPLETION, sign=SECRET.sign)
DATA = canonical_json(DOCUMENT)


def verified(checkpoint: Checkpoint) -> Checkpoint:
    verify_checkpoint(checkpoint, KEY)
    return checkpoint


# ------------------------------------------------------------------------------------- the form


def test_the_core_has_the_members_of_the_protocol_and_no_other() -> None:
    assert CORE.to_json() == {
        "api_version": "dcv/1",
        "type": "checkpoint",
        "seq": 3,
        "final": True,
        "receipt_id": "ab" * 16,
        "workload_keyset_digest": "sha256:" + sha("keyset").hex(),
        "request_body_hash": "sha256:" + sha("body").hex(),
        "prefix_bytes": 17,
        "prefix_sha256": sha("prefix").hex(),
        "output_digest": "sha256:" + sha("output").hex(),
        "gpu": CORE.gpu.to_json(),
        "key_id": "checkpoint-1",
    }
    assert DOCUMENT.keys() == CORE.to_json().keys() | {"completion", "signature"}
    assert DOCUMENT["completion"] == COMPLETION.to_json()
    unsigned = {name: value for name, value in DOCUMENT.items() if name != "signature"}
    assert canonical_json(unsigned).startswith(b"{")  # a token's signing input begins `eyJ`
    SECRET.public_key().verify(bytes.fromhex(str(DOCUMENT["signature"])), canonical_json(unsigned))


@pytest.mark.parametrize(
    ("core", "completion"),
    [(CORE, COMPLETION), (CORE, None), (WHOLE, COMPLETION), (WHOLE, None), (RUNNING, None)],
)
def test_a_checkpoint_is_read_as_it_was_written_in_every_form(
    core: Core, completion: GpuAttested | None
) -> None:
    document = sign_checkpoint(core, completion, sign=SECRET.sign)
    read = verified(parse_checkpoint(canonical_json(document)))
    assert (read.core, read.completion, read.document) == (core, completion, document)
    assert read.raw == canonical_json(core.to_json())
    assert read.core_sha256 == hashlib.sha256(read.raw).digest()
    assert completion_commitment(core.to_json()) == completion_commitment_of(read.core_sha256)
    assert parse_comment(checkpoint_comment(document).removesuffix(b"\n\n")) == read
    assert checkpoint_of_answer({"id": "x", "dcv": document}) == read
    assert checkpoint_of_answer({"id": "x"}) is None


def test_no_bit_of_a_checkpoint_can_be_changed() -> None:
    for place in range(8 * len(DATA)):
        changed = bytearray(DATA)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises((Malformed, Unauthentic)):
            verified(parse_checkpoint(bytes(changed)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(checkpoint_comment(DOCUMENT)) - 3), st.integers(0, 7))
def test_no_byte_of_a_comment_can_be_changed(place: int, bit: int) -> None:
    changed = bytearray(checkpoint_comment(DOCUMENT)[:-2])
    changed[place] ^= 1 << bit
    with pytest.raises((Malformed, Unauthentic)):
        verified(parse_comment(bytes(changed)))


def test_only_the_checkpoint_key_under_its_name_signs() -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32).public_key().public_bytes_raw()
    for key in (PublicKey(KEY.key_id, other), PublicKey("receipt-1", KEY.raw)):
        with pytest.raises(Unauthentic, match="checkpoint"):
            verify_checkpoint(parse_checkpoint(DATA), key)


WRONG: list[tuple[str, JsonValue]] = [
    ("api_version", "dcv/2"),
    ("type", "receipt"),
    ("seq", -1),
    ("seq", True),
    ("seq", 1.5),
    ("final", 1),
    ("final", None),
    ("receipt_id", ""),
    ("receipt_id", "x" * 513),
    ("workload_keyset_digest", sha("keyset").hex()),
    ("request_body_hash", None),
    ("prefix_bytes", None),
    ("prefix_bytes", "17"),
    ("prefix_sha256", None),
    ("prefix_sha256", "sha256:" + sha("prefix").hex()),
    ("output_digest", sha("output").hex()),
    ("gpu", None),
    ("gpu", COMPLETION.to_json()),
    ("gpu", {**CORE.gpu.to_json(), "inclusion": inclusion("completion").to_json()}),
    ("gpu", {**CORE.gpu.to_json(), "type": "dcv.output"}),
    ("key_id", 1),
    ("completion", CORE.gpu.to_json()),
    ("completion", {**COMPLETION.to_json(), "core_sha256": None}),
    ("completion", []),
    ("signature", "00" * 63),
    ("signature", ("00" * 64).upper().replace("0", "A")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_member_out_of_form_is_malformed(name: str, value: JsonValue) -> None:
    with pytest.raises(Malformed):
        parse_checkpoint(json.dumps({**DOCUMENT, name: value}).encode())


@pytest.mark.parametrize("name", sorted(DOCUMENT))
def test_every_member_is_there_and_no_other(name: str) -> None:
    less = {key: value for key, value in DOCUMENT.items() if key != name}
    for document in (less, {**less, f"{name}2": DOCUMENT[name]}, {**DOCUMENT, "more": 1}):
        with pytest.raises(Malformed, match="expected exactly"):
            read_checkpoint(document, where="$")


@pytest.mark.parametrize(
    "core",
    [
        replace(RUNNING, output_digest=sha("output")),
        replace(RUNNING, prefix_bytes=None, prefix_sha256=None),
    ],
)
def test_before_the_end_there_is_a_prefix_and_neither_output_nor_completion(core: Core) -> None:
    for completion in (None, COMPLETION):
        with pytest.raises(Malformed):
            read_checkpoint(sign_checkpoint(core, completion, sign=SECRET.sign), where="$")
    with pytest.raises(Malformed, match="completion"):
        read_checkpoint(sign_checkpoint(RUNNING, COMPLETION, sign=SECRET.sign), where="$")


TEXT = base64.urlsafe_b64encode(canonical_json({"a": 1})).rstrip(b"=")


@pytest.mark.parametrize(
    "event",
    [
        b": ping",
        b"dcv-checkpoint " + TEXT,
        COMMENT,
        COMMENT + TEXT,  # JSON, and no checkpoint
        COMMENT + base64.urlsafe_b64encode(DATA + b" "),  # padded
        COMMENT + base64.urlsafe_b64encode(DATA).rstrip(b"=") + b"\n",
        COMMENT + b" " + base64.urlsafe_b64encode(DATA).rstrip(b"="),
        COMMENT + base64.urlsafe_b64encode(b"{\xff}").rstrip(b"="),
        COMMENT + base64.b64encode(b'{"\xff\xfe\xfd?~~":1}').rstrip(b"="),
        COMMENT + b"e30x",
        COMMENT + b"e3",
        COMMENT + b"A" * (2 * MAX_CHECKPOINT_BYTES),
        COMMENT + "é".encode(),
    ],
)
def test_a_comment_out_of_form_is_malformed(event: bytes) -> None:
    with pytest.raises(Malformed):
        parse_comment(event)


def test_a_checkpoint_has_a_bound() -> None:
    long = {**DOCUMENT, "receipt_id": "x" * MAX_CHECKPOINT_BYTES}
    with pytest.raises(Malformed, match="at most"):
        parse_checkpoint(canonical_json(long))


# ------------------------------------------------------------------------------------ in a stream


def chunk(text: str) -> bytes:
    delta: JsonObject = {"content": text, "role": None}
    return encode_event({"id": "c", "choices": [{"index": 0, "delta": delta}]})


def at_end(document: JsonObject) -> bytes:
    return encode_event(
        checkpoint_chunk(
            object="chat.completion.chunk",
            response_id="c",
            created=1,
            model="m",
            members={"dcv": document},
        )
    )


pieces = st.lists(
    st.one_of(
        st.text(max_size=12).map(chunk),
        st.sampled_from(
            [
                PING,
                chunk('"dcv": {"seq": 1}'),
                chunk("\n\n: dcv-checkpoint e30\n\n"),
                chunk('data: {"dcv":1}'),
                encode_event({"error": {"message": "dcv"}}),
            ]
        ),
        st.integers(0, 3).map(lambda number: PING_LINE * number + b"\x00"),  # a checkpoint
        st.just(b"\x01"),  # one in a comment
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(pieces, st.integers(0, 40))
def test_checkpoints_are_found_where_they_begin_and_nothing_else_is(
    pieces: list[bytes], cut: int
) -> None:
    content, expected = b"", list[tuple[int, int]]()
    for piece in pieces:
        start = len(content)
        if piece.endswith((b"\x00", b"\x01")):
            in_comment = piece == b"\x01"
            core = replace(RUNNING if in_comment else CORE, prefix_bytes=start)
            document = sign_checkpoint(core, None, sign=SECRET.sign)
            content += checkpoint_comment(document) if in_comment else piece[:-1] + at_end(document)
            expected.append((start, len(content)))
        else:
            content += piece
    content = content[: max(0, len(content) - cut)]
    found = list(find_checkpoints(content))
    assert [(one.start, one.end) for one in found] == [
        place for place in expected if place[1] <= len(content)
    ]
    assert all(one.checkpoint.core.prefix_bytes == one.start for one in found)


def test_a_checkpoint_out_of_form_in_a_stream_is_malformed() -> None:
    for event in (COMMENT + b"e30\n\n", at_end({}), b'data: {"dcv":null}\n\n'):
        with pytest.raises(Malformed):
            list(find_checkpoints(chunk("x") + event))


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"dcv" :{}}',
        b'data: {"d\\u0063v":{}}',
        b'data: {"attestation":{}}',
        b'data: {"resolved_model":{"id":"m"}}',
        b': ping\ndata: {"resolved\\u005fmodel":{"id":"m"}}',
        # Events for a client, by other spellings than ours.
        b'data:{"dcv":{}}',
        b'data: {"choices":[],\r"x":1}',
        b': a comment\rdata: {"dcv":{}}',
        b'data: {"choices":\ndata: []}',
        b'event: x\ndata: {"dcv":{}}',
        b"id: 1",
    ],
)
def test_no_spelling_hides_a_checkpoint_or_what_stands_beside_one(event: bytes) -> None:
    with pytest.raises(Malformed) as raised:
        list(find_checkpoints(chunk("x") + event + b"\n\n"))
    assert raised.value.offset == len(chunk("x"))


@pytest.mark.parametrize("unit", [b":", b": ping\n", b"\n", b"\n\n", b'data: {"dcv":', COMMENT])
def test_reading_takes_time_in_proportion_to_the_content(unit: bytes) -> None:
    began = time.process_time()
    for content in (unit * (4_000_000 // len(unit)), unit * (4_000_000 // len(unit)) + b"\n\n"):
        try:
            list(find_checkpoints(content))
            output_of_stream(content, max_bytes=10)
        except Malformed:
            continue
    assert time.process_time() - began < 20


# ------------------------------------------------------------------- a stream, from real parts

TENANT = Tenant("a", "a")
HEARTBEAT_S, CHECKPOINT_S, EVIDENCE_S = 15.0, 10.0, 60.0
LIMITS = Limits(heartbeat_s=HEARTBEAT_S, checkpoint_s=CHECKPOINT_S)


class EngineEvents:
    """The engine's side: blocks of events, each after so many seconds."""

    def __init__(self, blocks: list[tuple[float, bytes]], fails: Exception | None = None) -> None:
        self._blocks = list(blocks)
        self._fails = fails
        self._due: float | None = None

    async def start(self) -> None:
        return None

    async def receive(self) -> bytes:
        """May be cancelled and called again, like a connection."""
        if not self._blocks:
            if self._fails is not None:
                raise self._fails
            return b""
        after, data = self._blocks[0]
        self._due = trio.current_time() + after if self._due is None else self._due
        await trio.sleep_until(self._due)
        self._due = None
        self._blocks.pop(0)
        return data

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


@dataclass
class Stream:
    """One exchange from its admission on, and what came of it."""

    folder: Path
    events: EngineEvents
    wanted: JsonObject
    report_s: float = 0.1
    fault: ApplianceError | None = None
    content: bytes = b""
    gaps: list[float] = field(default_factory=list)
    ended_by: Exception | None = None
    identity: Identity | None = None
    exchange: Exchange | None = None
    record: ExchangeRecord | None = None
    calls: int = 0
    left: bool = False

    async def collect(self, nonce: bytes, _asked: Callable[[], None]) -> tuple[GpuEvidence, ...]:
        self.calls += 1
        await trio.sleep(self.report_s if self.calls > 1 else 0)
        if self.fault is not None and self.calls > 1:
            raise self.fault
        return (GpuEvidence("simulated", nonce, b"chain"),)

    async def run(
        self,
        meanwhile: Callable[[Stream, trio.CancelScope], Any] = lambda _stream, _scope: None,
    ) -> EventLog:
        """All of it; the log of its receipt."""
        async with trio.open_nursery() as nursery:
            epochs = Epochs(
                collect=self.collect,
                appraise=_affirm,
                keyset_digest=lambda: sha("keyset"),
                deadline_s=1000,
                failures=3,
                withdraw=lambda _error: None,
                now=trio.current_time,
                log=configure_log(format="json", level="critical"),
            )
            nursery.start_soon(epochs.run)
            store = await self._admit(epochs)
            assert self.record is not None
            with trio.CancelScope() as client:
                meanwhile(self, client)
                await self._send(epochs)
            self.left = client.cancelled_caught
            self.record.abandoned()
            assert epochs.waiting == 0
            data = await store.find(self.record.receipt_id, TENANT.id)
            nursery.cancel_scope.cancel()
        return read_events(parse_receipt(data))

    async def _admit(self, epochs: Epochs) -> ReceiptStore:
        config = parse_config(config_text(self.folder), folder=self.folder)
        self.identity = create_identity(
            config,
            settings={},
            gpus=[],
            image=ImageFacts(),
            spki_sha256=bytes(32),
            receipt_key=create_signing_key("receipt"),
            checkpoint_key=create_signing_key("checkpoint"),
            operator_input_digest=None,
        )
        store = ReceiptStore(
            self.folder / "receipts",
            now=trio.current_time,
            log=configure_log(format="json", level="critical"),
        )
        desk = ReceiptDesk(
            self.identity,
            store,
            keyset_digest=lambda: sha("keyset"),
            max_bytes=1 << 20,
            random=bytes,
            now=trio.current_time,
        )
        raw = json.dumps(self.wanted).encode()
        request = parse_request(Endpoint.CHAT, self.wanted)
        plans = plan_choices(request, response_id="c", seed=1, cache_salt="s", max_choices=1)
        lifecycle = Lifecycle(wall_clock=trio.current_time, clock=trio.current_time)
        lifecycle.enter(State.SERVING)
        self.exchange = await Admission(lifecycle, LIMITS).admit(TENANT, places=1)
        self.record = desk.open(TENANT, endpoint="/v1/x", raw=raw, client_nonce=None)
        self.record.understood(request, "c")
        self.record.begin()
        self.record.admitted(await epochs.join("request", self.record.commitment))
        self.record.forwarded(prepare(self.wanted, plans).body_hash, plans)
        self.proof = request.proof
        self.observed = Metrics(lifecycle, clock=trio.current_time).observe("/v1/x")
        return store

    async def _send(self, epochs: Epochs) -> None:
        """As `web.app` does."""
        assert self.record is not None
        assert self.exchange is not None
        body = ProvenStreamBody(
            self.events,
            self.exchange,
            LIMITS,
            self.observed,
            self.record,
            begun=True,
            first_deadline=trio.current_time() + 1000,
            usage_asked=False,
            proof=StreamProof(self.proof, last_chunk, epochs, EVIDENCE_S),
        )
        last = trio.current_time()

        def write(data: bytes) -> None:
            nonlocal last
            self.content += data
            self.gaps.append(trio.current_time() - last)
            last = trio.current_time()

        try:
            async with body:
                await body.relay(write)
        except Exception as error:  # what the server would get
            self.ended_by = error

    def check_prefixes(self) -> list[Checkpoint]:
        """Every checkpoint is signed, numbered, and about the bytes before it."""
        assert self.identity is not None
        found = list(find_checkpoints(self.content))
        for number, one in enumerate(found):
            verify_checkpoint(one.checkpoint, self.identity.checkpoint_key.public)
            core = one.checkpoint.core
            assert core.seq == number
            assert core.prefix_bytes == one.start
            assert core.prefix_sha256 == hashlib.sha256(self.content[: one.start]).digest()
        return [one.checkpoint for one in found]


def last_chunk(members: JsonObject) -> JsonObject:
    return checkpoint_chunk(object="o", response_id="c", created=1, model="m", members=members)


async def _affirm(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
    part = AttestationResult(Tier.AFFIRMING, {"chip": "GH100"})
    named = {f"GPU-{index}": part for index, _ in enumerate(gpus)}
    return conclude({"nonce": nonce.hex()}, (), named)


def asked(tee: bool | None, receipt: bool, checkpoints: bool) -> JsonObject:
    options: JsonObject = {"include_receipt": receipt, "include_checkpoints": checkpoints}
    messages: list[JsonValue] = [{"role": "user", "content": "x"}]
    body: JsonObject = {"model": "m", "messages": messages, "stream": True}
    return {**body, "tee": tee, "stream_options": options}


def run(work: Callable[[], Any]) -> Any:
    return trio.run(work, clock=trio.testing.MockClock(autojump_threshold=0))


SLOW = st.sampled_from([0.0, 0.5, 7.0, 9.999, 10.0, 14.0, 15.0, 16.0, 31.0])


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(SLOW, min_size=1, max_size=8),
    together=st.booleans(),
    report_s=st.sampled_from([0.0, 5.0, 15.0, 40.0]),
    tee=st.booleans(),
    receipt=st.booleans(),
    checkpoints=st.booleans(),
)
def test_whatever_the_timing_every_checkpoint_is_about_the_bytes_before_it(
    tmp_path_factory: pytest.TempPathFactory,
    delays: list[float],
    together: bool,
    report_s: float,
    tee: bool,
    receipt: bool,
    checkpoints: bool,
) -> None:
    said = [chunk(f"word{number}") for number in range(len(delays))]
    blocks = list(zip(delays, said, strict=True))
    if together:
        blocks[-1] = (delays[-1], said[-1] + DONE_EVENT)
    else:
        blocks.append((0.5, DONE_EVENT))
    stream = Stream(
        tmp_path_factory.mktemp("s"),
        EngineEvents(blocks),
        asked(tee, receipt, checkpoints),
        report_s,
    )
    log = run(stream.run)
    content, found = stream.content, stream.check_prefixes()
    # The client who reads only events reads what the engine said, in the same bytes.
    events = [one for one in content.split(b"\n\n") if one and not one.startswith(b":")]
    at_last = [one for one in content.split(b"\n\n") if b'"dcv":' in one]
    assert [one + b"\n\n" for one in events if b'"dcv":' not in one] == [*said, DONE_EVENT]
    assert content.endswith(DONE_EVENT)
    assert len(at_last) == (tee or receipt)
    # A whole exchange, and its receipt is about all of these bytes.
    assert stream.ended_by is None
    assert (log.ended.outcome, log.ended.bytes) == ("complete", len(content))
    assert log.returned.body_hash == hashlib.sha256(content).digest()
    assert log.output is not None
    plain = output_of_stream(b"".join(said) + DONE_EVENT, max_bytes=1 << 20)
    assert log.output.output_digest == plain.digest
    assert output_of_stream(content, max_bytes=1 << 20).digest == plain.digest
    # Never silent for longer than a heartbeat; every 10 s where that was asked for.
    assert max(stream.gaps) <= HEARTBEAT_S + 1e-6
    running = [one for one in found if not one.core.final]
    assert bool(running) <= checkpoints
    if checkpoints:
        assert len(running) == int((sum(delays) + (0 if together else 0.5)) // CHECKPOINT_S) or (
            abs(len(running) - sum(delays) / CHECKPOINT_S) <= 1
        )
    if tee or receipt:
        last = found[-1]
        assert last.core.final
        assert last.core.output_digest == plain.digest
        assert last.core.gpu == log.admission
        assert last.completion == log.completion
        assert (log.completion is not None) == tee
    if log.completion is not None:
        assert log.completion.core_sha256 == found[-1].core_sha256
        place = log.completion.inclusion
        commitment = completion_commitment(found[-1].core.to_json())
        assert place.leaf_index is not None
        assert place.path is not None
        assert root_of(commitment, place.leaf_index, place.tree_size, place.path) == place.root


@pytest.mark.parametrize(
    "told",
    [
        b'{"choices":[],"usage":{"total_tokens":9007199254740993}}',
        b'{"choices":[],"usage":{"cost":1e20}}',
        b'{"choices":[{"index":0,"delta":{},"finish_reason":""}]}',
        b'{"choices":[{"index":1,"delta":{"content":"more"}}]}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_nothing_that_an_engine_tells_keeps_a_stream_from_its_receipt(
    autojump_clock: trio.abc.Clock, tmp_path: Path, told: bytes
) -> None:
    events = [(0.0, chunk("yes")), (0.0, b"data: " + told + b"\n\n"), (0.0, DONE_EVENT)]
    stream = Stream(tmp_path, EngineEvents(events), TEE)
    log = await stream.run()
    assert log.ended.outcome == "complete"
    assert log.output is not None
    assert (log.output.output_digest, log.output.finish_reasons) == (None, ())
    assert log.output.usage is None
    [last] = stream.check_prefixes()
    assert last.core.output_digest is None


TEE = asked(tee=True, receipt=False, checkpoints=False)
ANSWER = [(0.0, chunk("yes")), (0.0, DONE_EVENT)]


async def test_while_evidence_is_awaited_the_client_hears_that_it_is(
    autojump_clock: trio.abc.Clock, tmp_path: Path
) -> None:
    stream = Stream(tmp_path, EngineEvents(ANSWER), TEE, report_s=40)
    log = await stream.run()
    [last] = list(find_checkpoints(stream.content))
    assert stream.content[last.start or 0 :].startswith(PING_LINE * 2 + b"data: {")
    assert log.ended.outcome == "complete"


@pytest.mark.parametrize(
    ("fault", "report_s", "outcome"),
    [
        (DeviceFault("it hangs"), 1.0, "refused"),
        (Unauthentic("not its signature"), 1.0, "withdrawn"),
        (None, 3 * EVIDENCE_S, "refused"),
        (Unauthentic("not its signature"), 20.0, "withdrawn"),
    ],
    ids=["device", "forged", "late", "forged after a heartbeat"],
)
async def test_without_completion_evidence_the_stream_has_no_end(
    autojump_clock: trio.abc.Clock,
    tmp_path: Path,
    fault: ApplianceError | None,
    report_s: float,
    outcome: str,
) -> None:
    stream = Stream(tmp_path, EngineEvents(ANSWER), TEE, report_s=report_s, fault=fault)
    log = await stream.run()
    assert isinstance(stream.ended_by, UncleanEnd)
    assert b'"code":"attestation_failed"' in stream.content
    assert b"[DONE]" not in stream.content
    assert list(find_checkpoints(stream.content)) == []
    assert (log.ended.outcome, log.ended.code) == (outcome, "attestation_failed")
    assert (log.output, log.completion) == (None, None)
    assert log.returned.body_hash == hashlib.sha256(stream.content).digest()


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [(NotServing("draining"), "drained"), (AttesterUnavailable("gone"), "withdrawn")],
)
async def test_a_drain_or_a_withdrawal_ends_the_wait_and_is_told(
    autojump_clock: trio.abc.Clock, tmp_path: Path, reason: ApplianceError, outcome: str
) -> None:
    stream = Stream(tmp_path, EngineEvents(ANSWER), TEE, report_s=50)
    async with trio.open_nursery() as nursery:

        async def interrupt(stream: Stream) -> None:
            await trio.sleep(20)
            assert stream.exchange is not None
            stream.exchange.interrupt(reason)

        log = await stream.run(lambda stream, _scope: nursery.start_soon(interrupt, stream))
    assert trio.current_time() < 25 + 50  # the device goes on by itself
    assert stream.content.endswith(b"\n\n")
    assert f'"code":"{reason.code}"'.encode() in stream.content
    assert (log.ended.outcome, log.ended.code) == (outcome, reason.code)


async def test_a_client_that_leaves_while_evidence_is_awaited_leaves_the_line(
    autojump_clock: trio.abc.Clock, tmp_path: Path
) -> None:
    stream = Stream(tmp_path, EngineEvents(ANSWER), TEE, report_s=50)

    def leave(_stream: Stream, client: trio.CancelScope) -> None:
        client.deadline = trio.current_time() + 20

    log = await stream.run(leave)
    assert stream.left
    assert (log.ended.outcome, log.ended.code) == ("client_disconnected", None)
    assert (log.output, log.completion) == (None, None)


@pytest.mark.parametrize(
    ("fails", "code", "outcome"),
    [
        (EngineStreamFailed("cut"), "engine_failed", "engine_failed"),
        (ZeroDivisionError("a prompt"), "internal_error", "refused"),
    ],
)
async def test_a_failure_and_a_defect_are_told_recorded_and_end_uncleanly(
    autojump_clock: trio.abc.Clock, tmp_path: Path, fails: Exception, code: str, outcome: str
) -> None:
    events = EngineEvents([(0.0, chunk("yes"))], fails)
    stream = Stream(tmp_path, events, TEE)
    log = await stream.run()
    assert f'"code":"{code}"'.encode() in stream.content
    assert b"a prompt" not in stream.content
    assert (log.ended.outcome, log.ended.code) == (outcome, code)
    assert log.returned.body_hash == hashlib.sha256(stream.content).digest()
    # The server's log names a defect; of another failure it only has to end the body uncleanly.
    assert isinstance(stream.ended_by, UncleanEnd) != (code == InternalError.code)


def test_a_proof_that_nobody_asked_for_is_not_wanted() -> None:
    assert not Proof().wanted
    assert not Proof(tee=False).wanted

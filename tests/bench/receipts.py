"""Receipts: what finishing one costs, what storing them does to streams, what verifying costs."""

from __future__ import annotations

import datetime
import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import trio

from appliance.attester.simulated.provider import SimulatedGpus
from appliance.config import parse_config
from appliance.log import configure_log
from appliance.rats.result import AttestationResult, Tier
from appliance.serving.auth import Tenant
from appliance.serving.epochs import Attested, Epoch
from appliance.serving.exchanges import ExchangeRecord, ReceiptDesk
from appliance.serving.identity import create_identity
from appliance.serving.image_facts import ImageFacts
from appliance.serving.keys import create_signing_key
from appliance.serving.receipts import ReceiptStore
from appliance.serving.relay import prepare
from appliance.verifier.bundle import parse_bundle
from appliance.verifier.check import check, load_rules
from appliance.wire.canonical import JsonObject, parse_json_object
from appliance.wire.commitments import Inclusion, gpu_evidence_digest
from appliance.wire.merkle import MerkleTree
from appliance.wire.openai import Endpoint, parse_request, plan_choices
from appliance.wire.sse import DONE_EVENT, encode_event
from tests.bench.load import PATIENCE_S, Connection, chat_body
from tests.bench.processes import Gateway, NotMeasuredError
from tests.bench.results import Bound, Number, console, percentile
from tests.integration.appliance import MODEL, config_text

PER_MINUTE: Final = 10_000
STREAMS: Final = 48
TOKEN_S: Final = 0.02
TOKENS: Final = 64
"""Of an answer whose receipt is finished: about what a chat answer has."""

ROUNDS: Final = 4
VERIFIED_S: Final = 1.0
POLICY: Final = '[policy]\ntee_types = ["unsafe_simulated"]\ngpus = "unsafe_simulated"\n'

_TENANT: Final = Tenant(id="bench", name="bench")


# ------------------------------------------------------------------------------ finishing one


@dataclass(slots=True)
class _Desk:
    """Exchanges as the gateway records them, without a socket around them."""

    desk: ReceiptDesk
    epoch: Epoch
    body: JsonObject
    raw: bytes
    events: list[bytes]

    def exchange(self, number: int) -> ExchangeRecord:
        """One whose answer has gone out; what is left is its receipt."""
        record = self.desk.open(
            _TENANT, endpoint="/v1/chat/completions", raw=self.raw, client_nonce=None
        )
        request = parse_request(Endpoint.CHAT, self.body)
        chat_id = f"chatcmpl-{number:032x}"
        record.understood(request, chat_id)
        record.begin()
        record.admitted(self._attested())
        plans = plan_choices(request, response_id=chat_id, seed=1, cache_salt="s", max_choices=1)
        record.forwarded(prepare(request.body, plans).body_hash, plans)
        for event in self.events:
            record.write(event)
        return record

    def _attested(self) -> Attested:
        tree = self.epoch.tree
        return Attested(
            self.epoch,
            Inclusion("request", self.epoch.keyset_digest, tree.size, 0, tree.path(0), tree.root),
        )


@asynccontextmanager
async def _open_desk(folder: Path) -> AsyncIterator[_Desk]:
    """A desk whose store writes to disk."""
    folder.mkdir()
    log = configure_log(format="json", level="critical")
    keyset = hashlib.sha256(b"keyset").digest()
    identity = create_identity(
        parse_config(config_text(folder), folder=folder),
        settings={},
        gpus=[],
        image=ImageFacts(),
        spki_sha256=bytes(32),
        receipt_key=create_signing_key("receipt"),
        checkpoint_key=create_signing_key("checkpoint"),
        operator_input_digest=None,
    )
    store = ReceiptStore(folder / "receipts", now=time.time, log=log)
    numbers = count()
    desk = ReceiptDesk(
        identity,
        store,
        keyset_digest=lambda: keyset,
        max_bytes=64 << 20,
        random=lambda size: hashlib.shake_128(b"%d" % next(numbers)).digest(size),
        now=time.time,
    )
    gpus = await SimulatedGpus(count=1).collect(bytes(32))
    epoch = Epoch(
        keyset_digest=keyset,
        tree=MerkleTree.over([bytes([leaf]) * 32 for leaf in range(30)]),
        gpus=gpus,
        result=AttestationResult(Tier.WARNING, {}),
        evidence_digest=gpu_evidence_digest(gpus),
        collected_at=time.time(),
    )
    raw = chat_body(tokens=TOKENS)
    body = parse_json_object(raw, max_nesting=8)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        yield _Desk(desk, epoch, body, raw, _events())
        nursery.cancel_scope.cancel()


def _events() -> list[bytes]:
    """An answer as SGLang streams it."""

    def event(delta: JsonObject, reason: str | None) -> bytes:
        return encode_event(
            {
                "id": "x" * 41,
                "object": "chat.completion.chunk",
                "created": 1_790_000_000,
                "model": MODEL,
                "choices": [
                    {
                        "index": 0,
                        "delta": delta,
                        "logprobs": None,
                        "finish_reason": reason,
                        "matched_stop": None,
                    }
                ],
                "usage": None,
            }
        )

    words = [event({"content": f" word{number}"}, None) for number in range(TOKENS)]
    return [
        event({"role": "assistant", "content": ""}, None),
        *words,
        event({}, "stop"),
        DONE_EVENT,
    ]


async def finishing(folder: Path) -> list[Number]:
    """The processor time of ending an exchange: its output, its receipt, the signature."""
    console.print("receipts: finishing", style="dim")
    times = list[float]()
    async with _open_desk(folder) as desk:
        for number in range(500):
            record = desk.exchange(number)
            begun = time.thread_time()
            record.complete()
            times.append(1000 * (time.thread_time() - begun))
            await trio.lowlevel.checkpoint()
    return [
        Number(
            f"finishing a receipt after {TOKENS} tokens, processor time, median",
            statistics.median(times),
            "ms",
            Bound(1),
            digits=2,
        ),
        Number("the same, p99", percentile(times, 99), "ms", digits=2),
    ]


# ------------------------------------------------------------------------------ beside streams


async def storing(folder: Path, *, seconds: float) -> list[Number]:
    """What storing adds to streams in the same event loop, with everything else left away.

    A stream is a task that wants to go on every 20 ms; what it is late by is what its client would
    see between two events. Rounds with and without receipts take turns.
    """
    late: dict[bool, list[float]] = {False: [], True: []}
    added = list[float]()
    stored = 0
    async with _open_desk(folder) as desk:
        for number in range(ROUNDS):
            p99 = {}
            for writes in (False, True) if number % 2 else (True, False):
                what = f"{PER_MINUTE}/min beside" if writes else "none beside"
                console.print(
                    f"receipts: {what} {STREAMS} streams, {number + 1}/{ROUNDS}", style="dim"
                )
                values, written = await _round(desk, seconds, writes=writes, first=stored)
                stored += written
                late[writes] += values
                p99[writes] = percentile(values, 99)
            added.append(1000 * (p99[True] - p99[False]))
        with trio.fail_after(PATIENCE_S):
            await desk.desk.store.written()
    rate = 60 * stored / (ROUNDS * seconds)
    return [
        Number("receipts stored", rate, "/min", digits=0),
        Number(
            f"p99 between events that they add to {STREAMS} streams (median of {ROUNDS} rounds)",
            statistics.median(added),
            "ms",
            Bound(5),
            digits=2,
        ),
        Number("p99 lateness with them", 1000 * percentile(late[True], 99), "ms", digits=2),
        Number("p99 lateness without", 1000 * percentile(late[False], 99), "ms", digits=2),
    ]


async def _round(
    desk: _Desk, seconds: float, *, writes: bool, first: int
) -> tuple[list[float], int]:
    """How late each event was, seconds; and how many receipts were added."""
    late = list[float]()
    written = 0
    begun = trio.current_time()
    until = begun + seconds

    async def stream(offset: float) -> None:
        due = begun + offset
        while due < until:
            await trio.sleep_until(due)
            late.append(trio.current_time() - due)
            due += TOKEN_S

    async def write() -> None:
        nonlocal written
        while (due := begun + 60 * written / PER_MINUTE) < until:
            await trio.sleep_until(due)
            desk.exchange(first + written).complete()
            written += 1

    async with trio.open_nursery() as nursery:
        for number in range(STREAMS):
            nursery.start_soon(stream, TOKEN_S * number / STREAMS)
        if writes:
            nursery.start_soon(write)
    return late, written


async def beside_requests(gateway: Gateway, *, seconds: float) -> list[Number]:
    """The whole way: streams alone, then beside as many short requests as make 10 000 receipts a
    minute. What the requests themselves cost is in it."""
    alone, beside = list[float](), list[float]()
    answered = 0
    for number in range(2):
        console.print(f"receipts: over HTTP, {number + 1}/2", style="dim")
        values, _ = await _streams(gateway, seconds, requests=False)
        alone += values
        values, answers = await _streams(gateway, seconds, requests=True)
        beside += values
        answered += answers
    return [
        Number("over HTTP: short requests", 60 * answered / (2 * seconds), "/min", digits=0),
        Number("p99 between events of 16 streams, alone", 1000 * percentile(alone, 99), "ms"),
        Number("p99 between events beside them", 1000 * percentile(beside, 99), "ms"),
    ]


async def _streams(gateway: Gateway, seconds: float, *, requests: bool) -> tuple[list[float], int]:
    gaps = list[float]()
    answered = 0
    long = chat_body(tokens=round((seconds + 2) / TOKEN_S), ms_per_token=round(1000 * TOKEN_S))
    short = chat_body(tokens=1, stream=False)
    watching = False

    async def stream(line: Connection) -> None:
        last = trio.current_time()

        def arrived(_count: int) -> None:
            nonlocal last
            now = trio.current_time()
            if watching:
                gaps.append(now - last)
            last = now

        await line.ask(long, on_event=arrived)

    async def ask(line: Connection) -> None:
        nonlocal answered
        if (await line.ask(short)).status != 200:
            raise NotMeasuredError("expected an answer")
        answered += 1
        give.send_nowait(line)

    give, take = trio.open_memory_channel[Connection](64)
    async with AsyncExitStack() as stack:
        lines = [
            await stack.enter_async_context(Connection.open(gateway.target.address))
            for _ in range(16 + 64 * requests)
        ]
        with trio.fail_after(seconds + PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for line in lines[:16]:
                    nursery.start_soon(stream, line)
                for line in lines[16:]:
                    give.send_nowait(line)
                await trio.sleep(1)
                watching, begun = True, trio.current_time()
                for number in range(round(seconds * PER_MINUTE / 60) if requests else 0):
                    await trio.sleep_until(begun + 60 * number / PER_MINUTE)
                    nursery.start_soon(ask, await take.receive())
                await trio.sleep_until(begun + seconds)
                nursery.cancel_scope.cancel()
    return gaps, answered


# ---------------------------------------------------------------------------------- verifying


async def verifying(gateway: Gateway) -> list[Number]:
    """A bundle as `dcv chat --save` leaves it, verified offline as `dcv verify BUNDLE` does, but
    without the start of a process."""
    console.print("receipts: a bundle", style="dim")
    policy, saved = gateway.folder / "policy.toml", gateway.folder / "bundle.json"
    policy.write_text(POLICY)
    command = [sys.executable, "-m", "appliance", "chat", gateway.url, "Hello?"]
    command += ["--policy", str(policy), "--save", str(saved), "--with-content"]
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(
            command, check=False, stdout=subprocess.DEVNULL, capture_stderr=True
        )
    if not saved.exists():
        raise NotMeasuredError(f"no bundle: {done.stderr.decode()}")
    data, at = saved.read_bytes(), datetime.datetime.now(datetime.UTC)
    times = list[float]()
    until = time.perf_counter() + VERIFIED_S
    while time.perf_counter() < until or len(times) < 10:
        begun = time.perf_counter()
        # Everything anew each time: nothing is remembered from one bundle to the next.
        result = check(parse_bundle(data), load_rules(policy, None), at=at)
        times.append(1000 * (time.perf_counter() - begun))
        if result.verdict is not Tier.WARNING:
            raise NotMeasuredError(f"expected the bundle to hold, got {result.verdict}")
    return [
        Number(
            f"verifying a bundle of {len(data) >> 10} KiB, median",
            statistics.median(times),
            "ms",
            Bound(30),
        ),
        Number("the same, p95", percentile(times, 95), "ms"),
    ]

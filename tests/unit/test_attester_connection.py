"""The socket between gateway and collector: each side against the other, and against nonsense.

Sockets are real. Where a side is played by the test, it speaks the bytes of the protocol.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from appliance.attester.client import Attester, connect_attester
from appliance.attester.collect import MAX_WAITING, Collector
from appliance.attester.messages import API, MAX_FRAME_BYTES, Request
from appliance.attester.registry import open_collector
from appliance.attester.server import MAX_REQUESTS, serve_attester
from appliance.attester.simulated.provider import SimulatedCpu, SimulatedGpus
from appliance.config import Attestation
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    ConfigError,
    DeviceFault,
    EndorsementsUnavailable,
    Malformed,
    ProviderAbsent,
)
from appliance.wire.evidence import CpuEvidence

NONCE = bytes(range(32))
DATA = b"\x5a" * 32
PATIENCE_S = 10.0
"""Far more than any step takes; only a hang reaches it."""

SIMULATED = Attestation(cpu="simulated", gpu="simulated", gpu_count=2)


def faulty(fault: str) -> Attestation:
    return msgspec.structs.replace(SIMULATED, simulated_fault=fault)


def log() -> Any:
    return structlog.get_logger()


async def listen(path: Path) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen()
    return trio.SocketListener(sock)


class Server:
    """A collector on a socket in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = trio.Event()
        self.error: AttesterUnavailable | None = None

    async def run(
        self,
        collector: Callable[[Attestation | None], Collector],
        expected_uid: Callable[[], int] = os.getuid,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        listener = await listen(self.path)
        async with listener:
            task_status.started()
            try:
                await serve_attester(listener, collector, expected_uid=expected_uid, log=log())
            except AttesterUnavailable as error:
                self.error = error
        self.ended.set()

    async def wait(self) -> None:
        with trio.fail_after(PATIENCE_S):
            await self.ended.wait()


async def start_server(
    nursery: trio.Nursery,
    folder: Path,
    settings: Attestation = SIMULATED,
    *,
    expected_uid: Callable[[], int] = os.getuid,
) -> Server:
    server = Server(folder / "attester.sock")
    opened = partial(_open, settings)
    await nursery.start(server.run, opened, expected_uid)
    return server


def _open(settings: Attestation, _given: Attestation | None) -> Collector:
    return open_collector(settings)


async def start_client(
    nursery: trio.Nursery,
    path: Path,
    settings: Attestation = SIMULATED,
    lost: Callable[[AttesterUnavailable], None] = lambda error: None,
) -> Attester:
    async def stay(task_status: trio.TaskStatus[Attester]) -> None:
        started = False

        class Status:
            def started(self, value: Any = None) -> None:
                nonlocal started
                started = True
                task_status.started(value)

        try:
            await connect_attester(str(path), settings, lost=lost, task_status=Status())
        except AttesterUnavailable:
            if not started:
                raise

    attester: Attester = await nursery.start(stay)
    return attester


class Peer:
    """One side of the protocol, in bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, document: object) -> None:
        body = json.dumps(document).encode()
        await self.stream.send_all(len(body).to_bytes(4, "big") + body)

    async def ask(self, number: int, op: str, **arguments: object) -> Any:
        await self.send({"id": number, "op": op, **arguments})
        return await self.receive()

    async def receive(self) -> Any:
        """None when the other side closed."""
        with trio.fail_after(PATIENCE_S):
            while len(self.buffer) < 4 or len(self.buffer) < 4 + int.from_bytes(
                self.buffer[:4], "big"
            ):
                try:
                    data = await self.stream.receive_some()
                except trio.BrokenResourceError:
                    return None
                if not data:
                    return None
                self.buffer += data
        length = int.from_bytes(self.buffer[:4], "big")
        body, self.buffer = self.buffer[4 : 4 + length], self.buffer[4 + length :]
        return json.loads(body)


async def dial(path: Path, *, hello: bool = True) -> Peer:
    peer = Peer(await trio.open_unix_socket(str(path)))
    if hello:
        assert "result" in await peer.ask(0, "hello", settings=None)
    return peer


# ------------------------------------------------------------------------------------ both sides


async def test_evidence_travels_whole(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await start_server(nursery, tmp_path)
    attester = await start_client(nursery, server.path)
    gpus = await attester.gpu_evidence(NONCE)
    assert [len(one.report) for one in gpus] == [4129, 4129]
    assert {one.report[4:36] for one in gpus} == {NONCE}
    assert all(len(one.rims) == 2 for one in gpus)
    quote = await attester.cpu_evidence(DATA)
    assert quote.parts["report"][0x50:0x90] == DATA.ljust(64, b"\0")
    assert set(quote.endorsements) == {"vek", "authorities"}
    inventory = await attester.inventory()
    assert [gpu.index for gpu in inventory.gpus] == [0, 1]
    assert not inventory.ready
    await attester.set_gpus_ready(True)
    assert (await attester.inventory()).ready


@pytest.mark.parametrize(
    ("fault", "error", "ask"),
    [
        ("gpu_absent", ProviderAbsent, lambda one: one.inventory()),
        ("gpu_absent", ProviderAbsent, lambda one: one.gpu_evidence(NONCE)),
        ("gpu_absent", ProviderAbsent, lambda one: one.set_gpus_ready(True)),
        ("gpu_error", DeviceFault, lambda one: one.gpu_evidence(NONCE)),
        ("cpu_absent", ProviderAbsent, lambda one: one.cpu_evidence(DATA)),
        ("cpu_error", DeviceFault, lambda one: one.cpu_evidence(DATA)),
    ],
)
async def test_a_providers_error_arrives_as_itself_and_ends_nothing(
    nursery: trio.Nursery,
    tmp_path: Path,
    fault: str,
    error: type[ApplianceError],
    ask: Callable[[Attester], Awaitable[object]],
) -> None:
    server = await start_server(nursery, tmp_path, faulty(fault))
    attester = await start_client(nursery, server.path)
    for _ in range(2):
        with pytest.raises(error, match="simulated: "):
            await ask(attester)
    assert not server.ended.is_set()


async def test_a_gpu_that_vanishes_is_a_fault_and_not_a_shorter_answer(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path, faulty("gpu_vanishes"))
    attester = await start_client(nursery, server.path)
    assert len(await attester.gpu_evidence(NONCE)) == 2
    with pytest.raises(DeviceFault, match="expected evidence of 2 GPUs, got 1"):
        await attester.gpu_evidence(NONCE)


async def test_without_gpus_there_is_cpu_evidence_only(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    settings = Attestation(cpu="simulated", gpu="unsafe_none")
    server = await start_server(nursery, tmp_path, settings)
    attester = await start_client(nursery, server.path, settings)
    await attester.cpu_evidence(DATA)
    with pytest.raises(ProviderAbsent, match="unsafe_none"):
        await attester.inventory()


async def test_a_call_that_is_given_up_costs_nothing_but_itself(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    slow = msgspec.structs.replace(SIMULATED, simulated_latency_s=0.2)
    server = await start_server(nursery, tmp_path, slow)
    attester = await start_client(nursery, server.path, slow)
    with trio.move_on_after(0.05) as deadline:
        await attester.gpu_evidence(bytes(32))
    assert deadline.cancelled_caught
    # The late answer to the first question comes first, and is not taken for this one's.
    (one, _two) = await attester.gpu_evidence(NONCE)
    assert one.report[4:36] == NONCE


async def test_a_hanging_gpu_keeps_nobody_from_cpu_evidence(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path, faulty("gpu_hang"))
    attester = await start_client(nursery, server.path)
    async with trio.open_nursery() as hanging:
        hanging.start_soon(attester.gpu_evidence, NONCE)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(PATIENCE_S):
            await attester.cpu_evidence(DATA)
        hanging.cancel_scope.cancel()


async def test_a_line_behind_a_hanging_gpu_ends(nursery: trio.Nursery, tmp_path: Path) -> None:
    """Every question that a deadline gave up still waits in the collector."""
    server = await start_server(nursery, tmp_path, faulty("gpu_hang"))
    attester = await start_client(nursery, server.path)
    for _ in range(1 + MAX_WAITING):
        with trio.move_on_after(0.02) as deadline:
            await attester.gpu_evidence(NONCE)
        assert deadline.cancelled_caught
    with trio.fail_after(PATIENCE_S), pytest.raises(DeviceFault, match="still busy with 5"):
        await attester.gpu_evidence(NONCE)


async def test_many_callers_get_their_own_answers(nursery: trio.Nursery, tmp_path: Path) -> None:
    server = await start_server(nursery, tmp_path)
    attester = await start_client(nursery, server.path)

    async def check(number: int) -> None:
        nonce = bytes([number]) * 32
        (one, two) = await attester.gpu_evidence(nonce)
        assert one.report[4:36] == two.report[4:36] == nonce
        quote = await attester.cpu_evidence(nonce)
        assert quote.parts["report"][0x50:0x70] == nonce

    async with trio.open_nursery() as callers:
        for number in range(20):
            callers.start_soon(check, number)


# ------------------------------------------------------------------------ the collector's side


async def test_a_second_connection_is_refused_and_the_first_goes_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path)
    attester = await start_client(nursery, server.path)
    with capture_logs() as lines:
        second = await dial(server.path, hello=False)
        assert await second.receive() is None
    assert [(one["event"], one["reason"]) for one in lines] == [
        ("connection_refused", "the gateway is connected")
    ]
    assert lines[0]["uid"] == os.getuid()
    await second.stream.aclose()
    await attester.inventory()


async def test_another_user_is_refused_and_the_collector_goes_on_waiting(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    expected = [os.getuid() + 1]
    server = await start_server(nursery, tmp_path, expected_uid=lambda: expected[0])
    with capture_logs() as lines:
        stranger = await dial(server.path, hello=False)
        assert await stranger.receive() is None
    assert lines[0]["reason"] == "not the gateway's user"
    await stranger.stream.aclose()
    expected[0] = os.getuid()
    await start_client(nursery, server.path)


async def test_a_user_that_does_not_exist_yet_lets_nobody_in(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    def unknown() -> int:
        raise KeyError("dcv")

    server = await start_server(nursery, tmp_path, expected_uid=unknown)
    with capture_logs() as lines:
        stranger = await dial(server.path, hello=False)
        assert await stranger.receive() is None
    assert lines[0]["reason"] == "KeyError"
    await stranger.stream.aclose()
    assert not server.ended.is_set()


async def test_the_collector_ends_with_its_connection_whatever_hangs(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path, faulty("gpu_hang"))
    peer = await dial(server.path)
    await peer.send({"id": 1, "op": "gpu_evidence", "nonce": NONCE.hex()})
    await peer.stream.aclose()
    await server.wait()
    assert server.error is None


@pytest.mark.parametrize("cut", [1, 3, 4, 10])
async def test_a_question_that_is_cut_ends_the_collector(
    nursery: trio.Nursery, tmp_path: Path, cut: int
) -> None:
    server = await start_server(nursery, tmp_path)
    peer = await dial(server.path)
    await peer.stream.send_all((b"\0\0\0\x20" + b"{" * 32)[:cut])
    await peer.stream.aclose()
    await server.wait()
    assert server.error is not None
    assert "does not speak this protocol" in server.error.message


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), id="too long"),
        pytest.param(bytes(4), id="empty"),
        pytest.param(frame(b"\xff\xfe"), id="not UTF-8"),
        pytest.param(frame(b"[]"), id="no object"),
        pytest.param(frame(b'{"id":1,"id":1,"op":"inventory"}'), id="a key twice"),
        pytest.param(frame(b"[" * 1000), id="deep"),
        pytest.param(frame(b'{"op":"inventory"}'), id="no id"),
        pytest.param(frame(b'{"id":true,"op":"inventory"}'), id="id of another type"),
        pytest.param(frame(b'{"id":1}'), id="no op"),
        pytest.param(frame(b'{"id":1,"op":"reboot"}'), id="unknown op"),
        pytest.param(frame(b'{"id":1,"op":"hello","settings":null}'), id="hello again"),
        pytest.param(frame(b'{"id":1,"op":"inventory","x":1}'), id="more arguments"),
        pytest.param(frame(b'{"id":1,"op":"gpu_evidence","nonce":"00"}'), id="short nonce"),
        pytest.param(
            frame(b'{"id":1,"op":"gpu_evidence","nonce":"' + b"AA" * 32 + b'"}'), id="uppercase"
        ),
        pytest.param(
            frame(b'{"id":1,"op":"cpu_evidence","report_data":"' + b"00" * 65 + b'"}'),
            id="long report data",
        ),
        pytest.param(frame(b'{"id":1,"op":"cpu_evidence","report_data":7}'), id="no hex"),
        pytest.param(frame(b'{"id":1,"op":"set_gpus_ready","ready":1}'), id="no boolean"),
    ],
)
async def test_nonsense_ends_the_collector(
    nursery: trio.Nursery, tmp_path: Path, data: bytes
) -> None:
    server = await start_server(nursery, tmp_path)
    peer = await dial(server.path)
    await peer.stream.send_all(data)
    assert await peer.receive() is None
    await server.wait()
    assert server.error is not None
    await peer.stream.aclose()


async def test_a_question_before_hello_ends_the_collector(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path)
    peer = await dial(server.path, hello=False)
    await peer.send({"id": 0, "op": "inventory"})
    assert await peer.receive() is None
    await server.wait()
    assert server.error is not None
    assert "hello" in server.error.message
    await peer.stream.aclose()


async def test_a_gateway_that_never_reads_is_not_read_for_ever(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path)
    peer = await dial(server.path)
    blocked = False
    for number in range(1, 20_000):
        with trio.move_on_after(0.5) as deadline:
            await peer.send({"id": number, "op": "gpu_evidence", "nonce": NONCE.hex()})
        if blocked := deadline.cancelled_caught:
            break
    assert blocked
    assert number > MAX_REQUESTS
    await peer.stream.aclose()
    await server.wait()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
async def test_a_provider_that_is_not_installed_is_unknown(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a production image, which has no file or folder named `simulated`."""
    for module in ("appliance.attester.simulated", "appliance.attester.simulated.provider"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    settings = (
        Attestation(cpu="simulated", gpu="unsafe_none")
        if name == "cpu"
        else Attestation(cpu="sev_snp", gpu="simulated")
    )
    with pytest.raises(ConfigError, match="unknown provider `simulated`"):
        open_collector(settings)


async def test_a_provider_of_another_count_than_configured_is_absent() -> None:
    collector = Collector(SimulatedCpu(), SimulatedGpus(count=1), gpu_count=2)
    with pytest.raises(ProviderAbsent, match="expected 2 GPUs, found 1"):
        await collector.inventory()


async def test_the_collector_itself_hands_out_no_shorter_answer() -> None:
    collector = open_collector(faulty("gpu_vanishes"))
    assert len(await collector.gpu_evidence(NONCE)) == 2
    with pytest.raises(DeviceFault, match="expected evidence of 2 GPUs, got 1"):
        await collector.gpu_evidence(NONCE)


async def test_what_a_device_says_in_no_known_form_is_its_fault() -> None:
    class Odd(SimulatedCpu):
        async def collect(self, report_data: bytes) -> CpuEvidence:
            raise Malformed("expected its end, 3 bytes are left")

    collector = Collector(Odd(), None, gpu_count=1)
    with pytest.raises(DeviceFault, match="CPU evidence: expected its end"):
        await collector.cpu_evidence(DATA)


# ------------------------------------------------------------------------------ the gateway's side


class Impostor:
    """A collector played by the test: answers the hello, then does as it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hello: object = {"api": API, "cpu": "simulated", "gpu": "simulated", "gpu_count": 2}

    async def run(
        self,
        behave: Callable[[Peer], Awaitable[None]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with await listen(self.path) as listener:
            task_status.started()
            peer = Peer(await listener.accept())
            async with peer.stream:
                first = await peer.receive()
                assert first == {"id": 0, "op": "hello", "settings": None}
                await peer.send({"id": 0, "result": self.hello})
                await behave(peer)


async def impostor(
    nursery: trio.Nursery, folder: Path, behave: Callable[[Peer], Awaitable[None]]
) -> Path:
    path = folder / "impostor.sock"
    await nursery.start(Impostor(path).run, behave)
    return path


async def answer_with(answer: Callable[[dict[str, Any]], object], peer: Peer) -> None:
    while (asked := await peer.receive()) is not None:
        await peer.send(answer(asked))


GPU = {
    "scheme": "simulated",
    "report_b64": "AA==",
    "cert_chain_b64": "AA==",
    "rims_b64": [],
    "ocsp_b64": [],
}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda one: {"id": one["id"]}, id="neither result nor error"),
        pytest.param(lambda one: {"id": one["id"] + 1, "result": []}, id="to nothing asked"),
        pytest.param(lambda one: {"id": 0, "result": []}, id="to the hello"),
        pytest.param(lambda one: {"id": "1", "result": []}, id="id of another type"),
        pytest.param(lambda one: {"id": one["id"], "result": 1, "error": 2}, id="both"),
        pytest.param(lambda one: {"id": one["id"], "error": "boom"}, id="error of another form"),
        pytest.param(lambda one: {"id": one["id"], "result": GPU}, id="no list"),
        pytest.param(lambda one: {"id": one["id"], "result": [GPU] * 17}, id="too many"),
        pytest.param(
            lambda one: {"id": one["id"], "result": [{**GPU, "report_b64": "A"}] * 2}, id="base64"
        ),
        pytest.param(
            lambda one: {"id": one["id"], "result": [{**GPU, "scheme": "nvidia_gpu"}] * 2},
            id="another scheme than announced",
        ),
        pytest.param(lambda one: {"id": one["id"], "result": [{**GPU, "x": ""}] * 2}, id="a key"),
    ],
)
async def test_nonsense_from_the_collector_ends_the_connection_for_everybody(
    nursery: trio.Nursery, tmp_path: Path, answer: Callable[[dict[str, Any]], object]
) -> None:
    lost: list[AttesterUnavailable] = []
    path = await impostor(nursery, tmp_path, partial(answer_with, answer))
    attester = await start_client(nursery, path, lost=lost.append)
    for _ in range(2):
        with trio.fail_after(PATIENCE_S), pytest.raises(AttesterUnavailable):
            await attester.gpu_evidence(NONCE)
    await trio.testing.wait_all_tasks_blocked()
    assert len(lost) == 1


async def test_fewer_gpus_than_announced_are_a_fault(nursery: trio.Nursery, tmp_path: Path) -> None:
    behave = partial(answer_with, lambda one: {"id": one["id"], "result": [GPU]})
    attester = await start_client(nursery, await impostor(nursery, tmp_path, behave))
    with pytest.raises(DeviceFault, match="expected evidence of 2 GPUs, got 1"):
        await attester.gpu_evidence(NONCE)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("provider_absent", ProviderAbsent),
        ("device_fault", DeviceFault),
        ("attester_unavailable", AttesterUnavailable),
        ("endorsements_unavailable", EndorsementsUnavailable),
        ("config_error", ConfigError),
        ("contraindicated", AttesterUnavailable),
        ("internal_error", AttesterUnavailable),
    ],
)
async def test_an_error_comes_back_as_the_leaf_of_its_code(
    nursery: trio.Nursery, tmp_path: Path, code: str, error: type[ApplianceError]
) -> None:
    behave = partial(
        answer_with,
        lambda one: {"id": one["id"], "error": {"code": code, "message": "m" * 5000}},
    )
    attester = await start_client(nursery, await impostor(nursery, tmp_path, behave))
    with pytest.raises(ApplianceError) as caught:
        await attester.gpu_evidence(NONCE)
    assert type(caught.value) is error
    assert len(caught.value.message) == 1000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\0\0\0\x10{",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\0\0\0\x02{]",
        os.urandom(64) or b"",
    ],
    ids=["nothing", "half a length", "half a body", "too long", "no JSON", "garbage"],
)
async def test_a_collector_that_breaks_off_is_unavailable_to_those_who_wait(
    nursery: trio.Nursery, tmp_path: Path, data: bytes
) -> None:
    async def behave(peer: Peer) -> None:
        for _ in range(2):
            await peer.receive()
        await peer.stream.send_all(data)

    lost: list[AttesterUnavailable] = []
    attester = await start_client(
        nursery, await impostor(nursery, tmp_path, behave), lost=lost.append
    )
    waiting: list[AttesterUnavailable] = []

    async def wait(ask: Awaitable[object]) -> None:
        with trio.fail_after(PATIENCE_S), pytest.raises(AttesterUnavailable) as caught:
            await ask
        waiting.append(caught.value)

    async with trio.open_nursery() as callers:
        callers.start_soon(wait, attester.gpu_evidence(NONCE))
        callers.start_soon(wait, attester.cpu_evidence(DATA))
    assert len({id(one) for one in waiting}) == 2
    with pytest.raises(AttesterUnavailable):
        await attester.set_gpus_ready(False)
    await trio.testing.wait_all_tasks_blocked()
    assert len(lost) == 1


async def test_a_question_cut_by_a_deadline_ends_the_connection(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """The collector would take the next question for the rest of this one."""

    async def behave(_peer: Peer) -> None:
        await trio.sleep_forever()

    lost: list[AttesterUnavailable] = []
    path = await impostor(nursery, tmp_path, behave)
    attester = await start_client(nursery, path, lost=lost.append)
    # Fill the socket's buffers, so that a question can be sent in part only.
    stream = attester._frames._stream
    assert isinstance(stream, trio.SocketStream)
    stuffing = Request(1, "gpu_evidence", {"nonce": "00" * 1_000_000}).to_json()
    with trio.move_on_after(0.1) as deadline:
        await attester._frames.send(stuffing)
    assert deadline.cancelled_caught
    with trio.move_on_after(0.1) as deadline:
        await attester.cpu_evidence(DATA)
    assert deadline.cancelled_caught
    with pytest.raises(AttesterUnavailable, match="given up while it was sent"):
        await attester.cpu_evidence(DATA)
    await trio.testing.wait_all_tasks_blocked()
    assert len(lost) == 1


async def test_a_caller_without_time_left_sends_nothing_and_harms_nobody(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    server = await start_server(nursery, tmp_path)
    attester = await start_client(nursery, server.path)
    with trio.move_on_after(0) as deadline:
        await attester.gpu_evidence(NONCE)
    assert deadline.cancelled_caught
    assert len(await attester.gpu_evidence(NONCE)) == 2


async def test_an_answer_that_comes_twice_is_nonsense(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    async def behave(peer: Peer) -> None:
        asked = await peer.receive()
        for _ in range(2):
            await peer.send({"id": asked["id"], "result": [GPU, GPU]})
        assert await peer.receive() is None

    lost: list[AttesterUnavailable] = []
    path = await impostor(nursery, tmp_path, behave)
    attester = await start_client(nursery, path, lost=lost.append)
    await attester.gpu_evidence(NONCE)
    with trio.fail_after(PATIENCE_S):
        while not lost:
            await trio.sleep(0.005)
    assert "nothing that was asked" in lost[0].message


@pytest.mark.parametrize(
    "hello",
    [
        {"api": "dcv-attester/2", "cpu": "simulated", "gpu": "simulated", "gpu_count": 2},
        {"api": API, "cpu": "sev_snp", "gpu": "simulated", "gpu_count": 2},
        {"api": API, "cpu": "simulated", "gpu": "nvidia_gpu", "gpu_count": 2},
        {"api": API, "cpu": "simulated", "gpu": None, "gpu_count": 0},
        {"api": API, "cpu": "simulated", "gpu": "simulated", "gpu_count": 1},
        {"api": API, "cpu": "simulated"},
        "hello",
    ],
)
async def test_a_collector_that_is_set_up_otherwise_is_not_used(
    nursery: trio.Nursery, tmp_path: Path, hello: object
) -> None:
    async def behave(peer: Peer) -> None:
        assert await peer.receive() is None

    other = Impostor(tmp_path / "impostor.sock")
    other.hello = hello
    await nursery.start(other.run, behave)
    with trio.fail_after(PATIENCE_S), pytest.raises(AttesterUnavailable):
        await start_client(nursery, other.path)


async def test_nobody_at_the_socket_is_unavailable(nursery: trio.Nursery, tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="attester_socket: No such file"):
        await start_client(nursery, tmp_path / "nobody.sock")

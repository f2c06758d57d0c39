"""However an exchange ends there is a receipt that says so, and a relying party can verify it: asked
for afterwards, of another start of the service on the same state, and held to what was sent and what
came by the relying party's own code, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from appliance.errors import VerificationIncomplete
from appliance.rats.exchange import Exchange
from appliance.verifier.answers import Answered, exchange_of, report_of
from appliance.verifier.bundle import Bundle
from appliance.verifier.fetching import fetch_sync
from appliance.verifier.session import anybody_sync
from tests.integration.appliance import MODEL, QUESTION
from tests.integration.test_attestation import POLICY
from tests.integration.test_life import (
    CHAT,
    DCV,
    processes,
    serve,
    slow_chat,
    wait_for,
    write,
)
from tests.processes import children_of, command_line

__all__ = ["processes"]  # a fixture

Processes = list[subprocess.Popen[bytes]]
PATIENCE_S = 60.0
STATES = {"open": "NULL", "finished": "NOT NULL"}


@dataclass
class Service:
    """`dcv serve`, a process.

    Attributes:
        folder: of its state, and its log.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    url: str

    @classmethod
    def start(cls, folder: Path, started: Processes) -> Service:
        process = serve(folder, started)
        urls = wait_for("serving", folder, deadline_s=PATIENCE_S)["urls"]
        assert isinstance(urls, list)
        return cls(process, folder, urls[0])

    def client(self) -> httpx2.Client:
        trust = ssl.create_default_context(cafile=self.folder / "tls.pem")
        return httpx2.Client(base_url=self.url, verify=trust, timeout=PATIENCE_S)

    def kill_engine(self) -> None:
        pid = wait_for("engine_ready", self.folder)["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)

    def kill_attester(self) -> None:
        children = children_of(self.process.pid)
        [pid] = [one for one in children if "appliance.attester.main" in command_line(one)]
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.process.terminate()

    def on_disk(self, *ids: str, state: str) -> None:
        """Wait until that state of these exchanges would survive a SIGKILL."""
        [path] = self.folder.rglob("receipts.sqlite3")
        query = f"SELECT receipt_id FROM receipt WHERE body IS {STATES[state]}"
        until = time.monotonic() + PATIENCE_S
        while True:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                found = {row[0] for row in database.execute(query)}
            if found >= set(ids):
                return
            assert time.monotonic() < until, (state, ids)
            time.sleep(0.02)


def told(folder: Path, exchange: Exchange, service: Service) -> dict[str, Any]:
    """What `dcv verify` says, offline, of a bundle with this exchange in it."""
    with anybody_sync(service.url) as client:
        report = fetch_sync(client, report_of(exchange.receipt.keyset_digest))
    served_at = exchange.receipt.served_at
    bundle = Bundle(service.url, served_at, None, None, report, exchange)
    (folder / "bundle.json").write_bytes(bundle.to_bytes())
    (folder / "policy.toml").write_text(POLICY)
    command: list[str | Path] = [*DCV, "verify", folder / "bundle.json", "--json"]
    command += ["--policy", folder / "policy.toml"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    outcome: dict[str, Any] = json.loads(done.stdout)
    # Simulated hardware is never more than a warning.
    assert (outcome["verdict"], done.returncode) == ("warning", 3), outcome
    return outcome


def fetched(service: Service, receipt_id: str, request: bytes, content: bytes) -> Exchange:
    """The receipt and what it cites, as a relying party asks for it."""
    with anybody_sync(service.url) as client:
        return fetch_sync(client, exchange_of(Answered(receipt_id, None, content), request))


def reservations(outcome: dict[str, Any]) -> set[str]:
    """About the exchange; about the simulated hardware there are more."""
    return {one["check"] for one in outcome["findings"] if one["check"].startswith("receipt.")}


@pytest.mark.parametrize(
    ("act", "outcome", "codes"),
    [
        # The stream breaks off a moment before or after the engine's exit is noticed.
        (Service.kill_engine, "engine_failed", {"engine_died", "engine_failed"}),
        (Service.kill_attester, "withdrawn", {"attester_unavailable"}),
        (Service.stop, "drained", {"not_serving"}),
    ],
    ids=["engine killed", "attester killed", "SIGTERM"],
)
def test_a_stream_that_is_broken_off_has_a_receipt_that_says_by_whom(
    tmp_path: Path,
    processes: Processes,
    act: Callable[[Service], None],
    outcome: str,
    codes: set[str],
) -> None:
    write(tmp_path, limits={"drain_s": 0.2})
    service = Service.start(tmp_path, processes)
    request, content = slow_chat(), b""
    with service.client() as client, client.stream("POST", CHAT, content=request) as response:
        receipt_id = response.headers["x-receipt-id"]
        with pytest.raises(httpx2.RemoteProtocolError):
            for part in response.iter_raw():
                if not content:
                    act(service)
                content += part
    assert b"[DONE]" not in content
    service.process.wait(PATIENCE_S)
    again = Service.start(tmp_path, processes)
    exchange = fetched(again, receipt_id, request, content)
    verdict = told(tmp_path, exchange, again)
    claims = verdict["claims"]["submods"]["receipt"]
    assert (claims["outcome"], claims["bytes"]) == (outcome, len(content))
    assert claims["code"] in codes
    assert reservations(verdict) == {"receipt.outcome"}
    assert "output_digest" not in claims


def test_a_stream_that_the_drain_waited_for_is_complete(
    tmp_path: Path,
    processes: Processes,
) -> None:
    write(tmp_path, limits={"drain_s": 30.0})
    service = Service.start(tmp_path, processes)
    request, content = slow_chat(tokens=20), b""
    with service.client() as client, client.stream("POST", CHAT, content=request) as response:
        for part in response.iter_raw():
            if not content:
                service.stop()
            content += part
    assert service.process.wait(PATIENCE_S) == 0
    again = Service.start(tmp_path, processes)
    exchange = fetched(again, response.headers["x-receipt-id"], request, content)
    verdict = told(tmp_path, exchange, again)
    assert verdict["claims"]["submods"]["receipt"]["outcome"] == "complete"
    assert reservations(verdict) == set()


CLIENT = """
import ssl, sys, httpx2
url, certificate, path = sys.argv[1:]
trust = ssl.create_default_context(cafile=certificate)
with httpx2.Client(base_url=url, verify=trust, timeout=60) as client:
    with client.stream("POST", path, content=sys.stdin.buffer.read()) as response:
        parts = response.iter_raw()
        next(parts)
        print(response.headers["x-receipt-id"], flush=True)
        for _ in parts:
            pass
"""


def test_a_client_that_is_killed_leaves_a_receipt_that_says_so(
    tmp_path: Path,
    processes: Processes,
) -> None:
    write(tmp_path)
    service, request = Service.start(tmp_path, processes), slow_chat()
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, service.url, tmp_path / "tls.pem", CHAT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(request)
        client.stdin.close()
        receipt_id = client.stdout.readline().decode().strip()
        client.kill()
    # What the dead one had read of it nobody knows.
    before = replace(fetched(service, receipt_id, request, b""), response=None)
    service.stop()
    assert service.process.wait(PATIENCE_S) == 0
    again = Service.start(tmp_path, processes)
    exchange = replace(fetched(again, receipt_id, request, b""), response=None)
    assert exchange == before
    verdict = told(tmp_path, exchange, again)
    claims = verdict["claims"]["submods"]["receipt"]
    assert (claims["outcome"], claims["code"]) == ("client_disconnected", None)
    assert claims["bytes"] > 0
    assert reservations(verdict) == {"receipt.outcome", "receipt.response"}


def test_a_killed_service_keeps_what_was_finished_and_says_that_the_open_are_lost(
    tmp_path: Path,
    processes: Processes,
) -> None:
    write(tmp_path)
    service = Service.start(tmp_path, processes)
    finished: dict[str, tuple[bytes, bytes]] = {}
    lost: list[str] = []
    with service.client() as client:
        for more in ({}, {"stream": True, "tee": True}):
            request = json.dumps({"model": MODEL, "messages": QUESTION, **more}).encode()
            answer = client.post(CHAT, content=request)
            finished[answer.headers["x-receipt-id"]] = (request, answer.content)
        service.on_disk(*finished, state="finished")
        with (
            suppress(httpx2.RemoteProtocolError, httpx2.ReadError),
            client.stream("POST", CHAT, content=slow_chat()) as one,
            client.stream("POST", CHAT, content=slow_chat()) as two,
        ):
            lost += [open_one.headers["x-receipt-id"] for open_one in (one, two)]
            service.on_disk(*lost, state="open")
            for number, _ in enumerate(one.iter_raw()):
                if number == 0:
                    service.process.kill()
    assert service.process.wait(PATIENCE_S) == -signal.SIGKILL
    again = Service.start(tmp_path, processes)
    for receipt_id, (request, content) in finished.items():
        verdict = told(tmp_path, fetched(again, receipt_id, request, content), again)
        assert verdict["claims"]["submods"]["receipt"]["outcome"] == "complete"
        assert reservations(verdict) == set()
    with again.client() as client:
        for receipt_id in lost:
            answer = client.get(f"/v1/aci/receipts/{receipt_id}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "receipt_lost")
            with pytest.raises(VerificationIncomplete, match="the receipt is lost"):
                fetched(again, receipt_id, b"", b"")
        nobodys = client.get(f"/v1/aci/receipts/{'0' * 32}")
        assert (nobodys.status_code, nobodys.json()["error"]["code"]) == (404, "not_found")


def test_where_the_receipt_is_lost_a_checkpoint_proves_what_came_before_it(
    tmp_path: Path,
    processes: Processes,
) -> None:
    write(tmp_path, limits={"checkpoint_s": 0.1})
    service, content = Service.start(tmp_path, processes), b""
    report, came, sent = (tmp_path / name for name in ("report.json", "came", "sent"))
    (tmp_path / "policy.toml").write_text(POLICY)
    rules: list[str | Path] = ["--policy", tmp_path / "policy.toml", "--json"]
    kept = [*DCV, "verify", service.url, "--save", report, *rules]
    assert subprocess.run(kept, capture_output=True, timeout=PATIENCE_S).returncode == 3
    sent.write_bytes(
        json.dumps(
            json.loads(slow_chat()) | {"stream_options": {"include_checkpoints": True}}
        ).encode()
    )
    with (
        suppress(httpx2.RemoteProtocolError, httpx2.ReadError),
        service.client() as client,
        client.stream("POST", CHAT, content=sent.read_bytes()) as response,
    ):
        for part in response.iter_raw():
            content += part
            if content.count(b"\n: dcv-checkpoint ") >= 3 and content.endswith(b"}\n\n"):
                service.process.kill()
    assert service.process.wait(PATIENCE_S) == -signal.SIGKILL

    def verify(content: bytes, *more: str | Path) -> tuple[int, dict[str, Any]]:
        came.write_bytes(content)
        command: list[str | Path] = [*DCV, "receipt", "verify", came, *more, *rules]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
        return done.returncode, json.loads(done.stdout)

    beside = ("--cut", "--report", report, "--request", sent)
    # 1. Up to its last checkpoint; what came behind it is said not to be proven.
    status, told = verify(content, *beside)
    assert (status, told["verdict"]) == (3, "warning"), told
    claims = told["claims"]["submods"]["checkpoint"]
    assert claims["receipt_id"] == response.headers["x-receipt-id"]
    assert claims["received_bytes"] == len(content)
    proven = claims["proven_bytes"]
    assert content[proven:].startswith(b": dcv-checkpoint ")
    checks = {one["check"] for one in told["findings"] if one["check"].startswith("checkpoint.")}
    assert checks == {"checkpoint.stream", "checkpoint.admission_evidence"}
    assert told["claims"]["at"]["word_of"] == "the appliance"
    # 2. Without the request, that is said.
    status, told = verify(content, *beside[:3])
    assert status == 3
    assert "checkpoint.request" in {one["check"] for one in told["findings"]}
    # 3. Not one byte before the checkpoint can differ, nor the request.
    place = content.index(b'"content"')
    for wrong in (
        verify(content[:place] + b" " + content[place:], *beside),
        verify(content, *beside[:3], "--request", report),
        verify(content.replace(b"dcv-checkpoint", b"dcv-no-checkpoint"), *beside),
    ):
        assert (wrong[0], wrong[1]["error"]["code"]) == (1, "unbound")
    # 4. What cannot be checked so is said to be.
    for arguments in (("--cut",), (*beside, "--response", came)):
        status, told = verify(content, *arguments)
        assert (status, told["verdict"]) == (2, None)
    assert verify(content, "--cut", "--report", came)[0] == 1  # no report at all

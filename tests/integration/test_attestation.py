"""The appliance proves itself, or does not serve: simulated hardware, real formats, real sockets."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
import trustme

from appliance.attester.simulated.faults import MEANING
from appliance.config import parse_config
from appliance.errors import (
    EX_CONFIG,
    EX_NOPERM,
    EX_UNAVAILABLE,
    AttesterUnavailable,
    BootError,
    DeviceFault,
    EvidenceError,
)
from appliance.log import configure_log
from appliance.notify import Notifier
from appliance.run import run
from appliance.serving.reports import MAX_WAITING_REPORTS
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import digest_of
from appliance.wire.report import parse_report
from tests.integration.appliance import (
    RawConnection,
    RunningAppliance,
    Sections,
    config_text,
    start_appliance,
)
from tests.integration.test_life import slow_chat
from tests.integration.wire import Wire
from tests.processes import collectors

NONCE = "ab" * 32
POLICY = '[policy]\ntee_types = ["unsafe_simulated"]\ngpus = "unsafe_simulated"\n'

BOOT_REFUSALS = [
    # fault, stage, exit status, what the message says
    ("gpu_absent", 3, EX_CONFIG, "GPU"),
    ("gpu_cc_off", 3, EX_NOPERM, "cc_feature 0"),
    ("gpu_dev_tools", 3, EX_NOPERM, "dev_tools_mode 1"),
    ("gpu_hang", 4, EX_UNAVAILABLE, "GPU evidence within 1 s"),
    ("gpu_crash", 4, EX_UNAVAILABLE, "collector"),
    ("gpu_error", 4, EX_UNAVAILABLE, ""),
    ("gpu_error_once", 4, EX_UNAVAILABLE, ""),
    ("gpu_garbage", 4, EX_NOPERM, "parses"),
    ("gpu_short_report", 4, EX_NOPERM, "parses"),
    ("gpu_wrong_nonce", 4, EX_NOPERM, "nonce"),
    ("gpu_bad_signature", 4, EX_NOPERM, "signature"),
    ("gpu_measurement_mismatch", 4, EX_NOPERM, "measurement"),
    ("gpu_expired_chain", 4, EX_NOPERM, "valid from"),
    ("gpu_vanishes", 9, EX_UNAVAILABLE, ""),
    ("cpu_absent", 3, EX_CONFIG, ""),
    ("cpu_hang", 3, EX_UNAVAILABLE, "in time"),
    ("cpu_error", 3, EX_UNAVAILABLE, ""),
    ("cpu_wrong_report_data", 9, EX_NOPERM, "report_data"),
    ("cpu_bad_signature", 9, EX_NOPERM, "signature"),
    ("cpu_debug", 9, EX_NOPERM, "debug"),
]


def test_every_fault_of_the_simulated_hardware_is_tried_at_boot() -> None:
    assert {fault for fault, *_ in BOOT_REFUSALS} == {str(one) for one in MEANING} - {"none"}


def faulty(fault: str, **more: object) -> Sections:
    return {"attestation": {"simulated_fault": fault, "collect_s": 1.0, **more}}


@pytest.mark.parametrize(
    ("fault", "stage", "exit_status", "says"), BOOT_REFUSALS, ids=[one[0] for one in BOOT_REFUSALS]
)
async def test_a_fault_stops_the_boot_at_its_stage_and_the_port_never_opens(
    tmp_path: Path, fault: str, stage: int, exit_status: int, says: str
) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sections = {**faulty(fault), "listen": {"port": port}}
    config = parse_config(config_text(tmp_path, sections=sections), folder=tmp_path)
    stream = io.StringIO()
    log = configure_log(format="json", level="debug", stream=stream)
    opened: list[bool] = []

    async def knock() -> None:
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                await trio.sleep(0.02)
            else:
                opened.append(True)
                return

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock)
            ended_by = await run(config, log=log, notifier=Notifier())
            nursery.cancel_scope.cancel()
    assert isinstance(ended_by, BootError), ended_by
    assert (ended_by.stage, ended_by.exit_status) == (stage, exit_status), ended_by.message
    assert says in ended_by.message
    assert not opened
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "serving" not in [line["event"] for line in lines]


async def test_an_unknown_fault_is_a_configuration_error(tmp_path: Path) -> None:
    config = parse_config(config_text(tmp_path, sections=faulty("gpu_on_fire")), folder=tmp_path)
    log = configure_log(format="json", level="error", stream=io.StringIO())
    ended_by = await run(config, log=log, notifier=Notifier())
    assert isinstance(ended_by, BootError)
    assert ended_by.exit_status == EX_CONFIG
    assert "gpu_on_fire" in ended_by.message


async def test_without_gpus_epochs_carry_none_and_only_a_named_policy_accepts_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {
        "attestation": {"gpu": "unsafe_none"},
        "policy": {"gpus": "unsafe_none"},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    async with appliance.client() as client:
        report = (await client.get("/v1/aci/attestation")).json()
    assert report["attestation"]["evidence"]["gpu"]["gpus"] == []
    none = 'tee_types = ["unsafe_simulated"]\ngpus = "unsafe_none"\n'
    outcome = await verify(appliance, tmp_path, f"[policy]\n{none}")
    assert outcome["verdict"] == "warning"
    assert "report.gpus" in checks(outcome)
    outcome = await verify(appliance, tmp_path, POLICY)
    assert outcome["verdict"] == "contraindicated"


async def test_without_gpus_every_answer_verifies_although_all_epochs_have_one_digest(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {
        "attestation": {"gpu": "unsafe_none"},
        "policy": {"gpus": "unsafe_none"},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    none = tmp_path / "policy.toml"
    for written, status in (
        ('[policy]\ntee_types = ["unsafe_simulated"]\ngpus = "unsafe_none"\n', 3),
        (POLICY, 1),
    ):
        none.write_text(written)
        for _ in range(2):
            arguments = ["chat", appliance.url, "Hello?", "--policy", str(none)]
            done = await trio.run_process(
                [sys.executable, "-m", "appliance", *arguments],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            assert done.returncode == status, done.stderr
    assert len(await appliance.engine_seen()) == 2, "only who accepts that asked anything"


async def test_two_gpus_give_two_reports_over_one_nonce(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections={"attestation": {"gpu_count": 2}})
    outcome = await verify(appliance, tmp_path, POLICY)
    assert outcome["verdict"] == "warning"
    submods = outcome["claims"]["submods"]
    assert submods["GPU-0"]["nonce"] == submods["GPU-1"]["nonce"]
    assert submods["GPU-0"]["ueid"] != submods["GPU-1"]["ueid"]


# --- the report ---------------------------------------------------------------------------------


async def test_a_report_binds_the_nonce_and_every_response_names_the_keyset(
    appliance: RunningAppliance,
) -> None:
    async with appliance.client() as client:
        response = await client.get("/v1/aci/attestation", params={"nonce": NONCE})
        report = parse_report(response.content)
        assert response.headers["x-aci-version"] == "aci/1"
        digest = response.headers["x-aci-keyset-digest"]
        assert digest == format_sha256(report.keyset_digest)
        assert digest == format_sha256(digest_of(report.keyset_document))
        for path in ("/health", "/nowhere", "/v1/models"):
            assert (await client.get(path)).headers["x-aci-keyset-digest"] == digest
        assert (await client.get("/.well-known/dcv")).json()["keyset_digest"] == digest
        streamed = await client.post("/v1/chat/completions", content=slow_chat(tokens=2, ms=1))
        assert streamed.headers["x-aci-keyset-digest"] == digest
    # Also where the application never hears of the request.
    for request, status in (
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"400"),
        (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", b"505"),
    ):
        async with Wire.open(appliance) as wire:
            await wire.send(request)
            answer = (await wire.read_to_end()).lower()
        assert answer.startswith(b"http/1.1 " + status)
        assert f"\r\nx-aci-version: aci/1\r\nx-aci-keyset-digest: {digest}\r\n".encode() in answer


async def test_the_null_form_is_made_once_and_kept_under_its_digest(
    appliance: RunningAppliance,
) -> None:
    async with appliance.client() as client:
        first, second = [await client.get("/v1/aci/attestation") for _ in range(2)]
        assert first.content == second.content
        digest = first.headers["x-aci-keyset-digest"]
        assert (await client.get(f"/v1/dcv/reports/{digest}")).content == first.content
        other = await client.get(f"/v1/dcv/reports/sha256:{'0' * 64}")
        assert (other.status_code, other.json()["error"]["code"]) == (404, "not_found")
        odd = await client.get("/v1/dcv/reports/latest")
        assert odd.status_code == 400
        fresh = await client.get("/v1/aci/attestation", params={"nonce": NONCE})
        assert fresh.content != first.content


@pytest.mark.parametrize(
    "query",
    [
        "nonce=",
        "nonce=ab",
        f"nonce={'AB' * 32}",
        f"nonce={'g' * 64}",
        f"nonce={NONCE}&nonce={NONCE}",
    ],
)
async def test_a_nonce_that_is_none_is_refused(appliance: RunningAppliance, query: str) -> None:
    async with appliance.client() as client:
        response = await client.get(f"/v1/aci/attestation?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_reports_are_bounded_per_address(nursery: trio.Nursery, tmp_path: Path) -> None:
    sections: Sections = {"limits": {"reports_per_minute": 3}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    async with appliance.client() as client:
        answers = [await client.get("/v1/aci/attestation") for _ in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1


async def test_a_burst_for_reports_is_told_to_come_back_and_does_not_end_the_appliance(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """It once did, when a re-attestation was due meanwhile."""
    sections: Sections = {"attestation": {"simulated_latency_s": 2.0, "interval_s": 0.5}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    answers: list[httpx2.Response] = []

    async def ask(client: httpx2.AsyncClient, number: int) -> None:
        url = f"/v1/aci/attestation?nonce={number:064x}"
        answers.append(await client.get(url))

    async with appliance.client() as client, trio.open_nursery() as burst:
        for number in range(40):
            burst.start_soon(ask, client, number)
    refused = [one for one in answers if one.status_code == 429]
    assert {one.status_code for one in answers} == {200, 429}
    assert len(refused) >= 40 - 2 * MAX_WAITING_REPORTS
    assert {one.headers["retry-after"] for one in refused} == {"1"}
    await trio.sleep(3.0)  # a re-attestation comes of it
    assert not appliance.ended.is_set()
    assert "reattested" in {line["event"] for line in appliance.log_lines}


async def test_a_keyset_is_renewed_with_the_same_keys_and_the_old_one_stays(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    ahead = [0.0]
    sections: Sections = {"attestation": {"interval_s": 0.05, "keyset_s": 100.0}}
    appliance = await start_appliance(
        nursery, tmp_path, sections=sections, wall_clock=lambda: time.time() + ahead[0]
    )
    async with appliance.client() as client:
        old = await client.get("/v1/aci/attestation")
        ahead[0] = 80.0
        with trio.fail_after(10):
            while True:
                new = await client.get("/v1/aci/attestation")
                if new.content != old.content:
                    break
                await trio.sleep(0.05)
        before, after = parse_report(old.content), parse_report(new.content)
        kept = await client.get(f"/v1/dcv/reports/{format_sha256(before.keyset_digest)}")
    assert kept.content == old.content
    assert after.keyset.not_after >= before.keyset.not_after + 80
    assert after.keyset.subject == before.keyset.subject
    assert after.keyset.receipt_keys == before.keyset.receipt_keys
    assert after.keyset.tls == before.keyset.tls


# --- the GPU attestation device -----------------------------------------------------------------


async def test_what_generate_gives_verify_accepts_and_with_one_bit_changed_does_not(
    appliance: RunningAppliance,
) -> None:
    async with appliance.client() as client:
        for prefix in ("/v1/dcv/attestation", "/~sev_gpu@1.0"):
            response = await client.post(f"{prefix}/generate", json={"nonce": NONCE})
            made = response.json()
            assert made["verified"] is True
            assert made["client_nonce"] == NONCE
            assert made["eat"].count(".") == 2
            shown = {
                name: made[name]
                for name in ("evidences", "client_nonce", "nonce", "inclusion", "keyset_digest")
            }
            good = (await client.post(f"{prefix}/verify", json=shown)).json()
            assert (good["verified"], good["error"]) == (True, None)
            assert [one["check"] for one in good["findings"]] == ["nvidia_gpu.simulated"]
            for change, code in (
                ({"client_nonce": "cd" * 32}, "unbound"),
                ({"nonce": "cd" * 32}, "unbound"),
                ({"keyset_digest": f"sha256:{'0' * 64}"}, "unbound"),
                ({"evidences": [_flipped(made["evidences"][0])]}, "unauthentic"),
            ):
                bad = (await client.post(f"{prefix}/verify", json={**shown, **change})).json()
                assert (bad["verified"], bad["error"]["code"]) == (False, code), change
            # Without what binds it, it is said not to be bound.
            bare = {"evidences": made["evidences"], "nonce": made["nonce"]}
            loose = (await client.post(f"{prefix}/verify", json=bare)).json()
            assert "presented.inclusion" in [one["check"] for one in loose["findings"]]
        assert (await client.get("/~sev_gpu@1.0/info")).status_code == 200


def _flipped(evidence: dict[str, str]) -> dict[str, str]:
    text = evidence["evidence"]
    middle = len(text) // 2
    other = "A" if text[middle] != "A" else "B"
    return {**evidence, "evidence": text[:middle] + other + text[middle + 1 :]}


@pytest.mark.parametrize(
    "body",
    [{}, {"nonce": "ab"}, {"nonce": None}, {"nonce": 1}, {"nonce": NONCE, "x": 1}, [], "text"],
    ids=str,
)
async def test_generate_without_a_nonce_of_the_askers_is_refused(
    appliance: RunningAppliance, body: object
) -> None:
    async with appliance.client() as client:
        response = await client.post("/v1/dcv/attestation/generate", json=body)
    assert response.status_code == 400


# --- going on proving it ------------------------------------------------------------------------


async def test_evidence_that_turns_bad_withdraws_and_ends_streams_with_the_reason(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """The clock runs past the end of the manifests' signers: nothing else changes."""
    ahead = [0.0]
    sections: Sections = {"attestation": {"interval_s": 0.2}}
    appliance = await start_appliance(
        nursery, tmp_path, sections=sections, wall_clock=lambda: time.time() + ahead[0]
    )
    async with RawConnection.open(appliance) as running:
        await running.post("/v1/chat/completions", slow_chat())
        await running.read_some(1)
        ahead[0] = 300 * 365 * 86_400.0
        response = await running.read_response()
    assert not response.clean
    assert b'"code":"contraindicated"' in response.body
    with trio.fail_after(20):
        await appliance.ended.wait()
    assert isinstance(appliance.result[0], EvidenceError)
    assert appliance.result[0].exit_status == EX_NOPERM
    events = [line["event"] for line in appliance.log_lines]
    assert events.index("withdrawn") < events.index("engine_stopped")


async def test_a_collector_that_dies_withdraws_the_appliance(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path)
    pids = sorted(collectors())
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    with trio.fail_after(20):
        await appliance.ended.wait()
    assert isinstance(appliance.result[0], AttesterUnavailable)
    assert appliance.result[0].exit_status == EX_UNAVAILABLE


async def test_a_gpu_that_keeps_failing_withdraws_after_its_count(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"attestation": {"interval_s": 0.05, "failures": 2, "collect_s": 1.0}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    pids = sorted(collectors())
    os.kill(pids[0], signal.SIGSTOP)  # hangs, as a driver does
    try:
        with trio.fail_after(30):
            await appliance.ended.wait()
    finally:
        if pids[0] in collectors():
            os.kill(pids[0], signal.SIGKILL)
    assert isinstance(appliance.result[0], AttesterUnavailable | DeviceFault)
    failed = [one for one in appliance.log_lines if one["event"] == "evidence_not_collected"]
    assert len(failed) == 2


# --- dcv verify ---------------------------------------------------------------------------------


async def verify(
    appliance: RunningAppliance, folder: Path, policy: str | None, *more: str
) -> dict[str, Any]:
    return await dcv_verify(appliance.url, folder, policy, *more)


async def dcv_verify(what: str, folder: Path, policy: str | None, *more: str) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "appliance", "verify", what, "--json", *more]
    if policy is not None:
        (folder / "policy.toml").write_text(policy)
        arguments += ["--policy", str(folder / "policy.toml")]
    with trio.fail_after(60):
        done = await trio.run_process(arguments, capture_stdout=True, check=False)
    outcome: dict[str, Any] = json.loads(done.stdout)
    expected = {"affirming": 0, "contraindicated": 1, None: 2, "warning": 3}
    assert done.returncode == expected[outcome["verdict"]]
    return outcome


def checks(outcome: dict[str, Any]) -> list[str]:
    return [finding["check"] for finding in outcome["findings"]]


async def test_simulated_hardware_is_a_warning_and_never_affirmed(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    outcome = await verify(appliance, tmp_path, POLICY)
    assert outcome["verdict"] == "warning"
    assert {"simulated.test_root", "nvidia_gpu.simulated"} <= set(checks(outcome))
    strict = await verify(appliance, tmp_path, None)
    assert strict["verdict"] == "contraindicated"
    assert "simulated" in strict["error"]["message"]


async def test_a_bundle_verifies_offline_and_any_other_byte_is_caught(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.json"
    async with trio.open_nursery() as life:
        appliance = await start_appliance(life, tmp_path)
        live = await verify(appliance, tmp_path, POLICY, "--save", str(bundle))
        life.cancel_scope.cancel()
    saved = await dcv_verify(str(bundle), tmp_path, POLICY)
    assert saved["verdict"] == "warning"
    assert saved["claims"].pop("at")["source"] == "bundle"
    live["claims"].pop("at")
    assert saved["claims"] == live["claims"]
    late = await dcv_verify(str(bundle), tmp_path, POLICY, "--at", "2040-01-01T00:00:00Z")
    assert (late["verdict"], late["error"]["code"]) == ("contraindicated", "stale")
    document = json.loads(bundle.read_text())
    document["report"]["attestation"]["evidence"]["workload"]["model"]["id"] = "another"
    bundle.write_text(json.dumps(document))
    changed = await dcv_verify(str(bundle), tmp_path, POLICY)
    assert (changed["verdict"], changed["error"]["code"]) == ("contraindicated", "unbound")


async def test_a_policy_that_wants_another_workload_says_what_differs(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    other = f'models = ["sha256:{"0" * 64}"]\ndeterministic = "required"\n'
    outcome = await verify(appliance, tmp_path, POLICY + other)
    assert outcome["verdict"] == "contraindicated"
    assert {"report.model.digest", "report.engine.deterministic"} <= set(checks(outcome))


async def test_somebody_in_between_with_another_key_is_refused(
    appliance: RunningAppliance, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """A man in the middle relays everything, under a certificate of his own."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def relay(stream: trio.SocketStream) -> None:
        outside = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        inside = await trio.open_ssl_over_tcp_stream(
            "127.0.0.1", appliance.port, ssl_context=appliance.trust, https_compatible=True
        )

        async def pump(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            try:
                while data := await source.receive_some(65536):
                    await sink.send_all(data)
            except trio.BrokenResourceError:
                pass

        async with outside, inside, trio.open_nursery() as both:
            both.start_soon(pump, outside, inside)
            await pump(inside, outside)
            both.cancel_scope.cancel()

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, relay, [listener])
    port = listener.socket.getsockname()[1]
    fooled = ssl.create_default_context()
    authority.configure_trust(fooled)
    async with httpx2.AsyncClient(verify=fooled) as client:
        assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200
    outcome = await dcv_verify(f"https://127.0.0.1:{port}", tmp_path, POLICY)
    assert (outcome["verdict"], outcome["error"]["code"]) == ("contraindicated", "unbound")
    assert "somebody stands between" in outcome["error"]["message"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("https://127.0.0.1:1", "cannot ask"),
        ("http://127.0.0.1:1", "https://HOST"),
        ("https://\N{LATIN SMALL LETTER E WITH ACUTE}..example", "https://HOST"),
        ("https://a..example", "https://HOST"),
        (f"https://{'a' * 300}", "https://HOST"),
        ("https://\N{SNOWMAN}.example", "https://HOST"),
        ("https://[::1", "https://HOST"),
        ("https://127.0.0.1:99999", "https://HOST"),
        ("/no/such/file", "cannot read"),
    ],
)
async def test_what_cannot_be_checked_is_neither_good_nor_bad(
    tmp_path: Path, what: str, says: str
) -> None:
    outcome = await dcv_verify(what, tmp_path, POLICY)
    assert outcome["verdict"] is None
    assert says in outcome["error"]["message"]


def test_a_policy_with_a_typing_error_is_not_a_verdict(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[policy]\ntee_type = []\n")
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "verify", "x", "--policy", str(policy)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "tee_types" in done.stdout


async def test_vendors_are_asked_again_while_it_serves(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """An hour later: what is asked for comes with the next reports, and nothing withdraws."""
    ahead = [0.0]
    sections: Sections = {"attestation": {"interval_s": 0.05}}
    appliance = await start_appliance(
        nursery, tmp_path, sections=sections, wall_clock=lambda: time.time() + ahead[0]
    )
    await _reattested(appliance, times=2)
    assert "vendors_asked" not in events(appliance)  # at boot, and not again so soon
    ahead[0] = 3700.0
    await _reattested(appliance, times=3)
    assert events(appliance).count("vendors_asked") == 1
    assert not appliance.ended.is_set()


async def _reattested(appliance: RunningAppliance, *, times: int) -> None:
    """Wait for so many more."""
    wanted = events(appliance).count("reattested") + times
    with trio.fail_after(10):
        while events(appliance).count("reattested") < wanted:
            await trio.sleep(0.02)


def events(appliance: RunningAppliance) -> list[str]:
    return [str(line["event"]) for line in appliance.log_lines]

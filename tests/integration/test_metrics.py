"""What Prometheus sees: outcomes and durations, on a listener of its own, without content."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx2
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.appliance import (
    RawConnection,
    RunningAppliance,
    Sections,
    start_appliance,
)
from tests.integration.test_life import CHAT, slow_chat


@pytest.fixture
async def measured(nursery: trio.Nursery, tmp_path: Path) -> RunningAppliance:
    return await start_appliance(nursery, tmp_path, sections={"listen": {"metrics_port": 0}})


def metrics_url(appliance: RunningAppliance) -> str:
    line = next(line for line in appliance.log_lines if line["event"] == "metrics")
    return str(line["url"])


async def scrape(
    appliance: RunningAppliance,
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    async with httpx2.AsyncClient(timeout=10) as client:
        response = await client.get(metrics_url(appliance))
    assert response.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def requests(outcome: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return ("dcv_requests_total", (("endpoint", CHAT), ("outcome", outcome)))


async def test_every_ending_is_counted_once_under_its_own_name(measured: RunningAppliance) -> None:
    await measured.chat()
    await measured.chat(stream=True)
    await measured.chat(temperature="hot")
    await measured.chat("[[mode:http_500]] Go")
    async with RawConnection.open(measured) as broken:
        await broken.post(CHAT, slow_chat(tokens=3).replace(b"mode:slow:20", b"mode:error_event:2"))
        await broken.read_response()
    async with RawConnection.open(measured) as leaving:
        await leaving.post(CHAT, slow_chat())
        await leaving.read_some(1)
    with trio.fail_after(5):
        while requests("client_disconnected") not in await scrape(measured):
            await trio.sleep(0.02)
    seen = await scrape(measured)
    assert seen[requests("complete")] == 2
    assert seen[requests("invalid_request")] == 1
    assert seen[requests("engine_failed")] == 2
    assert seen[requests("client_disconnected")] == 1
    chat = (("endpoint", CHAT),)
    assert seen["dcv_request_duration_seconds_count", chat] == 6
    assert seen["dcv_time_to_first_token_seconds_count", chat] == 3
    assert seen["dcv_exchanges_running", ()] == 0
    assert seen["dcv_connections_open", ()] == 0
    assert seen["dcv_connections_refused_total", ()] == 0
    assert seen["dcv_contained_errors_total", ()] == 0
    assert seen["dcv_state", (("state", "serving"),)] == 1
    assert seen["dcv_state", (("state", "booting"),)] == 0


async def until_seen(
    appliance: RunningAppliance,
    name: str,
    value: float,
    labels: tuple[tuple[str, str], ...] = (),
) -> None:
    with trio.fail_after(10):
        while (await scrape(appliance)).get((name, labels)) != value:
            await trio.sleep(0.02)


async def test_who_waits_in_line_is_counted(nursery: trio.Nursery, tmp_path: Path) -> None:
    sections: Sections = {
        "listen": {"metrics_port": 0},
        "limits": {"max_concurrent": 1, "max_choices": 1},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    async with (
        RawConnection.open(appliance) as running,
        RawConnection.open(appliance) as waiting,
        RawConnection.open(appliance) as last,
    ):
        await running.post(CHAT, slow_chat())
        await running.read_some(1)
        for connection in (waiting, last):
            await connection.post(CHAT, slow_chat())
        await until_seen(appliance, "dcv_requests_waiting", 2)
        assert (await scrape(appliance))["dcv_exchanges_running", ()] == 1
        last.drop()
        await until_seen(appliance, "dcv_requests_waiting", 1)


async def test_refused_connections_are_counted(nursery: trio.Nursery, tmp_path: Path) -> None:
    sections: Sections = {"listen": {"metrics_port": 0}, "limits": {"max_connections": 2}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    streams = [await trio.open_tcp_stream("127.0.0.1", appliance.port) for _ in range(5)]
    await until_seen(appliance, "dcv_connections_refused_total", 3)
    assert (await scrape(appliance))["dcv_connections_open", ()] == 2
    for stream in streams:
        await trio.aclose_forcefully(stream)
    await until_seen(appliance, "dcv_connections_open", 0)


async def test_an_engine_that_dies_is_counted(measured: RunningAppliance) -> None:
    """The appliance withdraws and can be asked as long as its last connections do not end; one in
    its handshake takes the whole time that they are given."""
    [ready] = [line for line in measured.log_lines if line["event"] == "engine_ready"]
    stream = await trio.open_tcp_stream("127.0.0.1", measured.port)
    await until_seen(measured, "dcv_connections_open", 1)
    os.kill(ready["pid"], signal.SIGKILL)
    died = ("code", "engine_died")
    await until_seen(measured, "dcv_engine_failures_total", 1, (died,))
    await trio.aclose_forcefully(stream)
    with trio.fail_after(20):
        await measured.ended.wait()


async def test_the_public_port_has_no_metrics_and_the_private_one_nothing_else(
    measured: RunningAppliance,
) -> None:
    async with measured.client() as client:
        assert (await client.get("/metrics")).status_code == 404
    base = metrics_url(measured).removesuffix("/metrics")
    async with httpx2.AsyncClient(timeout=10) as client:
        for method, path in (("GET", "/"), ("POST", "/metrics"), ("GET", "/v1/models")):
            assert (await client.request(method, base + path)).status_code == 404


async def test_a_broken_scrape_does_not_end_the_listener(measured: RunningAppliance) -> None:
    port = int(metrics_url(measured).removesuffix("/metrics").rpartition(":")[2])
    for junk in (b"", b"\x16\x03\x01", b"GET /metrics HTTP/9.9\r\n\r\n", b"x" * 100_000):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(junk)
    assert requests("complete") not in await scrape(measured)


async def test_no_prompt_and_no_key_is_in_the_metrics(measured: RunningAppliance) -> None:
    canary = "metrics-canary-51c3"
    await measured.chat(canary)
    async with httpx2.AsyncClient(timeout=10) as client:
        text = (await client.get(metrics_url(measured))).text
    assert canary not in text


async def tokens_told(appliance: RunningAppliance) -> tuple[float, float]:
    seen = await scrape(appliance)
    labels = (("endpoint", CHAT),)
    return (
        seen.get(("dcv_prompt_tokens_total", labels), 0),
        seen.get(("dcv_completion_tokens_total", labels), 0),
    )


@pytest.mark.parametrize("choices", [1, 2])
async def test_tokens_are_counted_where_an_answer_tells_its_usage(
    measured: RunningAppliance, choices: int
) -> None:
    usage = (await measured.chat(n=choices)).json()["usage"]
    told = (usage["prompt_tokens"], usage["completion_tokens"])
    assert min(told) > 0
    assert await tokens_told(measured) == told
    # A stream that was not asked for its usage tells none, and its client sees nothing new.
    silent = await measured.chat('"usage" is only a word here', n=choices, stream=True)
    assert '"usage":{' not in silent.text
    assert await tokens_told(measured) == told
    options = {"include_usage": True}
    asked = await measured.chat(n=choices, stream=True, stream_options=options)
    last = json.loads(asked.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
    assert await tokens_told(measured) == (
        told[0] + last["prompt_tokens"],
        told[1] + last["completion_tokens"],
    )


async def test_the_events_of_streams_and_the_gaps_between_them_are_counted(
    measured: RunningAppliance,
) -> None:
    answer = await measured.chat("[[mode:slow:30]] Go", stream=True, max_tokens=10, ignore_eos=True)
    events = answer.text.count("\n\n") - answer.text.count(": ping")
    seen = await scrape(measured)
    chat = ("endpoint", CHAT)
    assert seen["dcv_stream_events_total", (chat,)] == events
    # On a busy machine several events arrive in one read: one arrival, so fewer gaps.
    gaps = seen["dcv_inter_token_seconds_count", (chat,)]
    assert 1 <= gaps < events
    assert seen["dcv_inter_token_seconds_sum", (chat,)] > 0
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in seen.items()
        if name == "dcv_inter_token_seconds_bucket"
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["+Inf"] == gaps

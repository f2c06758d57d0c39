"""`dcv proxy`: a real process between an unmodified OpenAI client and a real appliance."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import trio

from appliance.errors import VerificationIncomplete
from appliance.serving.auth import hash_key
from appliance.verifier.proxy import parse_address
from tests.integration.appliance import MODEL, RunningAppliance, Sections, start_appliance
from tests.integration.proxies import Proxy, proxy
from tests.integration.test_transport import (
    QUESTION,
    STREAM_LIES,
    asked_async,
    lying,
    streamed_async,
)
from tests.integration.test_verify_receipts import dcv

WARNING = "--unsafe-accept-warning"


async def test_an_unmodified_client_gets_answers_that_were_verified(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with proxy(appliance.url, tmp_path, WARNING) as it, it.openai() as client:
        assert await asked_async(client)
        assert await streamed_async(client)
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="another", messages=QUESTION)
        verified = await it.said("answer_verified", 3)
    assert [one["outcome"] for one in verified] == ["complete", "complete", "refused"]
    assert len({one["receipt_id"] for one in verified}) == 3
    assert "cat called" not in json.dumps(it.lines)
    assert it.lines[-1]["event"] == "stopping"


async def test_a_warning_is_refused_unless_it_is_said_to_be_good_enough(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with proxy(appliance.url, tmp_path) as it, it.openai() as client:
        # Nobody has asked yet.
        await it.said("refused")
        with pytest.raises(openai.InternalServerError, match="expected affirming") as refused:
            await asked_async(client)
        # The openai package did not try again.
        assert len(await it.said("refused", 2)) == 2
    assert refused.value.status_code == 502
    assert refused.value.code == "contraindicated"
    assert await appliance.engine_seen() == []


async def test_nobody_at_the_other_end_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{taken.getsockname()[1]}"
        async with proxy(url, tmp_path, WARNING) as it, it.openai() as client:
            [refused] = await it.said("refused")
            assert refused["code"] == "could_not_verify"
            with pytest.raises(openai.InternalServerError, match="cannot ask"):
                await asked_async(client)


async def heard(it: Proxy, **body: Any) -> tuple[int, bytes, bool]:
    """Status, body and whether it ended as HTTP has it."""
    content = b""
    async with (
        httpx2.AsyncClient(timeout=60, trust_env=False) as client,
        client.stream(
            "POST",
            f"{it.url}/chat/completions",
            json={"model": MODEL, "messages": QUESTION, **body},
        ) as response,
    ):
        try:
            async for part in response.aiter_raw():
                content += part
        except httpx2.RemoteProtocolError:
            return response.status_code, content, False
    return response.status_code, content, True


@pytest.mark.parametrize(
    "lie", ["an event is missing", "a receipt is forged", "the end is missing"]
)
async def test_a_stream_that_does_not_hold_ends_in_an_error_and_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    async with lying(tmp_path, monkeypatch) as front, proxy(front.url, tmp_path, WARNING) as it:
        status, content, clean = await heard(it, stream=True)
        assert (status, clean) == (200, True)
        assert content.endswith(b"data: [DONE]\n\n")
        front.lie, error = STREAM_LIES[lie]
        status, content, clean = await heard(it, stream=True)
        assert (status, clean) == (200, False)
        assert b"[DONE]" not in content
        last = content.rstrip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == error.code
        async with it.openai() as client:
            with pytest.raises(openai.APIError, match="not verified"):
                await streamed_async(client)
        # At once: nothing of it is handed on.
        if lie == "a receipt is forged":
            status, content, clean = await heard(it)
            assert (status, clean) == (502, True)
            assert json.loads(content)["error"]["code"] == error.code


async def test_events_come_as_they_are_written(appliance: RunningAppliance, tmp_path: Path) -> None:
    question: Any = [{"role": "user", "content": "[[mode:hang_stream:3]] Go on"}]
    async with proxy(appliance.url, tmp_path, WARNING) as it, it.openai() as client:
        with trio.fail_after(60):
            stream = await client.chat.completions.create(
                model=MODEL, messages=question, stream=True
            )
            first = await anext(aiter(stream))  # though there will never be a last
            await stream.close()
    assert first.choices


async def test_the_key_is_the_proxys_and_the_clients_is_not_sent(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    keys = [{"name": "alice", "sha256": hash_key("alice")}]
    sections: Sections = {"auth": {"mode": "keys", "keys": keys}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    key = tmp_path / "key"
    key.write_text("alice\n")
    async with (
        proxy(appliance.url, tmp_path, WARNING, "--api-key-file", str(key)) as it,
        it.openai() as client,
    ):
        assert await asked_async(client)
    async with proxy(appliance.url, tmp_path, WARNING) as it, it.openai() as client:
        with pytest.raises(openai.AuthenticationError):
            await asked_async(client)
    assert "alice" not in json.dumps(it.lines)


async def test_what_is_no_business_of_a_local_client_is_refused(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with (
        proxy(appliance.url, tmp_path, WARNING) as it,
        httpx2.AsyncClient(timeout=60, trust_env=False) as client,
    ):
        page = await client.get(f"{it.url}/models", headers={"Origin": "https://example.org"})
        assert page.status_code == 403
        large = await client.post(f"{it.url}/chat/completions", content=b" " * (17 << 20))
        assert large.status_code == 413
        port = int(it.url.rpartition(":")[2].partition("/")[0])
        for junk in (b"\x16\x03\x01junk\r\n\r\n", b"GET / HTTP/1.1\r\n", b""):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(junk or b"\r")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert b"505" in await stream.receive_some(4096)
        assert (await client.get(f"{it.url}/models")).status_code == 200


def test_where_to_listen_is_an_address_and_a_port() -> None:
    assert parse_address("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert parse_address("[::1]:0") == ("::1", 0)
    for text in ("8080", "localhost:80", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1"):
        with pytest.raises(VerificationIncomplete, match="--listen"):
            parse_address(text)


async def test_what_is_no_url_does_not_start() -> None:
    done = await dcv("proxy", "http://127.0.0.1:1")
    assert done.status == 2
    assert "not_started" in done.err

"""How an appliance with the real SGLang ends: each test takes a boot of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx2
import pytest
from serve import MODEL_ID

from tests.engine.conftest import RealAppliance, stop
from tests.engine.test_real_engine import QUESTION, STORY

pytestmark = pytest.mark.engine


def test_sigterm_lets_the_stream_end_and_leaves_nothing(fresh: RealAppliance) -> None:
    with (
        fresh.client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": MODEL_ID, "messages": QUESTION, "stream": True, "temperature": 0},
        ) as response,
    ):
        data = b""
        for part in response.iter_raw():
            if not data:
                fresh.process.send_signal(signal.SIGTERM)
            data += part
    assert data.endswith(b"data: [DONE]\n\n")
    assert stop(fresh) == 0
    assert not Path(f"/proc/{fresh.engine_pid}").exists()


def test_an_engine_killed_in_mid_stream_is_an_error_event_and_an_exit_status(
    fresh: RealAppliance,
) -> None:
    data = b""
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        fresh.client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": MODEL_ID,
                "messages": STORY,
                "stream": True,
                "max_tokens": 2000,
                "ignore_eos": True,
            },
        ) as response,
    ):
        for part in response.iter_raw():
            if not data:
                os.kill(fresh.engine_pid, signal.SIGKILL)
            data += part
    assert b'data: {"error"' in data
    assert b"[DONE]" not in data
    assert fresh.process.wait(60) == 70
    assert "engine_died" in fresh.log()

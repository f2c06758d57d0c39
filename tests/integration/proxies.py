"""`dcv proxy` as a real process, beside a test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import trio
from openai import AsyncOpenAI

from tests.integration.test_verify_receipts import policy

PATIENCE_S = 60.0


@dataclass
class Proxy:
    """Attributes: lines: what it has said on standard error."""

    process: trio.Process
    lines: list[dict[str, Any]] = field(default_factory=list)
    news: trio.Condition = field(default_factory=trio.Condition)

    @property
    def url(self) -> str:
        [said] = [one for one in self.lines if one["event"] == "listening"]
        return str(said["url"])

    def openai(self) -> AsyncOpenAI:
        http = httpx2.AsyncClient(timeout=PATIENCE_S, trust_env=False)
        return AsyncOpenAI(base_url=self.url, api_key="unused", http_client=http)

    async def said(self, event: str, times: int = 1) -> list[dict[str, Any]]:
        """The lines of that name, once there are so many."""
        with trio.fail_after(PATIENCE_S):
            async with self.news:
                while len(found := [one for one in self.lines if one["event"] == event]) < times:
                    await self.news.wait()
        return found


@asynccontextmanager
async def proxy(url: str, folder: Path, *more: str) -> AsyncIterator[Proxy]:
    """Until it has ended, as SIGTERM has it."""
    process = await trio.lowlevel.open_process(
        [
            *(sys.executable, "-m", "appliance", "proxy", url, "--listen", "127.0.0.1:0"),
            *("--policy", str(policy(folder)), *more),
        ],
        stderr=subprocess.PIPE,
    )
    it = Proxy(process)

    async def read() -> None:
        assert process.stderr is not None
        rest = b""
        async for part in process.stderr:
            *whole, rest = (rest + part).split(b"\n")
            async with it.news:
                it.lines += map(json.loads, whole)
                it.news.notify_all()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        try:
            await it.said("listening")
            yield it
        finally:
            with trio.CancelScope(shield=True), trio.fail_after(PATIENCE_S):
                process.send_signal(signal.SIGTERM)
                await process.wait()
    assert process.returncode == 0

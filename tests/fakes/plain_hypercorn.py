"""A small Quart-Trio application on Hypercorn as it is, to show what `appliance.web` is for.

Run as a program: `plain_hypercorn.py FOLDER`, with `key.pem` and `certificate.pem` in it. Prints
its port, and `sent` whenever an answer has been handed to Hypercorn to its end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart_trio import QuartTrio

GRACEFUL_S = 0.3
EVENT = b"data: " + b"x" * 1000 + b"\n\n"
EVENTS = 40_000

app = QuartTrio(__name__)
app.config["RESPONSE_TIMEOUT"] = None


@app.get("/live")
async def live() -> bytes:
    return b"live"


@app.post("/long")
async def long() -> AsyncIterator[bytes]:
    async def events() -> AsyncIterator[bytes]:
        for _ in range(EVENTS):
            yield EVENT
        print("sent", flush=True)

    return events()


async def terminated() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        await signals.__anext__()


async def main(folder: Path) -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.keyfile = str(folder / "key.pem")
    config.certfile = str(folder / "certificate.pem")
    config.graceful_timeout = GRACEFUL_S
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        binds: list[str] = await nursery.start(
            partial(serve, app, config, shutdown_trigger=terminated)
        )
        print(binds[0].rpartition(":")[2], flush=True)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))

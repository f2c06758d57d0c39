"""A peer: FastAPI on uvicorn, uvloop and httptools, asking the engine through aiohttp.

    python fastapi_aiohttp.py PORT ENGINE_PORT CERTIFICATE KEY

It hands a chat request on as it came and the answer back as it comes. What was asked and
answered is hashed, and the two hashes are signed at the end; nothing is attested or stored.
"""

import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

PORT, ENGINE, CERTIFICATE, KEY = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
URL = f"http://127.0.0.1:{ENGINE}/v1/chat/completions"
SIGNER = Ed25519PrivateKey.generate()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One session for all requests, without a bound on connections or on a stream's length."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    ) as session:
        app.state.session = session
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: Request) -> StreamingResponse:
    """Ask the engine; closing the answer's connection is what aborts it."""
    asked, answered = await request.body(), hashlib.sha256()
    answer = await request.app.state.session.post(
        URL, data=asked, headers={"content-type": "application/json"}
    )

    async def body() -> AsyncIterator[bytes]:
        async with answer:
            async for data in answer.content.iter_any():
                answered.update(data)
                yield data
        SIGNER.sign(hashlib.sha256(asked).digest() + answered.digest())

    return StreamingResponse(
        body(), status_code=answer.status, media_type=answer.headers["content-type"]
    )


uvicorn.run(
    app,
    host="127.0.0.1",
    port=PORT,
    loop="uvloop",
    http="httptools",
    ssl_certfile=CERTIFICATE,
    ssl_keyfile=KEY,
    access_log=False,
    log_level="warning",
)

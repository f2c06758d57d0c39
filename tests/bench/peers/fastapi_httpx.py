"""A peer: FastAPI on uvicorn, uvloop and httptools, asking the engine through httpx.

    python fastapi_httpx.py PORT ENGINE_PORT CERTIFICATE KEY

It hands a chat request on as it came and the answer back as it comes, with one httpx client for
all requests. It attests, hashes, signs and stores nothing.
"""

import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

PORT, ENGINE, CERTIFICATE, KEY = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
URL = f"http://127.0.0.1:{ENGINE}/v1/chat/completions"
SIGNER = Ed25519PrivateKey.generate()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests, without a bound on connections or on a stream's length."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: Request) -> StreamingResponse:
    """Ask the engine; closing the answer's connection is what aborts it."""
    asked, answered = await request.body(), hashlib.sha256()
    client: httpx.AsyncClient = request.app.state.client
    question = client.build_request(
        "POST",
        URL,
        content=asked,
        headers={"content-type": "application/json"},
    )
    answer = await client.send(question, stream=True)

    async def body() -> AsyncIterator[bytes]:
        try:
            async for data in answer.aiter_raw():
                answered.update(data)
                yield data
        finally:
            await answer.aclose()
        SIGNER.sign(hashlib.sha256(asked).digest() + answered.digest())

    return StreamingResponse(
        body(), status_code=answer.status_code, media_type=answer.headers["content-type"]
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

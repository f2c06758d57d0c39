"""Several parties at one engine: keys, limits, turns, and nothing shared between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from appliance.serving.auth import hash_key
from tests.integration.appliance import (
    MODEL,
    RawConnection,
    RunningAppliance,
    start_appliance,
)

CHAT = "/v1/chat/completions"
ALICE, BOB = "dcv_alice", "dcv_bob"


def keys(**limits: dict[str, object]) -> dict[str, object]:
    """`[auth]` with a key for each party."""
    return {
        "mode": "keys",
        "keys": [
            {"name": name, "sha256": hash_key(f"dcv_{name}"), **limits.get(name, {})}
            for name in ("alice", "bob")
        ],
    }


def body(prompt: str = "Go", **more: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}


async def ask(
    appliance: RunningAppliance, key: str | None, prompt: str = "Go", **more: object
) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with appliance.client(headers=headers) as client:
        return await client.post(CHAT, json=body(prompt, **more))


async def with_keys(
    nursery: trio.Nursery, folder: Path, limits: dict[str, object] | None = None, **parties: Any
) -> RunningAppliance:
    return await start_appliance(
        nursery, folder, sections={"auth": keys(**parties), "limits": limits or {}}
    )


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE}x",
        f"Bearer {ALICE} {BOB}",
        "Bearer " + "x" * 10_000,
        "Bearer schlüssel",
    ],
)
async def test_without_a_known_key_nothing_is_answered(
    nursery: trio.Nursery, tmp_path: Path, header: str | None
) -> None:
    appliance = await with_keys(nursery, tmp_path)
    headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
    async with appliance.client() as client:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("POST", "/v1/tokenize")):
            response = await client.request(method, path, headers=headers, content=b"{}")
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
    assert await appliance.engine_seen() == []


async def test_a_known_key_is_answered_in_any_case_of_the_scheme(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await with_keys(nursery, tmp_path)
    for scheme in ("Bearer", "bearer", "BEARER"):
        async with appliance.client(headers={"Authorization": f"{scheme} {ALICE}"}) as client:
            assert (await client.post(CHAT, json=body())).status_code == 200


async def test_two_tenants_never_share_a_cache_salt_and_one_keeps_his(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await with_keys(nursery, tmp_path)
    for key in (ALICE, BOB, ALICE, BOB):
        assert (await ask(appliance, key, n=2, temperature=1)).status_code == 200
    salts = [seen["cache_salt"] for seen in await appliance.engine_seen()]
    assert len(salts) == 8
    alice, bob = set(salts[0:2] + salts[4:6]), set(salts[2:4] + salts[6:8])
    assert len(alice) == len(bob) == 1
    assert alice != bob
    assert not any(hash_key(key) in salt for salt in salts for key in (ALICE, BOB))


async def test_another_boot_has_other_salts(nursery: trio.Nursery, tmp_path: Path) -> None:
    salts = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        appliance = await with_keys(nursery, folder)
        await ask(appliance, ALICE)
        salts |= {seen["cache_salt"] for seen in await appliance.engine_seen()}
    assert len(salts) == 2


async def test_a_key_has_its_own_number_of_generations(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await with_keys(nursery, tmp_path, alice={"max_concurrent": 1})
    async with RawConnection.open(appliance) as running:
        await running.post(
            CHAT,
            json.dumps(body("[[mode:slow:50]] Go", stream=True, ignore_eos=True)).encode(),
            ("authorization", f"Bearer {ALICE}"),
        )
        await running.read_some(1)
        refused = await ask(appliance, ALICE)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert (await ask(appliance, BOB)).status_code == 200
    with trio.fail_after(5):
        while (await ask(appliance, ALICE)).status_code != 200:
            await trio.sleep(0.05)


async def test_a_key_has_its_own_rate(nursery: trio.Nursery, tmp_path: Path) -> None:
    appliance = await with_keys(nursery, tmp_path, alice={"requests_per_minute": 3})
    statuses = [(await ask(appliance, ALICE)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = await ask(appliance, ALICE)
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert (await ask(appliance, BOB)).status_code == 200


async def test_a_keys_rate_counts_what_is_invalid_and_what_needs_no_engine(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Charged before the body is read: 30 broken bodies were 30 times read and refused as such."""
    appliance = await with_keys(nursery, tmp_path, alice={"requests_per_minute": 2})
    for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/tokenize", "/v1/detokenize"):
        async with appliance.client(headers={"Authorization": f"Bearer {BOB}"}) as client:
            assert (await client.post(path, content=b"{")).status_code == 400
    async with appliance.client(headers={"Authorization": f"Bearer {ALICE}"}) as client:
        answers = [await client.post(CHAT, content=b"{") for _ in range(30)]
        assert [one.status_code for one in answers[:3]] == [400, 400, 429]
        assert {one.status_code for one in answers[3:]} == {429}
        for path in ("/v1/completions", "/v1/embeddings", "/v1/tokenize", "/v1/detokenize"):
            refused = await client.post(path, content=b"{")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            assert "x-receipt-id" not in refused.headers
        # The refusal does not wait for a body that does not come.
        async with RawConnection.open(appliance) as half:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            await half.stream.send_all(f"{head}Authorization: Bearer {ALICE}\r\n\r\n".encode())
            with trio.fail_after(5):
                assert (await half.stream.receive_some(4096)).startswith(b"HTTP/1.1 429 ")


async def test_one_key_cannot_starve_another(nursery: trio.Nursery, tmp_path: Path) -> None:
    appliance = await with_keys(nursery, tmp_path, limits={"max_concurrent": 1, "max_choices": 1})
    finished: list[str] = []

    async def run(key: str, name: str) -> None:
        response = await ask(appliance, key, "[[mode:slow:10]] Go", max_tokens=5, temperature=0)
        assert response.status_code == 200, response.text
        finished.append(name)

    async with trio.open_nursery() as asking:
        for _ in range(12):
            asking.start_soon(run, ALICE, "alice")
        with trio.fail_after(5):
            while await appliance.engine_counter("sglang:num_running_reqs") < 1:
                await trio.sleep(0.01)
        await trio.sleep(0.1)
        before = len(finished)
        asking.start_soon(run, BOB, "bob")
    # Bob waits for the one that is running and for one more of Alice's at most, and for whatever
    # finished while his request was on its way.
    assert finished.index("bob") - before <= 4, finished
    assert finished.count("alice") == 12


@pytest.mark.parametrize("max_waiting", [1024, 3])
async def test_a_key_without_bounds_leaves_places_and_room_in_line_for_another(
    nursery: trio.Nursery, tmp_path: Path, max_waiting: int
) -> None:
    """Alice asks for twice what there is, for as long as she likes; Bob is served at once."""
    places = 16
    appliance = await with_keys(
        nursery, tmp_path, limits={"max_concurrent": places, "max_waiting": max_waiting}
    )
    statuses: list[int] = []
    endless = body("[[mode:slow:50]] Go", stream=True, ignore_eos=True, max_tokens=1000)

    async def hoard() -> None:
        headers = {"Authorization": f"Bearer {ALICE}"}
        async with (
            appliance.client(headers=headers) as client,
            client.stream("POST", CHAT, json=endless) as response,
        ):
            statuses.append(response.status_code)
            async for _ in response.aiter_lines():
                pass

    async with trio.open_nursery() as hoarding:
        for _ in range(2 * places):
            hoarding.start_soon(hoard)
        with trio.fail_after(20):
            while (
                statuses.count(200) < places - 1
                or await appliance.engine_counter("sglang:num_running_reqs") < places - 1
            ):
                await trio.sleep(0.02)
        for _ in range(3):
            with trio.fail_after(10):
                answer = await ask(appliance, BOB)
            assert answer.status_code == 200
        assert await appliance.engine_counter("sglang:num_running_reqs") == places - 1
        hoarding.cancel_scope.cancel()
    assert statuses.count(200) == places - 1
    if max_waiting == 3:
        assert statuses.count(503) == places + 1 - max_waiting


async def test_a_keys_whole_bodies_leave_room_for_anothers(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Alice's bodies wait in line with her requests; nothing of them could give way."""
    appliance = await with_keys(
        nursery,
        tmp_path,
        limits={
            "max_concurrent": 2,
            "max_choices": 1,
            "max_body_bytes": 1 << 16,
            "max_body_bytes_total": 1 << 18,
        },
    )
    large, small = "[[mode:slow:50]] " + " " * 60_000, "Go " + " " * 10_000
    statuses: list[int] = []

    async def wait() -> None:
        statuses.append((await ask(appliance, ALICE, large, ignore_eos=True)).status_code)

    async with trio.open_nursery() as waiting:
        for _ in range(8):
            waiting.start_soon(wait)
        with trio.fail_after(20):
            while len(statuses) < 5:
                await trio.sleep(0.02)
        assert statuses == [503] * 5  # three of them are three quarters
        assert (await ask(appliance, BOB, small)).status_code == 200
        waiting.cancel_scope.cancel()


async def test_a_full_line_and_a_long_wait_are_503_with_a_time_to_come_back(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await with_keys(
        nursery,
        tmp_path,
        limits={"max_concurrent": 1, "max_choices": 1, "max_waiting": 1, "max_wait_s": 0.5},
    )
    results: list[httpx2.Response] = []

    async def wait() -> None:
        results.append(await ask(appliance, BOB))

    async with RawConnection.open(appliance) as running:
        await running.post(
            CHAT,
            json.dumps(body("[[mode:slow:50]] Go", stream=True, ignore_eos=True)).encode(),
            ("authorization", f"Bearer {ALICE}"),
        )
        await running.read_some(1)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(wait)
            await trio.sleep(0.1)
            full = await ask(appliance, ALICE)
    assert full.status_code == results[0].status_code == 503
    for response in (full, results[0]):
        assert response.json()["error"]["code"] == "overloaded"
        assert response.headers["retry-after"] == "1"


async def test_who_leaves_the_line_takes_no_place(nursery: trio.Nursery, tmp_path: Path) -> None:
    appliance = await with_keys(nursery, tmp_path, limits={"max_concurrent": 1, "max_choices": 1})
    async with RawConnection.open(appliance) as running:
        await running.post(
            CHAT,
            json.dumps(body("[[mode:slow:20]] Go", stream=True, max_tokens=15)).encode(),
            ("authorization", f"Bearer {ALICE}"),
        )
        await running.read_some(1)
        for _ in range(5):
            async with RawConnection.open(appliance) as leaving:
                await leaving.post(
                    CHAT, json.dumps(body()).encode(), ("authorization", f"Bearer {BOB}")
                )
                await trio.sleep(0.02)
        await running.read_response()
    assert (await ask(appliance, BOB)).status_code == 200
    # The ones that left never reached the engine.
    assert len(await appliance.engine_seen()) == 2


async def test_no_key_and_no_name_is_in_the_log(nursery: trio.Nursery, tmp_path: Path) -> None:
    appliance = await with_keys(nursery, tmp_path)
    await ask(appliance, ALICE)
    await ask(appliance, "dcv_never-issued-4711")
    log = appliance.log_stream.getvalue()
    for secret in (ALICE, BOB, "never-issued-4711", hash_key(ALICE)):
        assert secret not in log


async def test_more_choices_than_places_is_refused_at_once(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await with_keys(nursery, tmp_path, limits={"max_concurrent": 2})
    response = await ask(appliance, ALICE, n=3)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"

"""The TPM's storage key, as those see it who seal secrets to this machine."""

from __future__ import annotations

from pathlib import Path

import httpx2
import trio

from tests.integration.appliance import start_appliance
from tests.integration.proxies import proxy
from tests.unit.test_sealed import storage_key

PATH = "/.well-known/dcv/storage-key"
SECTIONS = {"attestation": {"storage_key_file": "storage-key"}}


async def test_it_is_shown_to_a_relying_party_that_verified_who_shows_it(tmp_path: Path) -> None:
    key = storage_key()
    (tmp_path / "storage-key").write_bytes(key)
    async with trio.open_nursery() as nursery:
        appliance = await start_appliance(nursery, tmp_path, sections=SECTIONS)
        async with (
            proxy(appliance.url, tmp_path, "--unsafe-accept-warning") as it,
            httpx2.AsyncClient(timeout=20) as client,
        ):
            shown = await client.get(httpx2.URL(it.url).join(PATH))
            assert shown.content == key
        nursery.cancel_scope.cancel()


async def test_a_machine_without_one_serves_and_shows_none(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        appliance = await start_appliance(nursery, tmp_path, sections=SECTIONS)
        async with appliance.client() as client:
            assert (await client.get(PATH)).status_code == 404
        nursery.cancel_scope.cancel()

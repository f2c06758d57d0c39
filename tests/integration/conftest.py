"""Fixtures: an appliance per test, in the test's nursery, so that nothing leaks between tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.integration.appliance import RunningAppliance, start_appliance


@pytest.fixture
async def appliance(nursery: trio.Nursery, tmp_path: Path) -> RunningAppliance:
    return await start_appliance(nursery, tmp_path)

"""Options of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-seconds", type=float, default=60.0, help="how long the soak streams (default 60)"
    )


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    seconds: float = request.config.getoption("--soak-seconds")
    return seconds


@pytest.fixture(autouse=True)
def _structlog_as_it_was() -> Iterator[None]:
    """A test that sets the log up does so for the process: the next one finds it untouched."""
    yield
    structlog.reset_defaults()

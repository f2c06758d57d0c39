"""What is made of a request for the engine, and how long it is kept."""

from __future__ import annotations

import pytest

from appliance.serving.relay import prepare
from appliance.serving.workers import LARGE_BYTES
from appliance.wire.openai import Endpoint, forwarded_body, parse_request, plan_choices
from appliance.wire.receipt import forwarded_hash


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize(("size", "kept"), [(10, True), (LARGE_BYTES, False)])
def test_small_bodies_are_made_once_and_large_ones_are_not_kept(
    choices: int, size: int, kept: bool
) -> None:
    request = parse_request(
        Endpoint.COMPLETION, {"model": "m", "prompt": "é" * (size // 2), "n": choices}
    )
    plans = plan_choices(request, response_id="r", seed=1, cache_salt="s", max_choices=choices)
    made = prepare(request.body, plans)
    each = tuple(forwarded_body(request.body, plan) for plan in plans)
    assert made.body_hash == forwarded_hash(each)
    assert made.bodies == (each if kept else ())
    assert "é" not in repr(made)


def test_bodies_that_are_too_large_together_are_not_kept() -> None:
    request = parse_request(
        Endpoint.COMPLETION, {"model": "m", "prompt": "p" * (LARGE_BYTES // 2), "n": 2}
    )
    plans = plan_choices(request, response_id="r", seed=1, cache_salt="s", max_choices=2)
    assert prepare(request.body, plans).bodies == ()

"""Every declared parameter at its bounds, on the real SGLang: answered or refused, and the engine
goes on. A stand-in cannot show this; SGLang's scheduler dies of what it asserts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from serve import MODEL_ID

from appliance.wire.openai import NOT_TEMPLATE_VARIABLES, ChatRequest, CompletionRequest
from tests.engine.conftest import RealAppliance

pytestmark = pytest.mark.engine

VOCABULARY = 49_152
"""Of SmolLM2."""

BEYOND_INT32 = 2**31 - 1

SAMPLING: dict[str, list[Any]] = {
    "frequency_penalty": [-2, 2],
    "logit_bias": [
        {},
        {"0": -100},
        {str(VOCABULARY - 1): 100},
        {str(VOCABULARY): 1},
        {str(BEYOND_INT32): 1},
    ],
    "max_tokens": [1, BEYOND_INT32],
    "n": [1, 2],
    "presence_penalty": [-2, 2],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"schema": {"enum": [1, "a"]}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": 7}}},
        {"type": "json_schema", "json_schema": {"schema": {"pattern": "(" * 200}}},
    ],
    "seed": [0, 2**53 - 1],
    "stop": ["", "a", [], ["a"] * 4, ["é"] * 64],
    "stream": [False, True],
    "stream_options": [
        {"include_usage": True},
        {"continuous_usage_stats": True, "include_usage": True},
        {"include_obfuscation": False},
        {"include_receipt": True},
        {"include_checkpoints": True},
    ],
    "temperature": [0, 1e-300, 1e-5, 2],
    "top_p": [1e-300, 1e-9, 1],
    "metadata": [{}, {"a": "b"}],
    "prompt_cache_key": ["k"],
    "safety_identifier": ["s"],
    "service_tier": ["auto"],
    "store": [False, True],
    "user": ["u"],
    "top_k": [-1, 0, 1, BEYOND_INT32],
    "repetition_penalty": [1e-300, 1e-9, 2],
    "length_penalty": [0, -1e300],
    "early_stopping": [True],
    "min_p": [0, 1e-300, 1],
    "min_tokens": [0, 4, 9, BEYOND_INT32],
    "stop_token_ids": [
        [],
        [0, VOCABULARY - 1],
        [VOCABULARY],
        [BEYOND_INT32],
        list(range(64)),
    ],
    "no_stop_trim": [True],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "return_token_ids": [True],
    "tee": [False, True],
    "provider": [{}, {"aci_verified": True}],
}

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

CHAT: dict[str, list[Any]] = {
    "messages": [
        [{"role": "user", "content": ""}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                ],
            }
        ],
    ],
    "logprobs": [True],
    "top_logprobs": [0, 20],
    "max_completion_tokens": [1, BEYOND_INT32],
    "modalities": [["text"]],
    "parallel_tool_calls": [False],
    "reasoning_effort": ["none", "xhigh"],
    "tools": [[], [TOOL], [{"type": "function", "function": {"name": "f", "strict": True}}]],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "chat_template_kwargs": [
        {},
        {"enable_thinking": True, "x": {"y": [None]}, "": 1},
        *({name: value} for name in sorted(NOT_TEMPLATE_VARIABLES) for value in (True, "pt", [1])),
    ],
    "continue_final_message": [True],
    "separate_reasoning": [False],
    "stream_reasoning": [False],
}

COMPLETION: dict[str, list[Any]] = {
    "prompt": ["", "a", ["a", ""], [0], [VOCABULARY - 1], [VOCABULARY], [[1], [2]], [[]], []],
    "best_of": [1],
    "echo": [True],
    "logprobs": [0, 20],
    "suffix": ["", "x"],
}

TOGETHER: list[dict[str, Any]] = [
    {"min_tokens": 4, "stop_token_ids": [BEYOND_INT32]},  # the scheduler died of it
    {"min_tokens": 4, "stop_token_ids": [VOCABULARY - 1]},
    {"min_p": 0.1, "temperature": 1},  # and of it
    {"min_p": 0.1, "temperature": 0},
    {"min_tokens": 4, "ignore_eos": True, "stop": ["a"]},
    {"repetition_penalty": 1e-300, "temperature": 2, "top_k": 1, "frequency_penalty": -2},
    {"n": 2, "logit_bias": {"1": 100}, "stream": True, "tee": True},
    {"response_format": {"type": "json_object"}, "logit_bias": {"1": 100}},
    {"response_format": {"type": "json_object"}, "ignore_eos": True, "min_tokens": 4},
]

CONTRADICTORY = TOGETHER[-1:]
"""A grammar that is complete wants the text to end: where it comes to that, the engine fails this
request, and goes on."""


def bodies(
    base: dict[str, Any], edges: dict[str, list[Any]], more: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    single = [{key: value} for key, values in edges.items() for value in values]
    return [{**base, **changes} for changes in (*single, *more)]


CHAT_BODIES = bodies(
    {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    {**SAMPLING, **CHAT},
    TOGETHER,
)
COMPLETION_BODIES = bodies(
    {"model": MODEL_ID, "prompt": "Hi", "max_tokens": 4}, {**SAMPLING, **COMPLETION}, TOGETHER
)


def test_every_declared_parameter_is_asked() -> None:
    assert {"model", *SAMPLING, *CHAT} == set(ChatRequest.__struct_fields__)
    assert {"model", *SAMPLING, *COMPLETION} == set(CompletionRequest.__struct_fields__)


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/v1/chat/completions", CHAT_BODIES), ("/v1/completions", COMPLETION_BODIES)],
)
def test_no_value_of_any_parameter_ends_the_engine(
    real: RealAppliance, path: str, asked: list[dict[str, Any]]
) -> None:
    """Several at once, so that the engine also has them beside each other in one batch."""

    def ask(body: dict[str, Any]) -> str | None:
        try:
            answer = client.post(path, json=body)
        except httpx2.HTTPError as error:
            return f"{body}: {type(error).__name__}"
        ended_well = answer.status_code == 400 or (
            answer.status_code == 200 and '"error"' not in answer.text
        )
        if any(one.items() <= body.items() for one in CONTRADICTORY):
            ended_well = ended_well or "the engine failed on this request" in answer.text
        return None if ended_well else f"{body}: {answer.status_code} {answer.text[:300]}"

    with real.client() as client, ThreadPoolExecutor(4) as together:
        failed = [one for one in together.map(ask, asked) if one is not None]
        assert not failed, "\n".join(failed)
        assert client.get("/health").status_code == 200

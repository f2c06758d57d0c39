"""Several engine answers, put together as if there had been one."""

from __future__ import annotations

import pytest

from appliance.errors import Malformed
from appliance.wire.answers import ChunkMerger, error_object, merge_answers, merge_usage
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.openai import ChoicePlan


def plans(*prompt_indexes: int) -> list[ChoicePlan]:
    """One plan per choice; the arguments say which prompt each answers."""
    return [ChoicePlan(index, prompt, {}, ()) for index, prompt in enumerate(prompt_indexes)]


def usage(prompt: int, completion: int, **more: JsonValue) -> JsonObject:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **more,
    }


def answer(text: str, used: JsonValue = None, **more: JsonValue) -> JsonObject:
    choice: JsonObject = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return {"id": f"engine-{text}", "model": "m", "choices": [choice], "usage": used, **more}


def test_an_error_object_is_openais() -> None:
    assert error_object("no", type="server_error", param=None, code="engine_failed") == {
        "error": {"message": "no", "type": "server_error", "param": None, "code": "engine_failed"}
    }


# ------------------------------------------------------------------------------- whole answers


def test_answers_become_one_with_our_id_and_their_choices_by_index() -> None:
    merged = merge_answers(
        [answer("a", usage(3, 1)), answer("b", usage(3, 2))], plans(0, 0), response_id="chatcmpl-1"
    )
    assert merged == {
        "id": "chatcmpl-1",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
            {"index": 1, "message": {"content": "b"}, "finish_reason": "stop"},
        ],
        "usage": usage(3, 3),
    }


def test_usage_is_left_as_it_is_when_an_answer_lacks_it() -> None:
    merged = merge_answers([answer("a"), answer("b", usage(1, 1))], plans(0, 0), response_id="i")
    assert merged["usage"] is None


@pytest.mark.parametrize("choices", [None, "x", [], ["x"], [{}, {}], {"0": {}}])
def test_an_answer_without_exactly_one_choice_is_malformed(choices: JsonValue) -> None:
    with pytest.raises(Malformed, match="one choice") as caught:
        merge_answers([{"choices": choices}], plans(0), response_id="i")
    assert caught.value.field == "$.choices"


# --------------------------------------------------------------------------------------- usage


def test_tokens_of_a_prompt_count_once_however_many_choices_it_has() -> None:
    assert merge_usage([usage(5, 1), usage(5, 2), usage(5, 3)], plans(0, 0, 0)) == usage(5, 6)


def test_tokens_of_different_prompts_add_up() -> None:
    used = [usage(5, 1), usage(5, 2), usage(7, 3), usage(7, 4)]
    assert merge_usage(used, plans(0, 0, 1, 1)) == usage(12, 10)


def test_details_are_added_and_those_of_the_prompt_count_once() -> None:
    details: JsonObject = {"cached_tokens": 2, "audio": None}
    first = usage(5, 1, prompt_tokens_details=details, reasoning_tokens=1, note=None)
    second = usage(5, 2, prompt_tokens_details=details, reasoning_tokens=0, note=None)
    assert merge_usage([first, second], plans(0, 0)) == usage(
        5, 3, prompt_tokens_details=details, reasoning_tokens=1, note=None
    )


def test_details_that_only_some_answers_have_do_not_break_the_sum() -> None:
    first = usage(5, 1, completion_tokens_details=None)
    second = usage(5, 2, completion_tokens_details={"reasoning_tokens": 2})
    merged = merge_usage([first, second], plans(0, 0))
    assert merged["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_what_is_not_a_count_counts_nothing() -> None:
    used: list[JsonObject] = [{"completion_tokens": True, "odd": "x"}, {"completion_tokens": 2}]
    assert merge_usage(used, plans(0, 0)) == {"completion_tokens": 2, "odd": 0}


# -------------------------------------------------------------------------------------- chunks


def chunk(text: str, **more: JsonValue) -> JsonObject:
    return {"id": "engine", "choices": [{"index": 0, "delta": {"content": text}}], **more}


def test_chunks_pass_with_our_id_and_the_index_of_their_choice() -> None:
    first, second = plans(0, 0)
    merger = ChunkMerger([first, second], response_id="chatcmpl-1")
    assert merger.rewrite(chunk("b", created=7), second) == {
        "id": "chatcmpl-1",
        "created": 7,
        "choices": [{"index": 1, "delta": {"content": "b"}}],
    }
    assert merger.rewrite(chunk("a"), first) == {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "delta": {"content": "a"}}],
    }
    assert merger.usage_chunk() is None


def test_usage_chunks_are_kept_back_for_one_at_the_end() -> None:
    first, second = plans(0, 1)
    merger = ChunkMerger([first, second], response_id="chatcmpl-1")
    for plan, used in ((second, usage(7, 2)), (first, usage(5, 1))):
        assert merger.rewrite({"id": "engine", "choices": [], "usage": used}, plan) is None
    assert merger.usage_chunk() == {"id": "chatcmpl-1", "choices": [], "usage": usage(12, 3)}


def test_no_usage_is_told_while_a_choice_has_told_none() -> None:
    first, second = plans(0, 0)
    merger = ChunkMerger([first, second], response_id="chatcmpl-1")
    merger.rewrite({"choices": [], "usage": usage(5, 1)}, first)
    assert merger.rewrite({"choices": [], "usage": None}, second) is None
    assert merger.usage_chunk() is None


@pytest.mark.parametrize("event", [{}, {"choices": None}, {"choices": {}}, {"choices": "x"}])
def test_a_chunk_without_a_list_of_choices_is_malformed(event: JsonObject) -> None:
    (plan,) = plans(0)
    with pytest.raises(Malformed, match="a chunk with choices"):
        ChunkMerger([plan], response_id="i").rewrite(event, plan)

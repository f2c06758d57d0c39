"""OpenAI's answers: the error object, and one answer made of several engine answers.

Where a client asks for several choices, each comes from an engine request of its own
(`wire.openai.plan_choices`). These functions put them together again, by index, as if the engine
had answered once.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.openai import ChoicePlan


def error_object(message: str, *, type: str, param: str | None, code: str) -> JsonObject:
    """OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def merge_answers(
    answers: Sequence[JsonObject], plans: Sequence[ChoicePlan], *, response_id: str
) -> JsonObject:
    """One answer from one answer per choice, in plan order.

    Raises:
        Malformed: an answer is not shaped as one with exactly one choice.
    """
    choices: list[JsonValue] = [
        {**_only_choice(answer), "index": plan.index}
        for answer, plan in zip(answers, plans, strict=True)
    ]
    merged = {**answers[0], "id": response_id, "choices": choices}
    if usages := _usages(answers):
        merged["usage"] = merge_usage(usages, plans)
    return merged


class ChunkMerger:
    """Rewrites the chunks of several engine streams into those of one.

    Chunks pass in arrival order with the choice's index and the common id. Usage chunks (those
    without choices) are kept back: one for all follows at the end.
    """

    def __init__(self, plans: Sequence[ChoicePlan], *, response_id: str) -> None:
        self._plans = plans
        self._response_id = response_id
        self._usages: dict[int, JsonObject] = {}
        self._template: JsonObject | None = None

    def rewrite(self, chunk: JsonObject, plan: ChoicePlan) -> JsonObject | None:
        """The chunk as the client sees it, or None when it is kept back.

        Raises:
            Malformed: the chunk has no list of choices.
        """
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise Malformed("expected a chunk with choices", field="$.choices")
        usage = chunk.get("usage")
        if not choices:
            self._template = chunk
            if isinstance(usage, dict):
                self._usages[plan.index] = usage
            return None
        renumbered: list[JsonValue] = [
            {**choice, "index": plan.index} for choice in choices if isinstance(choice, dict)
        ]
        return {**chunk, "id": self._response_id, "choices": renumbered}

    def usage_chunk(self) -> JsonObject | None:
        """The one usage chunk for all choices; None when the engine sent none."""
        if self._template is None or len(self._usages) != len(self._plans):
            return None
        usages = [self._usages[plan.index] for plan in self._plans]
        return {
            **self._template,
            "id": self._response_id,
            "usage": merge_usage(usages, self._plans),
        }


def merge_usage(usages: Sequence[JsonObject], plans: Sequence[ChoicePlan]) -> JsonObject:
    """Token counts of all choices: what belongs to a prompt counts once per prompt."""
    first_of_prompt: dict[int, JsonObject] = {}
    for usage, plan in zip(usages, plans, strict=True):
        first_of_prompt.setdefault(plan.prompt_index, usage)
    merged: JsonObject = {}
    for key, example in usages[0].items():
        counted = list(first_of_prompt.values()) if key.startswith("prompt") else usages
        merged[key] = _sum_key(counted, key) if key != "total_tokens" else example
    if "total_tokens" in merged:
        merged["total_tokens"] = _number(merged.get("prompt_tokens")) + _number(
            merged.get("completion_tokens")
        )
    return merged


def _sum_key(usages: Sequence[JsonObject], key: str) -> JsonValue:
    values = [usage.get(key) for usage in usages]
    if all(value is None for value in values):
        return None
    nested = [value for value in values if isinstance(value, dict)]
    if nested:
        return {inner: _sum_key(nested, inner) for inner in nested[0]}
    return sum(_number(value) for value in values)


def _number(value: JsonValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _only_choice(answer: JsonObject) -> JsonObject:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed("expected an answer with one choice", field="$.choices")
    return choices[0]


def _usages(answers: Sequence[JsonObject]) -> list[JsonObject]:
    usages = [usage for answer in answers if isinstance(usage := answer.get("usage"), dict)]
    return usages if len(usages) == len(answers) else []

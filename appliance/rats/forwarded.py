"""What the engine got, out of what was asked: the rewrites of a receipt held to the published rules.

    request ── parse_request ── plan_choices ── rewrites ── forwarded bytes ── body_hash
                                     └── id, seed and salt as the receipt has them

The rules are those of protocol.md section 4, and they are `wire.openai`'s: what the gateway plans
with, this plans with again. So a rewrite can say nothing that the gateway could not: other messages,
another model or another temperature are in none.
"""

from __future__ import annotations

from appliance.errors import Malformed, RequestError, Unbound
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.encoding import format_sha256
from appliance.wire.openai import (
    FORWARDED_STREAM_OPTIONS,
    Endpoint,
    InferenceRequest,
    choice_changes,
    forwarded_bodies,
    parse_body,
    parse_request,
    plan_choices,
)
from appliance.wire.receipt import (
    MAX_BODY_NESTING,
    MAX_REWRITES,
    NO_SEED,
    EngineUsed,
    Rewrite,
    forwarded_hash,
    rewrite_of,
)

NEEDED = frozenset({"model", "messages", "prompt"})
"""Members that no request is without; the engine gets them."""

NEEDED_FOR_EMBEDDINGS = frozenset({"model", "input"})

WHAT = "dcv.engine.rewrite"


def read_request(request: bytes, endpoint: Endpoint) -> InferenceRequest:
    """A request that was forwarded, understood as the gateway understood it.

    Keys that are not known here pass: the measured configuration may add some, and they change
    nothing of a rewrite but whether they are null.

    Raises:
        Unbound: the gateway forwards no such request.
    """
    try:
        body = parse_body(request, max_nesting=MAX_BODY_NESTING)
        return parse_request(endpoint, body, extra_keys=body)
    except (Malformed, RequestError) as error:
        raise Unbound(f"request.forwarded: such a request is not: {error.message}") from None


def check_rewrites(engine: EngineUsed, endpoint: Endpoint, response_id: str) -> None:
    """The rewrites are of the form that the rules give them, whatever the request was: these keys,
    in these places, one seed after the other.

    Args:
        response_id: the answer's `id`, which the receipt has as `chat_id`.

    Raises:
        Unbound: one is not.
    """
    if endpoint is Endpoint.EMBEDDINGS:
        _check_embeddings_rewrite(engine)
        return
    count, first = len(engine.rewrite), engine.rewrite[0]
    prompts = _prompts(engine.rewrite, endpoint)
    salt, options = first.set.get("cache_salt"), first.set.get("stream_options")
    if not isinstance(salt, str):
        raise Unbound(f"{WHAT}[0].set.cache_salt: expected a text")
    if "stream_options" in first.set and not _are_stream_options(options):
        raise Unbound(f"{WHAT}[0].set.stream_options: expected what the engine may get of them")
    for index, one in enumerate(engine.rewrite):
        expected = choice_changes(
            index,
            count=count,
            choices_per_prompt=count // prompts,
            response_id=response_id,
            seed=engine.seed,
            cache_salt=salt,
            stream_options=options if isinstance(options, dict) else None,
        )
        _check_set(f"{WHAT}[{index}].set", expected, dict(one.set))
        if one.unset != first.unset or list(one.unset) != sorted(set(one.unset) - NEEDED):
            raise Unbound(
                f"{WHAT}[{index}].unset: expected sorted keys, the same in each, and none of "
                f"{', '.join(sorted(NEEDED))}"
            )


def _check_embeddings_rewrite(engine: EngineUsed) -> None:
    """One engine request, in which nothing is set: no seed, no id and no salt."""
    one = engine.rewrite[0]
    if len(engine.rewrite) != 1 or one.set or one.prompt_index is not None:
        raise Unbound(f"{WHAT}: expected one for embeddings, which sets nothing")
    if list(one.unset) != sorted(set(one.unset) - NEEDED_FOR_EMBEDDINGS):
        needed = ", ".join(sorted(NEEDED_FOR_EMBEDDINGS))
        raise Unbound(f"{WHAT}[0].unset: expected sorted keys, and none of {needed}")
    if engine.seed != NO_SEED:
        raise Unbound(f"dcv.engine.seed: expected {NO_SEED} for embeddings, got {engine.seed}")


def check_forwarded(
    wanted: InferenceRequest, engine: EngineUsed, response_id: str, body_hash: bytes
) -> None:
    """The rewrites are those that the gateway makes of this request, and the engine got what they
    lead to. The request was parsed once, and what its choices share is put in canonical form once.

    Args:
        engine: `check_rewrites` has passed.
        body_hash: of `request.forwarded`, 32 bytes.

    Raises:
        Unbound: it is not so.
    """
    choices = wanted.choices_per_prompt * len(wanted.prompts)
    if choices != len(engine.rewrite):  # before anything is made for each of them
        raise Unbound(f"{WHAT}: expected {choices}, one per choice, got {len(engine.rewrite)}")
    if wanted.endpoint is Endpoint.EMBEDDINGS:
        salt = ""  # there is none, see `_check_embeddings_rewrite`
    else:
        salt = str(engine.rewrite[0].set["cache_salt"])
    if wanted.seed is not None and wanted.seed != engine.seed:
        raise Unbound(f"dcv.engine.seed: expected the client's {wanted.seed}, got {engine.seed}")
    plans = plan_choices(
        wanted,
        response_id=response_id,
        seed=engine.seed,
        cache_salt=salt,
        max_choices=MAX_REWRITES,
    )
    for index, (plan, got) in enumerate(zip(plans, engine.rewrite, strict=True)):
        expected, where = rewrite_of(plan), f"{WHAT}[{index}]"
        _check_set(f"{where}.set", dict(expected.set), dict(got.set))
        for name, right, told in (
            ("unset", list(expected.unset), list(got.unset)),
            ("prompt_index", expected.prompt_index, got.prompt_index),
        ):
            if right != told:
                raise Unbound(f"{where}.{name}: expected {right}, got {told}")
    made = forwarded_hash(forwarded_bodies(wanted.body, plans))
    if made != body_hash:
        raise Unbound(
            f"request.forwarded.body_hash: expected {format_sha256(made)}, "
            f"got {format_sha256(body_hash)}"
        )


def _prompts(rewrites: tuple[Rewrite, ...], endpoint: Endpoint) -> int:
    """How many prompts there were, from how the rewrites name them."""
    named = [one.prompt_index for one in rewrites]
    count, right = 1, list[int | None]([None] * len(named))
    if endpoint is Endpoint.COMPLETION and named[0] is not None:
        count = (named[-1] or 0) + 1
        each = max(len(named) // count, 1)
        right = [index // each for index in range(len(named))]
    if named != right or len(named) % count:
        raise Unbound(f"{WHAT}: expected as many choices of each prompt, in the prompts' order")
    return count


def _are_stream_options(options: JsonValue) -> bool:
    return isinstance(options, dict) and all(
        name in FORWARDED_STREAM_OPTIONS and isinstance(value, bool)
        for name, value in options.items()
    )


def _check_set(where: str, expected: JsonObject, got: JsonObject) -> None:
    for name in sorted({*expected, *got}):
        # By their bytes, because Python takes true for 1.
        if (name in expected) != (name in got) or (
            canonical_json(expected[name]) != canonical_json(got[name])
        ):
            raise Unbound(f"{where}.{name[:64]}: expected as the published rewrite rules have it")

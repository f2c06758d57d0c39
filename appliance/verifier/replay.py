"""`dcv replay BUNDLE --against URL`: the same request, asked of another appliance, again.

    bundle with its request ── steps 2 to 10, offline ──┐
    the other appliance ── steps 1 to 9 ────────────────┴── same weights, same settings?
        └── asked again with the recorded seed, over the TLS key that was verified
              └── step 10 on the new answer ── the two output digests ── one word

*reproduced*: both answers say the same. *differs*: they do not, and where, if the first answer's
bytes are in the bundle. *not comparable*: nobody promised that they would, and why. The texts
themselves are never printed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import secrets
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import httpx2
import trio
from rich.console import Console
from rich.text import Text

from appliance.errors import (
    ApplianceError,
    EvidenceError,
    Malformed,
    NotComparable,
    VerificationIncomplete,
)
from appliance.rats.exchange import output_of_response
from appliance.rats.result import SEVERITY, Tier
from appliance.verifier.answers import Answered, collect_exchange, is_receipt_id
from appliance.verifier.arguments import add_json, add_rules, add_time, credential
from appliance.verifier.bundle import MAX_CONTENT_BYTES, Bundle, parse_bundle
from appliance.verifier.check import Rules, fetch, load_rules
from appliance.verifier.raw_evidence import parse_time
from appliance.verifier.render import STYLES
from appliance.verifier.session import pinned_client
from appliance.verifier.verdict import EXIT_NOT_CHECKED, Outcome, Problem
from appliance.verifier.verify_command import (
    NONCE_BYTES,
    outcome_of,
    read_bundle_file,
    save,
    source_of,
    time_of,
)
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.encoding import format_sha256
from appliance.wire.openai import Endpoint, endpoint_of
from appliance.wire.output import Output
from appliance.wire.receipt import MAX_BODY_NESTING, EventLog, read_events

Result = Literal["reproduced", "differs", "not_comparable"]
Form = Literal["recorded", "stream", "whole"]

GENERATION_S = 3600.0
"""For all of an answer. A whole one is silent until its end, so also between two parts of one; the
appliance bounds it with [limits] generation_s."""

EXIT_STATUS = (
    "Exit status: 0 reproduced, 1 differs, 2 not comparable or could not be checked, 3 reproduced "
    "with reservations about an appliance, such as reference values that were not given."
)
EXIT_DIFFERS = 1

COMPARED = (
    # section and member of the workload manifest, the telling ones first
    ("model", "digest"),
    ("model", "tokenizer_digest"),
    ("model", "chat_template_digest"),
    ("model", "id"),
    ("engine", "name"),
    ("engine", "version"),
    ("engine", "dtype"),
    ("engine", "random_seed"),
    ("engine", "deterministic"),
    ("engine", "settings_digest"),
)
"""What an answer follows from. `image` and `policy_digest` may differ: another release of the
appliance hands the same request to the same engine, and the forwarded bytes are in both receipts."""

NOT_REPEATED = frozenset({"stream", "stream_options", "tee", "provider"})
"""Members of a request that say how it is answered, not what."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two answers part; it quotes neither.

    Attributes:
        choice: its index; None where the number of choices differs.
        member: of the choice, such as `text`, `message.content` or `finish_reason`.
        character: of that text, counted from 1; None where it is no text. One more than the
            shorter text has where the longer begins with it.
    """

    choice: int | None
    member: str
    character: int | None

    def __str__(self) -> str:
        if self.choice is None:
            return "in the number of choices"
        if self.character is None:
            return f"in {self.member} of choice {self.choice}"
        return f"at character {self.character} of choice {self.choice} ({self.member})"

    def to_json(self) -> JsonObject:
        """As `--json` has it."""
        return {"choice": self.choice, "member": self.member, "character": self.character}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two answers.

    Attributes:
        output_digest: 32 bytes.
        verdict: on its appliance and its receipt.
    """

    url: str
    receipt_id: str
    served_at: datetime.datetime
    output_digest: bytes
    verdict: Tier

    def to_json(self) -> JsonObject:
        """As `--json` has it."""
        return {
            "url": self.url,
            "receipt_id": self.receipt_id,
            "served_at": _time(self.served_at),
            "output_digest": format_sha256(self.output_digest),
            "verdict": self.verdict.value,
        }


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it.

    Attributes:
        result: None where it could not be checked; `error` says why, also for `not_comparable`.
        seed: the recorded one, of choice 0.
        difference: where the answers part; None where they do not, or the first one's bytes are
            not at hand.
    """

    result: Result | None
    error: Problem | None = None
    seed: int | None = None
    original: Side | None = None
    again: Side | None = None
    difference: Difference | None = None

    @property
    def exit_status(self) -> int:
        """As `EXIT_STATUS` says."""
        if self.result == "differs":
            return EXIT_DIFFERS
        if self.result != "reproduced" or self.original is None or self.again is None:
            return EXIT_NOT_CHECKED
        worst = max(self.original.verdict, self.again.verdict, key=SEVERITY.__getitem__)
        return Outcome(worst).exit_status

    def to_json(self) -> JsonObject:
        """The stable form."""
        error: JsonObject | None = None
        if self.error is not None:
            error = {"code": self.error.code, "message": self.error.message}
        return {
            "result": self.result,
            "error": error,
            "difference": None if self.difference is None else self.difference.to_json(),
            "seed": None if self.seed is None else str(self.seed),
            "original": None if self.original is None else self.original.to_json(),
            "replay": None if self.again is None else self.again.to_json(),
        }


def add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay`."""
    command = commands.add_parser(
        "replay",
        help="ask another appliance the same again, and compare",
        description="Verify a bundle that was saved with its content, verify another appliance "
        "with the same weights and engine settings, ask it the same request with the recorded "
        "seed, and compare what both answers say.",
        epilog=EXIT_STATUS,
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="`dcv chat --save` made it")
    command.add_argument(
        "--against", required=True, metavar="URL", help="https://HOST:8443, who is asked again"
    )
    add_rules(command)
    for option, text in (
        ("--request", "the body that was sent, where the bundle was saved without content"),
        ("--api-key-file", "holds the API key and nothing else"),
    ):
        command.add_argument(option, type=Path, metavar="FILE", help=text)
    command.add_argument(
        "--as",
        dest="form",
        choices=("recorded", "stream", "whole"),
        default="recorded",
        help="whether the new answer is streamed; it must not matter (default: as the first was)",
    )
    add_time(command, default="when the answer in the bundle was served, by the appliance's word")
    command.add_argument(
        "--save", type=Path, metavar="BUNDLE", help="keep the new answer, with its content"
    )
    add_json(command)
    command.set_defaults(command=replay_command)


def replay_command(arguments: argparse.Namespace) -> int:
    """`dcv replay`: prints the result and returns its exit status."""
    try:
        replayed = trio.run(_replay, arguments)
    except ApplianceError as error:
        result: Result | None = "not_comparable" if isinstance(error, NotComparable) else None
        replayed = Replayed(result, Problem(error.code, error.message, error.advice))
    if arguments.json:
        sys.stdout.write(json.dumps(replayed.to_json(), indent=2) + "\n")
    else:
        _render(replayed, Console(highlight=False, markup=False, emoji=False))
    return replayed.exit_status


async def _replay(arguments: argparse.Namespace) -> Replayed:
    rules = load_rules(arguments.policy, arguments.reference)
    headers = {} if arguments.api_key_file is None else credential(arguments.api_key_file)
    original = _with_request(parse_bundle(read_bundle_file(arguments.bundle)), arguments.request)

    def keep(bundle: Bundle) -> None:
        if arguments.save is not None:
            save(arguments.save, bundle)

    return await replay(
        original,
        arguments.against,
        rules,
        at=None if arguments.at is None else parse_time(arguments.at, option="--at"),
        headers=headers,
        form=arguments.form,
        keep=keep,
    )


async def replay(
    original: Bundle,
    url: str,
    rules: Rules,
    *,
    at: datetime.datetime | None = None,
    headers: Mapping[str, str] | None = None,
    form: Form = "recorded",
    keep: Callable[[Bundle], None] | None = None,
) -> Replayed:
    """Ask the appliance at `url` what `original` records, and compare.

    Args:
        at: as of when the bundle is judged; None for when its answer was served, by the
            appliance's word.
        headers: sent with the request, such as the credential.
        form: whether the new answer is streamed.
        keep: is given the new answer's bundle before that is checked.

    Raises:
        NotComparable: nobody promised that both answers say the same.
        VerificationIncomplete, Malformed, Unbound: it could not be checked.
    """
    # 1. The bundle holds, or there is nothing to reproduce.
    source = source_of(original) if at is None else "--at"
    first = _trusted("the bundle", original, rules, at=at or time_of(original), source=source)
    # 2. Its receipt promises that the answer can be had again, and its request is here.
    recorded = read_recorded(original)
    # 3. The other appliance holds. Nothing is sent to one that does not.
    now = datetime.datetime.now(datetime.UTC)
    other = await fetch(url, secrets.token_bytes(NONCE_BYTES), now=now)
    _trusted("the other appliance", other, rules, at=now, source="clock")
    # 4. It has the same weights and settings.
    require_same_workload(original.report.workload, other.report.workload)
    # 5. Asked again, with the seed that was effective.
    other = await _ask_again(other, request_again(recorded, form), recorded.endpoint, headers or {})
    if keep is not None:
        keep(other)
    # 6. The new answer holds as well.
    now = datetime.datetime.now(datetime.UTC)
    second = _trusted("the new answer", other, rules, at=now, source="clock")
    # 7. What both say.
    return _compare(recorded, _side(original, first), _side(other, second), _output(other))


def _with_request(bundle: Bundle, path: Path | None) -> Bundle:
    """The bundle, with the request from a file in it.

    Raises:
        VerificationIncomplete: there is no answer in it, or this is not what was asked.
    """
    if bundle.exchange is None:
        raise VerificationIncomplete("expected a bundle with an answer's receipt in it")
    if path is None:
        return bundle
    data = read_bundle_file(path)
    if len(data) > MAX_CONTENT_BYTES:
        raise VerificationIncomplete(f"--request: expected at most {MAX_CONTENT_BYTES} bytes")
    expected = read_events(bundle.exchange.receipt).received.body_hash
    if hashlib.sha256(data).digest() != expected:
        raise VerificationIncomplete(
            f"--request: expected the bytes with the digest {format_sha256(expected)}"
        )
    return replace(bundle, exchange=replace(bundle.exchange, request=data))


def _trusted(
    what: str, bundle: Bundle, rules: Rules, *, at: datetime.datetime, source: str
) -> Tier:
    """The verdict on a bundle.

    Raises:
        NotComparable: it is contraindicated.
    """
    try:
        outcome = outcome_of(bundle, rules, at=at, source=source)
    except (EvidenceError, Malformed) as error:
        raise NotComparable(f"{what} is contraindicated: {error.message}") from error
    if outcome.verdict not in (Tier.AFFIRMING, Tier.WARNING):
        worst = [
            str(one.finding) for one in outcome.findings if one.finding.tier is Tier.CONTRAINDICATED
        ]
        raise NotComparable(f"{what} is contraindicated: {'; '.join(worst)}")
    return outcome.verdict


@dataclass(frozen=True, slots=True, repr=False)
class Recorded:
    """What a verified bundle says of its exchange.

    Attributes:
        request: the body that was sent.
        seed: the effective one of choice 0; choice i has (seed + i) mod 2^53.
        output_digest: 32 bytes.
        output: what the answer says, where its bytes are at hand.
    """

    endpoint: Endpoint
    request: JsonObject
    seed: int
    output_digest: bytes
    output: Output | None


def read_recorded(bundle: Bundle) -> Recorded:
    """What is to be asked again.

    Raises:
        NotComparable: its receipt does not promise that the answer can be had again.
        VerificationIncomplete: the request is not at hand.
        Malformed: it is none.
    """
    assert bundle.exchange is not None
    exchange = bundle.exchange
    log = read_events(exchange.receipt)
    endpoint = _endpoint(exchange.receipt.endpoint)
    digest = _promised(log)
    assert log.engine is not None  # no output without it
    if exchange.request is None:
        raise VerificationIncomplete(
            "expected the request: save the bundle with --with-content, or give --request FILE"
        )
    return Recorded(
        endpoint=endpoint,
        request=parse_json_object(exchange.request, max_nesting=MAX_BODY_NESTING),
        seed=log.engine.seed,
        output_digest=digest,
        output=_output(bundle),
    )


def _promised(log: EventLog) -> bytes:
    """The output digest of an answer that is whole and was promised to be had again."""
    if log.ended.outcome != "complete" or log.engine is None:
        raise NotComparable(f"dcv.ended.outcome: expected complete, got {log.ended.outcome}")
    if not log.engine.deterministic:
        raise NotComparable("dcv.engine.deterministic: expected true, got false")
    if log.output is None or log.output.output_digest is None:
        raise NotComparable("dcv.output.output_digest: expected one, got none")
    return log.output.output_digest


def _endpoint(path: str) -> Endpoint:
    """What is served there.

    Raises:
        NotComparable: nothing with an output digest to compare.
    """
    endpoint = endpoint_of(path)
    if endpoint is Endpoint.EMBEDDINGS:
        raise NotComparable(
            "dcv.output.output_digest: embeddings have none, their receipt binds bytes and "
            "promises no vectors"
        )
    if endpoint is None:
        raise NotComparable("endpoint: expected one that generates text")
    return endpoint


def require_same_workload(original: JsonObject, other: JsonObject) -> None:
    """What an answer follows from is the same in both manifests.

    Raises:
        NotComparable: it names the first member that differs.
    """
    for section, member in COMPARED:
        expected, got = (_member(one, section, member) for one in (original, other))
        if expected != got:
            raise NotComparable(f"{section}.{member}: expected {_word(expected)}, got {_word(got)}")


def _member(manifest: JsonObject, section: str, member: str) -> JsonValue:
    part = manifest.get(section)
    return part.get(member) if isinstance(part, dict) else None


def _word(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def request_again(recorded: Recorded, form: Form) -> bytes:
    """The body to send: what was asked, with the seed that was effective.

    Args:
        form: whether the answer is streamed.
    """
    body = {name: value for name, value in recorded.request.items() if name not in NOT_REPEATED}
    streams = {"recorded": recorded.request.get("stream") is True, "stream": True, "whole": False}
    if streams[form]:
        body["stream"] = True
    return canonical_json({**body, "seed": recorded.seed})


async def _ask_again(
    other: Bundle, body: bytes, endpoint: Endpoint, headers: Mapping[str, str]
) -> Bundle:
    """The other appliance's bundle, with the new answer in it.

    Raises:
        Unbound: the connection ends at another TLS key; nothing was sent.
        VerificationIncomplete: it does not answer, breaks off, or gives no receipt.
    """
    assert other.spki_sha256 is not None
    try:
        async with pinned_client(other.url, (other.spki_sha256,), read_s=GENERATION_S) as client:
            client.headers.update(headers)
            answered, whole = await ask(client, endpoint.value, body)
            other = await collect_exchange(client, other, answered, body)
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise VerificationIncomplete(f"cannot ask {other.url}: {reason}") from error
    if not whole:  # held to its receipt it would be called forged, where only a connection broke
        raise _no_answer(other)
    return other


async def ask(client: httpx2.AsyncClient, path: str, body: bytes) -> tuple[Answered, bool]:
    """What came, and whether that is all of it.

    Raises:
        VerificationIncomplete: it is not there in time, too large, or without a receipt.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    content, whole = bytearray(), True
    headers = {"Content-Type": "application/json", "X-DCV-Nonce": nonce.hex()}
    with trio.move_on_after(GENERATION_S) as in_time:
        async with client.stream("POST", path, content=body, headers=headers) as response:
            try:
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_CONTENT_BYTES:
                        raise VerificationIncomplete(
                            f"expected an answer of at most {MAX_CONTENT_BYTES} bytes"
                        )
            except httpx2.HTTPError:
                whole = False
    if in_time.cancelled_caught:
        raise VerificationIncomplete(f"expected the whole answer within {GENERATION_S:g} s")
    receipt_id = response.headers.get("X-Receipt-Id", "")
    if not is_receipt_id(receipt_id):
        raise VerificationIncomplete(
            f"expected an answer with a receipt, got HTTP {response.status_code} without one"
        )
    return Answered(receipt_id, nonce, bytes(content)), whole


def _no_answer(bundle: Bundle) -> VerificationIncomplete:
    """With the reason that the receipt gives."""
    assert bundle.exchange is not None
    ended = read_events(bundle.exchange.receipt).ended
    code = "" if ended.code is None else f" ({ended.code})"
    return VerificationIncomplete(
        f"expected a whole answer from {bundle.url}, got one that ended otherwise: "
        f"{ended.outcome}{code} by its receipt"
    )


def _side(bundle: Bundle, verdict: Tier) -> Side:
    """Of a verified bundle with a complete answer.

    Raises:
        VerificationIncomplete: the answer is not complete.
    """
    assert bundle.exchange is not None
    receipt = bundle.exchange.receipt
    log = read_events(receipt)
    if log.ended.outcome != "complete" or log.output is None or log.output.output_digest is None:
        raise _no_answer(bundle)
    return Side(
        url=bundle.url,
        receipt_id=receipt.receipt_id,
        served_at=time_of(bundle),
        output_digest=log.output.output_digest,
        verdict=verdict,
    )


def _output(bundle: Bundle) -> Output | None:
    assert bundle.exchange is not None
    response = bundle.exchange.response
    return None if response is None else output_of_response(response)


def _compare(recorded: Recorded, original: Side, again: Side, output: Output | None) -> Replayed:
    same = original.output_digest == again.output_digest
    difference = None
    if not same and recorded.output is not None and output is not None:
        difference = first_difference(recorded.output, output)
    return Replayed(
        "reproduced" if same else "differs",
        seed=recorded.seed,
        original=original,
        again=again,
        difference=difference,
    )


def first_difference(first: Output, second: Output) -> Difference | None:
    """Where two answers part; None where they say the same."""
    if len(first.choices) != len(second.choices):
        return Difference(None, "choices", None)
    for index, (one, other) in enumerate(zip(first.choices, second.choices, strict=True)):
        if found := _part(one, other, index, ""):
            return found
    return None


TEXTS_FIRST = ("reasoning_content", "content", "refusal", "text", "message", "tool_calls")
"""In the order in which a model writes them; `finish_reason` follows from them."""


def _part(one: JsonObject, other: JsonObject, choice: int, where: str) -> Difference | None:
    names = sorted(one.keys() | other.keys(), key=_place)
    for name in names:
        left, right = one.get(name), other.get(name)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            return _part(left, right, choice, f"{where}{name}.")
        if name in TEXTS_FIRST and isinstance(left or "", str) and isinstance(right or "", str):
            return Difference(choice, where + name, _character(str(left or ""), str(right or "")))
        return Difference(choice, where + name, None)
    return None


def _place(name: str) -> tuple[int, str]:
    return (TEXTS_FIRST.index(name) if name in TEXTS_FIRST else len(TEXTS_FIRST), name)


def _character(one: str, other: str) -> int:
    """The first that differs, counted from 1."""
    pairs = enumerate(zip_longest(one, other), start=1)
    return next(number for number, (left, right) in pairs if left != right)


def _render(replayed: Replayed, console: Console) -> None:
    """At one glance: the word, why or where, and which two answers."""
    word = "could not be checked" if replayed.result is None else replayed.result.replace("_", " ")
    styles = {"reproduced": STYLES[Tier.AFFIRMING], "differs": STYLES[Tier.CONTRAINDICATED]}
    line = Text(word.upper(), style=styles.get(word, STYLES[None]))
    if replayed.exit_status == Outcome(Tier.WARNING).exit_status:
        line = Text(word.upper(), style=STYLES[Tier.WARNING])
    console.print(line.append(f"  {_printable(_why(replayed))}", style="not bold default"))
    rows = [("seed", str(replayed.seed))] if replayed.seed is not None else []
    for name, side in (("original", replayed.original), ("replay", replayed.again)):
        if side is None:
            continue
        rows += [
            (name, f"{side.url}, receipt {side.receipt_id}, {_time(side.served_at)}"),
            ("", f"{side.verdict.value}, output {format_sha256(side.output_digest)}"),
        ]
    if replayed.error is not None:
        rows.append(("what to do", replayed.error.advice))
    for name, value in rows:
        console.print(Text(f"  {name:<10} {_printable(value)}"), soft_wrap=True)


def _why(replayed: Replayed) -> str:
    if replayed.error is not None:
        return replayed.error.message
    if replayed.result == "differs":
        return "" if replayed.difference is None else str(replayed.difference)
    warned = replayed.exit_status == Outcome(Tier.WARNING).exit_status
    reservations = "; with reservations about the evidence: `dcv verify`" if warned else ""
    return f"both answers say the same{reservations}"


def _time(when: datetime.datetime) -> str:
    return f"{when:%Y-%m-%dT%H:%M:%SZ}"


def _printable(text: str) -> str:
    """Control characters as escapes: an appliance's words must not drive the terminal."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)

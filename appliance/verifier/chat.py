"""`dcv chat URL PROMPT`: verify, ask, verify what was answered.

    report, fresh nonce ── steps 2 to 9 ── only then the prompt, over the same TLS key
        └── the answer to standard output as it comes
              └── receipt, its epochs, its keyset's report ── step 10 ── the verdict line

What is shown while it streams is not verified yet: nobody can, before its last byte. The exit
status is the verdict on all of it. The verdict goes to standard error, so that the answer alone
can be handed on.
"""

from __future__ import annotations

import argparse
import datetime
import secrets
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx2
import msgspec
import trio
from msgspec import Struct
from rich.console import Console
from rich.text import Text

from appliance.errors import ApplianceError, Malformed, VerificationIncomplete
from appliance.rats.result import Tier
from appliance.verifier.answers import Answered, collect_exchange, is_receipt_id
from appliance.verifier.arguments import EXIT_STATUS, add_rules, credential
from appliance.verifier.bundle import MAX_CONTENT_BYTES, Bundle
from appliance.verifier.check import Rules, fetch, load_rules
from appliance.verifier.fetching import reason
from appliance.verifier.render import render
from appliance.verifier.session import pinned_client
from appliance.verifier.verdict import Outcome, of_error
from appliance.verifier.verify_command import NONCE_BYTES, outcome_of, save
from appliance.wire.canonical import canonical_json

CHAT_PATH = "/v1/chat/completions"

READ_S = 120.0
"""Between two parts of an answer; the appliance sends heartbeats in between."""

ANSWER_S = 600.0
"""For all of an answer, however slowly it comes, unless `--within` says otherwise."""

MAX_ANSWER_S = 24 * 3600.0
MAX_EVENT_BYTES = 4 << 20
"""Of an answer, as the appliance bounds its engine's; what is not whole yet is kept to be printed."""

MAX_PROMPT_BYTES = 4 << 20


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `chat`."""
    chat = commands.add_parser(
        "chat",
        help="ask a verified appliance, and verify its answer",
        description="Verify an appliance, and only then send it a prompt, over the TLS key that was "
        "verified. The answer goes to standard output as it comes, the verdict on it to standard "
        "error.",
        epilog=EXIT_STATUS,
    )
    chat.add_argument("url", metavar="URL", help="https://HOST:8443")
    chat.add_argument("prompt", metavar="PROMPT", help="what to ask; `-`: from standard input")
    add_rules(chat)
    chat.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="holds the API key and nothing else"
    )
    chat.add_argument("--model", metavar="ID", help="default: the one that the evidence proves")
    chat.add_argument(
        "--within",
        type=_seconds,
        default=ANSWER_S,
        metavar="SECONDS",
        help="for the whole answer, from the prompt to its last byte; what is not whole by then is "
        "given up as not checked; default: %(default)g",
    )
    chat.add_argument(
        "--save", type=Path, metavar="BUNDLE", help="keep what was fetched, to verify it again"
    )
    chat.add_argument(
        "--with-content",
        action="store_true",
        help="keep the prompt and the answer in the bundle too",
    )
    chat.set_defaults(command=chat_command)


def chat_command(arguments: argparse.Namespace) -> int:
    """`dcv chat`: prints answer and verdict, and returns the verdict's exit status."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    try:
        outcome = _chat(arguments, console)
    except ApplianceError as error:
        outcome = of_error(error)
    if outcome.verdict in (Tier.AFFIRMING, Tier.WARNING):
        console.print(_verdict_line(outcome), soft_wrap=True)
    else:
        render(outcome, console)
    return outcome.exit_status


def _chat(arguments: argparse.Namespace, console: Console) -> Outcome:
    if arguments.with_content and arguments.save is None:
        raise VerificationIncomplete("--with-content: expected --save BUNDLE beside it")
    rules = load_rules(arguments.policy, arguments.reference)
    prompt = _prompt(arguments.prompt)
    headers = {} if arguments.api_key_file is None else credential(arguments.api_key_file)
    return trio.run(partial(_ask_and_verify, arguments, rules, prompt, headers, console))


async def _ask_and_verify(
    arguments: argparse.Namespace,
    rules: Rules,
    prompt: str,
    headers: dict[str, str],
    console: Console,
) -> Outcome:
    # Steps 1 to 9. Nothing is sent to whom they refuse. What takes its time is said on a terminal,
    # and only there.
    with console.status(Text(_printable(f"verifying {arguments.url}"))):
        now = datetime.datetime.now(datetime.UTC)
        bundle = await fetch(arguments.url, secrets.token_bytes(NONCE_BYTES), now=now)
        if arguments.save is not None:
            save(arguments.save, bundle)
        outcome = outcome_of(bundle, rules, at=now, source="clock")
    if outcome.verdict not in (Tier.AFFIRMING, Tier.WARNING):
        return outcome
    assert bundle.spki_sha256 is not None
    body = _request_body(arguments.model or _model_of(bundle), prompt)
    try:
        async with pinned_client(bundle.url, (bundle.spki_sha256,), read_s=READ_S) as client:
            client.headers.update(headers)
            answered = await _ask(client, body, within_s=arguments.within)
            # Step 10, with what it needs.
            with console.status("fetching what proves the answer"):
                bundle = await collect_exchange(client, bundle, answered, body)
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        raise VerificationIncomplete(f"cannot ask {bundle.url}: {reason(error)}") from error
    if arguments.save is not None:
        save(arguments.save, bundle if arguments.with_content else _without_content(bundle))
    with console.status("verifying the answer"):
        checked = datetime.datetime.now(datetime.UTC)
        return outcome_of(bundle, rules, at=checked, source="clock")


async def _ask(client: httpx2.AsyncClient, body: bytes, *, within_s: float) -> Answered:
    """Send the prompt and print the answer as it comes.

    Raises:
        Unbound: the connection ends at another TLS key; nothing was sent.
        VerificationIncomplete: it was refused without a receipt, or answered without end, or not
            in time.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    content = bytearray()
    printer = _Printer()
    receipt_id = ""
    with trio.move_on_after(within_s) as in_time:
        async with client.stream(
            "POST",
            CHAT_PATH,
            content=body,
            headers={"Content-Type": "application/json", "X-DCV-Nonce": nonce.hex()},
        ) as response:
            receipt_id = response.headers.get("X-Receipt-Id", "")
            streams = response.status_code == httpx2.codes.OK
            try:
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_CONTENT_BYTES:
                        raise VerificationIncomplete(
                            f"expected an answer of at most {MAX_CONTENT_BYTES} bytes"
                        )
                    if streams:
                        printer.feed(part)
            except httpx2.HTTPError as error:
                # The receipt says how it ended, and that what came is not all.
                _say(f"the answer broke off: {reason(error)}")
    printer.end()
    if in_time.cancelled_caught:
        # How much was written after we left, only the receipt says: there is nothing to hold to it.
        named = f"; its receipt is {receipt_id}" if is_receipt_id(receipt_id) else ""
        raise VerificationIncomplete(f"expected the whole answer within {within_s:g} s{named}")
    if not streams:
        _say(f"the appliance refused: HTTP {response.status_code} {_message(bytes(content))}")
    if not is_receipt_id(receipt_id):
        raise VerificationIncomplete("expected an answer with a receipt (X-Receipt-Id)")
    return Answered(receipt_id, nonce, bytes(content))


def _without_content(bundle: Bundle) -> Bundle:
    assert bundle.exchange is not None
    return replace(bundle, exchange=replace(bundle.exchange, request=None, response=None))


# ------------------------------------------------------------------------------------- the answer


class _Delta(Struct, gc=False):
    content: str | None = None


class _Choice(Struct, gc=False):
    delta: _Delta | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] = []


class _Problem(Struct):
    message: str = ""


class _ErrorBody(Struct):
    error: _Problem


class _Printer:
    """Prints the text of a stream of events, cut however the network likes."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._printed = ""

    def feed(self, data: bytes) -> None:
        """Raises: VerificationIncomplete: an event is longer than one would keep."""
        self._rest += data
        # What was kept before holds no whole event: an end lies in what came, or on its border.
        if self._rest.find(b"\n\n", max(0, len(self._rest) - len(data) - 1)) >= 0:
            *events, self._rest = self._rest.split(b"\n\n")
            for text in _texts(events):
                self._printed = _printable(text)
                sys.stdout.write(self._printed)
            sys.stdout.flush()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise VerificationIncomplete(f"expected events of at most {MAX_EVENT_BYTES} bytes")

    def end(self) -> None:
        if self._printed and not self._printed.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()


def _texts(events: Sequence[bytes | bytearray]) -> Iterator[str]:
    """Of events that are chunks; the check of the whole says what the others were."""
    for event in events:
        if not event.startswith(b"data: {"):
            continue
        try:
            chunk = msgspec.json.decode(event.removeprefix(b"data: "), type=_Chunk)
        except (msgspec.DecodeError, RecursionError):
            continue
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.content:
                yield choice.delta.content


def _printable(text: str) -> str:
    """Control characters as escapes: an answer must not drive the terminal, nor forge a verdict."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


def _message(content: bytes) -> str:
    """Of an error object, its own words."""
    try:
        return _printable(msgspec.json.decode(content, type=_ErrorBody).error.message)
    except (msgspec.DecodeError, RecursionError):
        return ""


def _verdict_line(outcome: Outcome) -> str:
    """On one line: the verdict, which model and receipt, and what keeps it from being better."""
    claims = outcome.claims
    parts = claims.get("submods")
    receipt = parts.get("receipt") if isinstance(parts, dict) else None
    told = receipt if isinstance(receipt, dict) else {}
    verdict = "" if outcome.verdict is None else outcome.verdict.value
    line = f"{verdict}: {told.get('outcome')}, model {told.get('model')}"
    line += f", receipt {told.get('receipt_id')}"
    checks = list(dict.fromkeys(placed.finding.check for placed in outcome.findings))
    return _printable(line + (f"; reservations: {', '.join(checks)}" if checks else ""))


# ---------------------------------------------------------------------------------- the arguments


def _request_body(model: str, prompt: str) -> bytes:
    return canonical_json(
        {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    )


def _model_of(bundle: Bundle) -> str:
    """The one that the verified manifest names.

    Raises:
        Malformed: it names none.
    """
    model = bundle.report.workload.get("model")
    name = model.get("id") if isinstance(model, dict) else None
    if not isinstance(name, str):
        raise Malformed("workload.model.id: expected text", field="$.workload.model.id")
    return name


def _seconds(text: str) -> float:
    """Raises: argparse.ArgumentTypeError: no number, or beyond a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_ANSWER_S:  # nor NaN
        raise argparse.ArgumentTypeError(f"expected seconds, at most {MAX_ANSWER_S:g}")
    return seconds


def _prompt(argument: str) -> str:
    if argument != "-":
        return argument
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise VerificationIncomplete(f"prompt: expected at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise VerificationIncomplete("prompt: expected UTF-8 text") from None


def _say(text: str) -> None:
    sys.stderr.write(f"dcv: {text}\n")

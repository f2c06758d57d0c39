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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx2
import msgspec
import trio
from msgspec import Struct
from rich.console import Console

from appliance.errors import ApplianceError, Malformed, VerificationIncomplete
from appliance.rats.exchange import Exchange
from appliance.rats.result import Tier
from appliance.verifier.bundle import MAX_CONTENT_BYTES, Bundle
from appliance.verifier.check import Rules, fetch, load_rules
from appliance.verifier.render import render
from appliance.verifier.session import pinned_client
from appliance.verifier.verdict import Outcome, of_error
from appliance.verifier.verify_command import EXIT_STATUS, NONCE_BYTES, outcome_of, save
from appliance.wire import epoch as epoch_format
from appliance.wire import report as report_format
from appliance.wire.canonical import canonical_json
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import parse_epoch
from appliance.wire.receipt import MAX_RECEIPT_BYTES, parse_receipt, read_events
from appliance.wire.report import parse_report

CHAT_PATH = "/v1/chat/completions"

READ_S = 120.0
"""Between two parts of an answer; the appliance sends heartbeats in between."""

RECEIPT_S = 10.0
"""How long a receipt may take once the answer has ended: one that broke off has its receipt when
the appliance has noticed."""

RETRY_S = 0.2
FETCH_S = 60.0
MAX_PROMPT_BYTES = 4 << 20
MAX_KEY_BYTES = 4096


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
    for option, text in (
        ("--policy", "TOML, your policy; default: the strict one"),
        ("--reference", "JSON, reference values of images you accept"),
        ("--api-key-file", "holds the API key and nothing else"),
    ):
        chat.add_argument(option, type=Path, metavar="FILE", help=text)
    chat.add_argument("--model", metavar="ID", help="default: the one that the evidence proves")
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
    try:
        outcome = _chat(arguments)
    except ApplianceError as error:
        outcome = of_error(error)
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if outcome.verdict in (Tier.AFFIRMING, Tier.WARNING):
        console.print(_verdict_line(outcome), soft_wrap=True)
    else:
        render(outcome, console)
    return outcome.exit_status


def _chat(arguments: argparse.Namespace) -> Outcome:
    if arguments.with_content and arguments.save is None:
        raise VerificationIncomplete("--with-content: expected --save BUNDLE beside it")
    rules = load_rules(arguments.policy, arguments.reference)
    prompt = _prompt(arguments.prompt)
    headers = {} if arguments.api_key_file is None else _credential(arguments.api_key_file)
    return trio.run(partial(_ask_and_verify, arguments, rules, prompt, headers))


async def _ask_and_verify(
    arguments: argparse.Namespace, rules: Rules, prompt: str, headers: dict[str, str]
) -> Outcome:
    # Steps 1 to 9. Nothing is sent to whom they refuse.
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
        async with pinned_client(bundle.url, bundle.spki_sha256, read_s=READ_S) as client:
            client.headers.update(headers)
            answered = await _ask(client, body)
            # Step 10, with what it needs.
            bundle = await _collect(client, bundle, answered, body)
    except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise VerificationIncomplete(f"cannot ask {bundle.url}: {reason}") from error
    if arguments.save is not None:
        save(arguments.save, bundle if arguments.with_content else _without_content(bundle))
    checked = datetime.datetime.now(datetime.UTC)
    return outcome_of(bundle, rules, at=checked, source="clock")


@dataclass(frozen=True, slots=True, repr=False)
class _Answered:
    """What came back: every content byte, and by which id its receipt is found."""

    receipt_id: str
    client_nonce: bytes
    content: bytes


async def _ask(client: httpx2.AsyncClient, body: bytes) -> _Answered:
    """Send the prompt and print the answer as it comes.

    Raises:
        Unbound: the connection ends at another TLS key; nothing was sent.
        VerificationIncomplete: it was refused without a receipt, or answered without end.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    content = bytearray()
    printer = _Printer()
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
            _say(f"the answer broke off: {str(error) or type(error).__name__}")
    printer.end()
    if not streams:
        _say(f"the appliance refused: HTTP {response.status_code} {_message(bytes(content))}")
    if not _is_name(receipt_id):
        raise VerificationIncomplete("expected an answer with a receipt (X-Receipt-Id)")
    return _Answered(receipt_id, nonce, bytes(content))


async def _collect(
    client: httpx2.AsyncClient, bundle: Bundle, answered: _Answered, body: bytes
) -> Bundle:
    """The bundle, with the receipt and everything that it cites.

    Raises:
        Malformed: what came is none. VerificationIncomplete: it cannot be had.
    """
    receipt = parse_receipt(await _receipt(client, answered.receipt_id))
    log = read_events(receipt)
    cited = {one.evidence_digest for one in (log.admission, log.completion) if one is not None}
    epochs = []
    for digest in sorted(cited):
        data = await _get(client, f"/v1/dcv/epochs/{format_sha256(digest)}", epoch_format.MAX_BYTES)
        epochs.append(parse_epoch(data))
    exchange = Exchange(receipt, tuple(epochs), body, answered.content, answered.client_nonce)
    if receipt.keyset_digest != bundle.report.keyset_digest:
        # The keyset was renewed in between; the receipt's own has its null form.
        path = f"/v1/dcv/reports/{format_sha256(receipt.keyset_digest)}"
        report = parse_report(await _get(client, path, report_format.MAX_BYTES))
        bundle = replace(bundle, report=report, nonce=None)
    return replace(bundle, exchange=exchange)


async def _receipt(client: httpx2.AsyncClient, receipt_id: str) -> bytes:
    with trio.move_on_after(RECEIPT_S):
        while True:
            data = await _get_if_there(client, f"/v1/aci/receipts/{receipt_id}", MAX_RECEIPT_BYTES)
            if data is not None:
                return data
            await trio.sleep(RETRY_S)
    raise VerificationIncomplete(f"expected the answer's receipt within {RECEIPT_S:g} s")


async def _get(client: httpx2.AsyncClient, path: str, max_bytes: int) -> bytes:
    data = await _get_if_there(client, path, max_bytes)
    if data is None:
        raise VerificationIncomplete(f"{path}: the appliance does not have it")
    return data


async def _get_if_there(client: httpx2.AsyncClient, path: str, max_bytes: int) -> bytes | None:
    try:
        with trio.fail_after(FETCH_S):
            async with client.stream("GET", path) as response:
                if response.status_code == httpx2.codes.NOT_FOUND:
                    return None
                if response.status_code != httpx2.codes.OK:
                    raise VerificationIncomplete(f"{path}: got HTTP {response.status_code}")
                data = bytearray()
                async for part in response.aiter_raw():
                    data += part
                    if len(data) > max_bytes:
                        raise VerificationIncomplete(f"{path}: expected at most {max_bytes} bytes")
                return bytes(data)
    except trio.TooSlowError:
        raise VerificationIncomplete(f"{path}: expected it within {FETCH_S:g} s") from None


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
        self._rest = b""
        self._printed = ""

    def feed(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for text in _texts(events):
            self._printed = _printable(text)
            sys.stdout.write(self._printed)
        sys.stdout.flush()

    def end(self) -> None:
        if self._printed and not self._printed.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()


def _texts(events: list[bytes]) -> Iterator[str]:
    """Of events that are chunks; the check of the whole says what the others were."""
    for event in events:
        if not event.startswith(b"data: {"):
            continue
        try:
            chunk = msgspec.json.decode(event.removeprefix(b"data: "), type=_Chunk)
        except msgspec.DecodeError:
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
    except msgspec.DecodeError:
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


def _credential(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES).strip()
    except OSError as error:
        raise VerificationIncomplete(f"--api-key-file {path}: {error.strerror}") from error
    if not key or not key.isascii() or not key.decode("ascii").isprintable():
        raise VerificationIncomplete(f"--api-key-file {path}: expected one line with the key")
    return {"Authorization": f"Bearer {key.decode('ascii')}"}


def _is_name(text: str) -> bool:
    """Of a receipt: it goes into a path."""
    return 0 < len(text) <= 64 and text.isascii() and text.isalnum()


def _say(text: str) -> None:
    sys.stderr.write(f"dcv: {text}\n")

"""`dcv receipt verify FILE`: one answer's receipt, offline: step 10, after steps 2 to 9.

Of a stream that broke off where no receipt can be had, `--cut` takes the last checkpoint in its place.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace
from pathlib import Path

from appliance.errors import Malformed, VerificationIncomplete
from appliance.rats.checkpoints import appraise_cut_stream
from appliance.rats.exchange import Exchange
from appliance.rats.result import conclude
from appliance.verifier.arguments import EXIT_STATUS, add_json, add_rules, add_time, tell
from appliance.verifier.bundle import MAX_CONTENT_BYTES, Bundle, read_bundle
from appliance.verifier.check import check, load_rules
from appliance.verifier.raw_evidence import parse_hex, parse_time
from appliance.verifier.verdict import Outcome
from appliance.verifier.verify_command import (
    NONCE_BYTES,
    outcome_of,
    outcome_of_result,
    read_bundle_file,
    source_of,
    time_at,
    time_of,
)
from appliance.wire.canonical import JsonObject, canonical_json, parse_json_object
from appliance.wire.epoch import parse_epoch
from appliance.wire.receipt import MAX_NESTING, parse_receipt
from appliance.wire.report import read_report

BESIDE_A_RECEIPT = ("report", "request", "response", "epoch", "nonce")
"""Options that complete a bare receipt."""


def add_receipt(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `receipt` and what is below it."""
    receipt = commands.add_parser("receipt", help="an answer's receipt")
    verify = receipt.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "verify",
        help="verify a receipt, offline",
        description="Verify the report that a receipt's key is bound by, and then the receipt: in a "
        "bundle, or with the report and what else is at hand given beside it. With --cut, what came "
        "of a stream that broke off, up to the last checkpoint in it.",
        epilog=EXIT_STATUS,
    )
    verify.add_argument("file", type=Path, metavar="FILE", help="a bundle, or a receipt")
    verify.add_argument(
        "--cut",
        action="store_true",
        help="FILE is what came of a stream without its end, which was asked for with "
        "stream_options.include_checkpoints; with --report, and --request where it is at hand",
    )
    for option, text in (
        ("--report", "of a bare receipt: a report of its keyset, or a bundle that holds one"),
        ("--request", "of a bare receipt: the body that was sent"),
        ("--response", "of a bare receipt: the content that came"),
    ):
        verify.add_argument(option, type=Path, metavar="FILE", help=text)
    verify.add_argument(
        "--epoch",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of a bare receipt: evidence that it cites; twice with completion evidence",
    )
    verify.add_argument("--nonce", metavar="HEX", help="32 bytes that --report was asked with")
    add_rules(verify)
    add_time(
        verify,
        default="when the answer was served, or with --cut when it was admitted, by the appliance's "
        "word",
    )
    add_json(verify)
    verify.set_defaults(command=receipt_command)


def receipt_command(arguments: argparse.Namespace) -> int:
    """`dcv receipt verify`: prints the outcome and returns its exit status."""
    return tell(arguments, _verify_cut if arguments.cut else _verify)


def _verify(arguments: argparse.Namespace) -> Outcome:
    given_at = None if arguments.at is None else parse_time(arguments.at, option="--at")
    rules = load_rules(arguments.policy, arguments.reference)
    document = _document(arguments.file)
    if _is_bundle(document):
        _refuse_beside(arguments, BESIDE_A_RECEIPT, "a bundle holds them itself")
        bundle = read_bundle(document)
    else:
        bundle = _assemble(document, arguments)
    if bundle.exchange is None:
        raise VerificationIncomplete(f"{arguments.file}: expected a bundle with a receipt in it")
    at: datetime.datetime = given_at or time_of(bundle)
    return outcome_of(bundle, rules, at=at, source="--at" if given_at else source_of(bundle))


def _verify_cut(arguments: argparse.Namespace) -> Outcome:
    """Steps 2 to 9 on the report, and then what came of a stream: the part `checkpoint`."""
    given_at = None if arguments.at is None else parse_time(arguments.at, option="--at")
    rules = load_rules(arguments.policy, arguments.reference)
    if arguments.report is None or arguments.epoch or arguments.response is not None:
        raise VerificationIncomplete(
            "--cut: expected --report FILE beside it, and of the rest no more than --request"
        )
    content = _content(arguments.file, "FILE")
    request = _content(arguments.request, "--request")
    assert content is not None
    bundle = _report_beside(arguments, fetched_at=0)
    part = appraise_cut_stream(content, report=bundle.report, request=request)
    collected_at = part.claims["collected_at"]
    assert isinstance(collected_at, int)
    at = given_at or time_at(collected_at)
    result = check(bundle, rules, at=at)
    whole = conclude(result.claims, result.findings, {**result.submods, "checkpoint": part})
    return outcome_of_result(whole, bundle.url, at=at, source="--at" if given_at else "checkpoint")


def _assemble(receipt: JsonObject, arguments: argparse.Namespace) -> Bundle:
    """A bundle of a bare receipt and the files that were given beside it."""
    if arguments.report is None:
        raise VerificationIncomplete(
            "expected a bundle, or --report FILE: a receipt's key is nobody's without a report"
        )
    exchange = Exchange(
        receipt=parse_receipt(canonical_json(receipt)),
        epochs=tuple(parse_epoch(read_bundle_file(one)) for one in arguments.epoch),
        request=_content(arguments.request, "--request"),
        response=_content(arguments.response, "--response"),
    )
    beside = _report_beside(arguments, fetched_at=exchange.receipt.served_at)
    return replace(beside, exchange=exchange)


def _report_beside(arguments: argparse.Namespace, *, fetched_at: int) -> Bundle:
    """What `--report` holds, without the exchange that may be in it."""
    given = _document(arguments.report)
    if _is_bundle(given):
        _refuse_beside(arguments, ("nonce",), "the bundle of --report holds it itself")
        return replace(read_bundle(given), exchange=None)
    nonce = None
    if arguments.nonce is not None:
        nonce = parse_hex(arguments.nonce, option="--nonce", lengths=(NONCE_BYTES,))
    return Bundle("", fetched_at, nonce, None, read_report(given))


def _refuse_beside(arguments: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    """What would be left out must not look as if it had been compared."""
    given = [f"--{option}" for option in options if getattr(arguments, option) not in (None, [])]
    if given:
        raise VerificationIncomplete(f"{', '.join(given)}: {why}")


def _document(path: Path) -> JsonObject:
    return parse_json_object(read_bundle_file(path), max_nesting=MAX_NESTING + 1)


def _is_bundle(document: JsonObject) -> bool:
    return "type" in document


def _content(path: Path | None, option: str) -> bytes | None:
    if path is None:
        return None
    data = read_bundle_file(path)
    if len(data) > MAX_CONTENT_BYTES:
        raise Malformed(f"{option}: expected at most {MAX_CONTENT_BYTES} bytes", field=option)
    return data

"""`dcv verify URL|BUNDLE`: an appliance, now; or what was fetched from one, later."""

from __future__ import annotations

import argparse
import datetime
import secrets
from functools import partial
from pathlib import Path

import trio

from appliance.errors import Malformed, VerificationIncomplete
from appliance.rats.result import AttestationResult
from appliance.verifier.arguments import EXIT_STATUS, add_json, add_rules, add_time, tell
from appliance.verifier.bundle import MAX_BUNDLE_BYTES, Bundle, parse_bundle
from appliance.verifier.check import Rules, check, fetch, load_rules
from appliance.verifier.raw_evidence import parse_time
from appliance.verifier.verdict import Outcome, of_result
from appliance.wire.canonical import JsonObject

NONCE_BYTES = 32

WORD_OF = {
    "clock": "this machine",
    "--at": "you",
    "bundle": "whoever made the bundle",
    "receipt": "the appliance",
    "checkpoint": "the appliance",
}
"""Who says what time it is, by `at.source`: a signature proves nothing about a clock."""


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify`."""
    verify = commands.add_parser(
        "verify",
        help="verify an appliance, or a saved bundle offline",
        description="Fetch an appliance's report over a fresh nonce and hold it, its evidence and "
        "its TLS key to your policy; or hold a saved bundle to it, offline.",
        epilog=EXIT_STATUS,
    )
    verify.add_argument("what", metavar="URL|BUNDLE", help="https://HOST:8443, or a bundle's file")
    add_rules(verify)
    verify.add_argument(
        "--save", type=Path, metavar="BUNDLE", help="keep what was fetched, to verify it again"
    )
    add_time(
        verify,
        default="now; of a bundle when the answer in it was served, by the appliance's word, or when "
        "it was made, by its maker's",
    )
    add_json(verify)
    verify.set_defaults(command=verify_command)


def verify_command(arguments: argparse.Namespace) -> int:
    """`dcv verify`: prints the outcome and returns its exit status."""
    return tell(arguments, _verify)


def _verify(arguments: argparse.Namespace) -> Outcome:
    given_at = None if arguments.at is None else parse_time(arguments.at, option="--at")
    rules = load_rules(arguments.policy, arguments.reference)
    now = datetime.datetime.now(datetime.UTC)
    if "://" in arguments.what:
        nonce = secrets.token_bytes(NONCE_BYTES)
        bundle = trio.run(partial(fetch, arguments.what, nonce, now=now))
        at, source = given_at or now, "clock" if given_at is None else "--at"
    else:
        bundle = parse_bundle(read_bundle_file(Path(arguments.what)))
        at, source = given_at or time_of(bundle), "--at" if given_at else source_of(bundle)
    if arguments.save is not None:
        save(arguments.save, bundle)
    return outcome_of(bundle, rules, at=at, source=source)


def time_of(bundle: Bundle) -> datetime.datetime:
    """As of when a bundle is judged where nobody says otherwise.

    Raises:
        Malformed: it names a time that no calendar has.
    """
    exchange = bundle.exchange
    return time_at(bundle.fetched_at if exchange is None else exchange.receipt.served_at)


def time_at(seconds: int) -> datetime.datetime:
    """Of Unix seconds that somebody else wrote.

    Raises:
        Malformed: it is a time that no calendar has.
    """
    try:
        return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
    except (OverflowError, ValueError, OSError):
        raise Malformed("bundle: expected a time before the year 10000") from None


def source_of(bundle: Bundle) -> str:
    """Where `time_of` has it from."""
    return "bundle" if bundle.exchange is None else "receipt"


def outcome_of(bundle: Bundle, rules: Rules, *, at: datetime.datetime, source: str) -> Outcome:
    """Check a bundle, and say as of when and by whose clock.

    Args:
        source: one of `WORD_OF`.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Unbound: it does not hold.
    """
    return outcome_of_result(check(bundle, rules, at=at), bundle.url, at=at, source=source)


def outcome_of_result(
    result: AttestationResult, url: str, *, at: datetime.datetime, source: str
) -> Outcome:
    """What was found, and as of when and by whose clock.

    Args:
        source: one of `WORD_OF`.
    """
    told: JsonObject = {
        "scheme": "appliance",
        "url": url,
        "at": {
            "time": f"{at:%Y-%m-%dT%H:%M:%SZ}",
            "source": source,
            "word_of": WORD_OF[source],
        },
    }
    return of_result(
        AttestationResult(result.verdict, told | result.claims, result.findings, result.submods)
    )


def read_bundle_file(path: Path) -> bytes:
    """A file's bytes; one that is too large for a bundle is cut where its parser will see it.

    Raises:
        VerificationIncomplete: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise VerificationIncomplete(
            f"expected an https URL or a bundle's file; cannot read {path}: {error.strerror}"
        ) from error


def save(path: Path, bundle: Bundle) -> None:
    """Before it is checked: a bundle that does not hold is what one wants to keep.

    Raises:
        VerificationIncomplete: it cannot be written.
    """
    try:
        path.write_bytes(bundle.to_bytes())
    except OSError as error:
        raise VerificationIncomplete(f"--save: cannot write {path}: {error.strerror}") from error

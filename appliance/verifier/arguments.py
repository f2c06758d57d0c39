"""What the relying party's commands have in common: rules in, an outcome out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from appliance.errors import ApplianceError, InternalError, Malformed, VerificationIncomplete
from appliance.verifier.render import render
from appliance.verifier.verdict import Outcome, of_error

EXIT_STATUS = (
    "Exit status: 0 affirming, 1 contraindicated, 2 could not be checked (bad arguments, files that "
    "cannot be read, nobody answers), 3 warning."
)

MAX_KEY_BYTES = 4096


def add_rules(command: argparse.ArgumentParser) -> None:
    """`--policy` and `--reference`, for `check.load_rules`."""
    command.add_argument(
        "--policy", type=Path, metavar="FILE", help="TOML, your policy; default: the strict one"
    )
    command.add_argument(
        "--reference", type=Path, metavar="FILE", help="JSON, reference values of images you accept"
    )


def add_time(command: argparse.ArgumentParser, *, default: str) -> None:
    """`--at`, for `raw_evidence.parse_time`."""
    command.add_argument(
        "--at", metavar="RFC3339", help=f"judge as of this time; default: {default}"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """`--json`, for `tell`."""
    command.add_argument("--json", action="store_true", help="the outcome as JSON")


def tell(arguments: argparse.Namespace, judge: Callable[[argparse.Namespace], Outcome]) -> int:
    """Judge, print the outcome whatever it is, and return its exit status."""
    try:
        outcome = judge(arguments)
    except ApplianceError as error:
        outcome = of_error(error)
    except Exception as error:  # noqa: BLE001  # a parser's defect must not pass for evidence that holds
        outcome = of_error(_defect(error))
    if arguments.json:
        sys.stdout.write(json.dumps(outcome.to_json(), indent=2) + "\n")
    else:
        render(outcome, Console(highlight=False, markup=False, emoji=False))
    return outcome.exit_status


def _defect(error: Exception) -> Malformed:
    """Evidence that no parser expected: refused, and said by the defect's name alone."""
    return Malformed(
        f"{InternalError.code}: the evidence met a defect of this program "
        f"({type(error).__name__}), so it is refused"
    )


def credential(path: Path) -> dict[str, str]:
    """The header that presents the API key in a file.

    Raises:
        VerificationIncomplete: it cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES).strip()
    except OSError as error:
        raise VerificationIncomplete(f"--api-key-file {path}: {error.strerror}") from error
    if not key or not key.isascii() or not key.decode("ascii").isprintable():
        raise VerificationIncomplete(f"--api-key-file {path}: expected one line with the key")
    return {"Authorization": f"Bearer {key.decode('ascii')}"}

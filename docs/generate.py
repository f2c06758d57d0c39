"""Writes what comes from the source: docs/configuration.md, docs/errors.md, and the worked example in
docs/protocol.md.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit 1 if they are not what the source says

A test runs the check, so a field or an error cannot appear without its page.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from appliance import errors
from appliance.config import ApiKey, MeasuredConfig, TcbFloor
from appliance.errors import ApplianceError, BootError
from docs import protocol_example

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by docs/generate.py from the source; `just docs` writes it again. -->"

_ENTRY = re.compile(r"^ {8}(?P<names>[a-z_0-9, ]+): (?P<text>.*(?:\n {12}.*)*)", re.MULTILINE)


def configuration_page() -> str:
    """Every section and key of the configuration file, from the declarations and docstrings."""
    parts = [
        "# Configuration",
        GENERATED,
        (
            "One TOML file, read once: `dcv serve --config FILE`. `--check` validates it and prints it with "
            "every default filled in. An unknown key is an error that names the nearest known one. Relative "
            "paths are taken from the folder of the file. No environment variable changes anything. Samples "
            "lie in [image/config](../image/config)."
        ),
    ]
    for field in msgspec.structs.fields(MeasuredConfig):
        parts += _section(field.name, field.type)
        if field.name == "auth":
            parts += _section("auth.keys", ApiKey, array=True)
        if field.name == "policy":
            parts += _section("policy.minimum_tcb", TcbFloor)
    return "\n\n".join(parts) + "\n"


def errors_page() -> str:
    """Every error a client or an operator can meet."""
    leaves = sorted(_leaves(ApplianceError), key=lambda kind: (kind.http_status, kind.code))
    seen = [kind for kind in leaves if _reaches_clients(kind)]
    rows = [
        f"| `{kind.code}` | {_status(kind)} | `{kind.type}` | {kind.client} | {kind.advice} |"
        for kind in seen
    ]
    exits = [
        f"| `{kind.code}` | {kind.exit_status} | {kind.advice} |"
        for kind in leaves
        if kind.exit_status != errors.EX_SOFTWARE or not _reaches_clients(kind)
        if kind not in (BootError, errors.CertificateRefused)  # neither ends the process itself
    ]
    return (
        "\n\n".join(
            [
                "# Errors",
                GENERATED,
                (
                    'An error is OpenAI\'s object, `{"error": {"message", "type", "param", "code"}}`. The message '
                    "says what was expected and where, and never quotes a prompt. A stream that fails after it "
                    "began sends the same object as its last event, no `[DONE]`, and does not end cleanly."
                ),
                "| code | status | type | what the client does | what the operator does |\n"
                "|---|---|---|---|---|\n" + "\n".join(rows),
                "## When the process ends",
                (
                    "Exit statuses follow sysexits(3). The failed stage is in the log line `appliance_ended`, in "
                    "`systemctl status` and in `dcv status` while it still answers. 0 is an orderly stop; 70 also "
                    "a defect."
                ),
                "| code | exit status | what the operator does |\n|---|---|---|\n"
                + "\n".join(exits),
            ]
        )
        + "\n"
    )


def protocol_page() -> str:
    """docs/protocol.md, written by hand, with its worked example written anew."""
    page = (DOCS / "protocol.md").read_text(encoding="utf-8")
    before, begin, rest = page.partition(protocol_example.BEGIN)
    _, end, after = rest.partition(protocol_example.END)
    if not begin or not end:
        raise SystemExit("docs: protocol.md has no marks around its worked example")
    return before + protocol_example.worked_example() + after


def _section(name: str, struct: type, *, array: bool = False) -> list[str]:
    text = inspect.getdoc(struct) or ""
    summary = text.partition("\n\nAttributes:")[0].partition(": ")[2] or text.partition("\n")[0]
    described = _described(struct)
    rows = []
    for field in msgspec.structs.fields(struct):
        if isinstance(field.default, msgspec.Struct):
            continue
        rows.append(f"| `{field.name}` | {_default(field)} | {described[field.name]} |")
    heading = f"[[{name}]]" if array else f"[{name}]"
    table = "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows)
    summary = " ".join(summary.split())
    return [f"## {heading}", summary[:1].upper() + summary[1:], table]


def _described(struct: type) -> dict[str, str]:
    """Field name to its text in the docstring's Attributes section; a missing one is an error."""
    raw = struct.__doc__ or ""
    found = {
        name.strip(): " ".join(entry["text"].split())
        for entry in _ENTRY.finditer(raw)
        for name in entry["names"].split(",")
    }
    for field in msgspec.structs.fields(struct):
        found.setdefault(field.name, "")
    if struct.__name__ == "Log":
        return {
            "format": "`json`, `pretty`, or `auto`: pretty on a terminal",
            "level": "lowest level",
        }
    missing = [name for name, text in found.items() if not text]
    if missing:
        raise SystemExit(f"docs: {struct.__name__} does not describe {missing}")
    return found


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "`" + "`, `".join(map(str, value)) + "`" if value else "empty"
    if value == "":
        return "empty"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _leaves(kind: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    children = kind.__subclasses__()
    if not children:
        yield kind
    for child in children:
        yield from _leaves(child)


def _reaches_clients(kind: type[ApplianceError]) -> bool:
    """Whether a request can meet it, in an answer or as the last event of a stream: what withdraws
    the appliance ends running streams with its own code."""
    families = (
        errors.InternalError,
        errors.RequestError,
        errors.CapacityError,
        errors.EngineError,
        errors.EvidenceError,
        errors.AttesterError,
        errors.Malformed,
    )
    only_at_boot = (
        errors.EngineStartFailed,
        errors.EngineExposed,
        errors.EngineNotDeterministic,
        errors.SealRefused,
    )
    return issubclass(kind, families) and not issubclass(kind, only_at_boot)


def _status(kind: type[ApplianceError]) -> str:
    return "400" if kind is errors.EngineRefused else str(kind.http_status)


def main() -> int:
    """Write or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    pages = (
        ("configuration.md", configuration_page()),
        ("errors.md", errors_page()),
        ("protocol.md", protocol_page()),
    )
    for name, text in pages:
        path = DOCS / name
        if check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs: {', '.join(stale)} not as the source says; run `just docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

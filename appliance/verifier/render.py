"""An outcome for people: the verdict first, then what was claimed, then what is wrong.

Evidence is somebody else's text: nothing of it reaches the terminal as markup or as a control
character.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from appliance.rats.result import Tier
from appliance.verifier.verdict import Outcome, Placed
from appliance.wire.canonical import JsonObject, JsonValue

STYLES: dict[Tier | None, str] = {
    Tier.AFFIRMING: "bold green",
    Tier.WARNING: "bold yellow",
    Tier.CONTRAINDICATED: "bold red",
    None: "bold magenta",
}
MEANINGS: dict[Tier | None, str] = {
    Tier.AFFIRMING: "authentic, and as the reference values have it",
    Tier.WARNING: "authentic, with the reservations below",
    Tier.CONTRAINDICATED: "do not trust this",
    None: "nothing was learnt about the evidence",
}

MAIN_PCRS = tuple(f"measurements.pcr{number}" for number in (4, 7, 11, 12))
"""What was booted, under which Secure Boot keys, from which UKI, with what added."""

SHOWN: dict[str, tuple[str, ...]] = {
    # scheme: the claims that matter at a glance; --json has all of them
    "appliance": (
        "url",
        "at.time",
        "at.source",
        "at.word_of",
        "tee_type",
        "workload.image.version",
        "workload.image.commit",
        "source_provenance.image_digest",
        "workload.model.id",
        "workload.model.digest",
        "workload.engine.name",
        "workload.engine.version",
        "workload.engine.deterministic",
        "workload_keyset_digest",
    ),
    "receipt": (
        "receipt_id",
        "model",
        "endpoint",
        "served_at.time",
        "served_at.word_of",
        "outcome",
        "code",
        "request_hash",
        "response_hash",
        "seed",
        "deterministic",
        "workload_digest",
        "output_digest",
    ),
    "checkpoint": (
        "receipt_id",
        "seq",
        "final",
        "proven_bytes",
        "received_bytes",
        "request_hash",
        "prefix_hash",
        "output_digest",
    ),
    "nvidia_gpu": (
        "hwmodel",
        "driver_version",
        "vbios_version",
        "feature",
        "ueid",
        "nonce",
        "nonce_compared",
        "rims",
        "trusted_root.pinned",
    ),
    "simulated": (
        "hwmodel",
        "driver_version",
        "vbios_version",
        "feature",
        "ueid",
        "nonce",
        # and of a CPU
        "product",
        "measurement",
        "report_data",
    ),
    "sev_snp": (
        "product",
        "signing_key",
        "csp_id",
        "chip_id",
        "vmpl",
        "policy.debug",
        "reported_tcb",
        "measurement",
        "report_data",
        "report_data_compared",
        "revocation_checked",
    ),
    "tdx": (
        "tcb_status",
        "advisory_ids",
        "fmspc",
        "collateral_until",
        "attributes.debug",
        "mr_td",
        "rt_mr0",
        "rt_mr1",
        "rt_mr2",
        "rt_mr3",
        "report_data",
        "report_data_compared",
    ),
    "azure_vtpm": (
        "hardware.scheme",
        "hardware.product",
        "hardware.tcb_status",
        "secure_boot",
        "measurements.measurement",
        "measurements.mrtd",
        *MAIN_PCRS,
        "report_data",
        "nonce_compared",
    ),
    "tpm2": (*MAIN_PCRS, "report_data", "event_log.events", "image_digest"),
}


def render(outcome: Outcome, console: Console) -> None:
    """Print an outcome; of any width, in colour only where the console has it."""
    console.print(Group(*_blocks(outcome)), soft_wrap=False)


def _blocks(outcome: Outcome) -> Iterator[RenderableType]:
    verdict = "could not be checked" if outcome.verdict is None else outcome.verdict.value
    headline = Text(verdict.upper(), style=STYLES[outcome.verdict])
    yield headline.append(f"  {MEANINGS[outcome.verdict]}", style="not bold default")
    if outcome.error is not None:
        yield _table(
            (
                (outcome.error.code, _text(outcome.error.message)),
                ("what to do", _text(outcome.error.advice)),
            )
        )
    yield from _claims(outcome.claims)
    for placed in outcome.findings:
        yield _finding(placed)


def _claims(claims: JsonObject) -> Iterator[RenderableType]:
    rows = []
    for path in SHOWN.get(str(claims.get("scheme")), ()):
        value = _at(claims, path)
        if value is not None and value != []:
            rows.append((_label(path), _text(_words(value))))
    if rows:
        yield Text("")
        yield _table(rows)
    parts = claims.get("submods")
    if isinstance(parts, dict):
        for name, part in parts.items():
            if isinstance(part, dict) and part:
                yield Text(f"\n{_printable(name)}", style="bold")
                yield from _claims(part)


def _finding(placed: Placed) -> RenderableType:
    finding = placed.finding
    where = f"  {_printable(placed.submod)}" if placed.submod else ""
    title = Text("\n").append(finding.tier.value, style=STYLES.get(finding.tier, ""))
    title.append(f"  {_printable(finding.check)}{where}")
    rows = (
        ("expected", _text(finding.expected)),
        ("got", _text(finding.got)),
        ("what to do", _text(finding.advice)),
    )
    return Group(title, _table(rows))


def _table(rows: tuple[tuple[str, Text], ...] | list[tuple[str, Text]]) -> RenderableType:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), value)
    return Padding(table, (0, 0, 0, 2), expand=False)


def _at(claims: JsonObject, path: str) -> JsonValue:
    value: JsonValue = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _label(path: str) -> str:
    return path.removeprefix("measurements.").replace(".", " ").replace("_", " ")


def _words(value: JsonValue) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict() if {"product", "version"} <= value.keys():
            return f"{value['product']} {value['version']}"
        case dict():
            return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
        case list():
            return ", ".join(_words(one) for one in value)
        case _:
            return str(value)


def _text(value: str) -> Text:
    return Text(_printable(value))


def _printable(text: str) -> str:
    """Control characters and the like as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)

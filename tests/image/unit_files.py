"""systemd's unit files as text, line by line: section, directive, value, and what is said above."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path(__file__).parent.parent.parent / "systemd"
UNIT_SUFFIXES = (".service", ".socket", ".target", ".mount")


@dataclass(frozen=True)
class Directive:
    """One line of a unit file; `reason` is the comment that stands above it or its group."""

    section: str
    name: str
    value: str
    reason: str


def unit_files() -> list[Path]:
    """Every unit and drop-in, in every profile."""
    return sorted(
        path
        for path in SYSTEMD.rglob("*")
        if path.suffix in UNIT_SUFFIXES or path.parent.name.endswith(".service.d")
        if path.is_file()
    )


def directives(path: Path) -> list[Directive]:
    """In order. A comment holds until the next empty line."""
    section, reason, found = "", "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line:
            reason = ""
        elif line.startswith("#"):
            reason += line.removeprefix("#").strip() + " "
        elif line.startswith("["):
            section = line.strip("[]")
        else:
            name, equals, value = line.partition("=")
            assert equals, f"{path.name}: {line}"
            found.append(Directive(section, name, value, reason.strip()))
    return found


def values(path: Path, name: str) -> list[str]:
    """Of all directives of this name."""
    return [one.value for one in directives(path) if one.name == name]

"""The documents say what is there: links lead somewhere, commands and options exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from werkzeug.exceptions import default_exceptions

from appliance import errors
from appliance.cli import _parser
from appliance.config import load_config
from appliance.web.app import _translate
from appliance.web.openapi import openapi_document
from appliance.web.problem import defect

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "image/**/*.md", "appliance/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_a_document_names_is_in_the_justfile(document: Path) -> None:
    recipes = set(
        re.findall(
            r"^([a-z][a-z-]*)(?: [^:]*)?:(?!=)", (ROOT / "Justfile").read_text(), re.MULTILINE
        )
    )
    named = set(re.findall(r"`just ([a-z][a-z-]*)", document.read_text()))
    named |= set(re.findall(r"^just ([a-z][a-z-]*)", document.read_text(), re.MULTILINE))
    assert named <= recipes


def test_every_recipe_has_its_help_line() -> None:
    lines = (ROOT / "Justfile").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"^[a-z][a-z-]*(?: [^:]*)?:(?!=)", line):
            above = [text for text in lines[:number][::-1] if not text.startswith("[")]
            assert above[0].startswith("# "), line


def test_help_names_every_exit_status_that_can_happen() -> None:
    leaves = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    statuses = {
        kind.exit_status
        for kind in leaves
        if issubclass(kind, errors.ApplianceError) and not kind.__subclasses__()
    }
    help_text = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = " ".join(help_text.split())  # a line may break anywhere
    for status in statuses:
        assert f"{status} " in words


def test_the_reference_pages_are_what_the_source_says() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_the_table_of_errors_has_every_code_a_client_can_meet_and_no_other() -> None:
    """From what can send one, not from what the table is written with."""
    config = load_config(ROOT / "image" / "config" / "azure.toml")
    assert config.auth.mode == "keys"
    # 1. What operations answer, as their own document says.
    codes = set(codes_in(openapi_document(config)))
    # 2. What is answered for none of them: Quart's own errors, and defects.
    codes |= {_translate(kind()).code for kind in default_exceptions.values()}
    codes.add(defect().code)
    # 3. Last events of streams: what withdraws a serving appliance (serving.epochs,
    #    serving.reattestation, attester.client; the engine's ends are in 1).
    for withdrawing in (errors.EvidenceError, errors.AttesterError):
        codes |= {kind.code for kind in withdrawing.__subclasses__()}
    codes.remove(errors.SealRefused.code)  # secrets are unsealed before there is a public port
    page = (ROOT / "docs" / "errors.md").read_text().partition("## When the process ends")[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)) == codes


def codes_in(document: object) -> Iterator[str]:
    """Every value of `code` that the schemas of an OpenAPI document allow."""
    if isinstance(document, dict):
        if isinstance(code := document.get("code"), dict):
            yield from code.get("enum", ())
        for value in document.values():
            yield from codes_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from codes_in(value)


@pytest.mark.parametrize(
    "sample", sorted((ROOT / "image" / "config").glob("*.toml")), ids=lambda p: p.name
)
def test_every_sample_configuration_is_valid(sample: Path) -> None:
    load_config(sample)


def test_every_command_of_the_help_is_in_the_readme_or_the_changelog() -> None:
    parser = _parser()
    [commands] = [
        action for action in parser._actions if hasattr(action, "choices") and action.choices
    ]
    text = (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    assert commands.choices
    for command in commands.choices:
        assert f"dcv {command}" in text

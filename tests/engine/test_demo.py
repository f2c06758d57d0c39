"""`just demo` as a newcomer runs it, to its last lines, which the README shows."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest

from tests.engine.conftest import require_engine

pytestmark = pytest.mark.engine


def test_the_demonstration_ends_as_the_readme_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require_engine()
    status = demo.main(tmp_path)
    printed = capfd.readouterr()
    assert status == 0, printed.out + printed.err
    replayed, saved, changed = printed.out.splitlines()[-3:]
    assert replayed == "replayed: reproduced"
    assert saved == "the saved bundle, offline: warning: evidence under the published test root"
    assert changed.startswith("the same, one byte changed: contraindicated: evidence_digest: ")

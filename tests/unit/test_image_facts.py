"""What the image says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import ConfigError
from appliance.serving.image_facts import ImageFacts, read_image_facts

ROOTHASH = "0f" * 32
DIGEST = "sha256:" + "ab" * 32


def tree(folder: Path, *, cmdline: str = f"quiet roothash={ROOTHASH} panic=-1\n") -> Path:
    (folder / "usr/lib").mkdir(parents=True)
    (folder / "proc").mkdir()
    (folder / "usr/lib/os-release").write_text(
        'ID=dcv\nNAME="DCV"\nVERSION_ID=0.1.0\nBUILD_ID="1234abcd"\n# a comment\nodd\n'
    )
    (folder / "proc/cmdline").write_text(cmdline)
    (folder / "digest").write_text(DIGEST + "\n")
    return folder


def test_version_commit_root_and_digest_are_read(tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert read_image_facts(root / "digest", root=root) == ImageFacts(
        version="0.1.0", commit="1234abcd", roothash=ROOTHASH, uki_digest=DIGEST
    )


@pytest.mark.parametrize("text", ["", "ab" * 32, DIGEST.upper(), DIGEST + "0", "\xff"])
def test_a_digest_out_of_form_stops_the_boot(tmp_path: Path, text: str) -> None:
    root = tree(tmp_path)
    (root / "digest").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError):
        read_image_facts(root / "digest", root=root)


@pytest.mark.parametrize("cmdline", ["quiet", "roothash=ab", f"xroothash={ROOTHASH}"])
def test_a_command_line_without_the_root_stops_the_boot(tmp_path: Path, cmdline: str) -> None:
    root = tree(tmp_path, cmdline=cmdline)
    with pytest.raises(ConfigError, match="roothash"):
        read_image_facts(root / "digest", root=root)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        read_image_facts(tmp_path / "nowhere", root=tmp_path)

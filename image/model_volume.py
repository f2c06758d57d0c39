"""Make the volume with the weights: `python3 image/model_volume.py FOLDER --out DISK`.

The disk has two partitions, `dcv-model` (erofs) and `dcv-model-verity` (its dm-verity tree). Beside it,
as DISK.volume, lies what the image needs to open it (systemd/dcv-model.service): give that file to
`image/build.py --model-volume`, and the volume's root hash becomes part of what is measured. The disk
itself need not be trusted, and any number of machines may read it.

The same folder makes the same bytes. What `[model] files` of the configuration has to say is printed:
the gateway holds every file to it, at every start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this is a script, of a folder that is none of Python's

from image.build import make_tools, plan  # noqa: E402
from image.common import BuildError, sha256  # noqa: E402

DEFINITIONS: Final = ROOT / "image/model-volume"
SEED: Final = "5c2b2c94-2c9b-4d4c-9c2a-9f3ee6a3a1b7"
"""Identifiers and the salt come from it; the root hash says which volume it is."""

EPOCH: Final = "0"
"""Every file's time: whoever made the folder when is not part of the model."""


def main() -> int:
    """Returns the exit status: 0 made, 1 something failed and one line says what."""
    parser = argparse.ArgumentParser(
        prog="image/model_volume.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="with config.json and the weights")
    parser.add_argument("--out", type=Path, required=True, help="the disk, to be made")
    arguments = parser.parse_args()
    try:
        build = plan("test", "metal")
        make_tools(build)
        volume = make_volume(build.tools, arguments.folder, arguments.out)
        print("[model.files]")
        for path in sorted(arguments.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(arguments.folder).as_posix()
                print(f"{json.dumps(name)} = {json.dumps(sha256(path))}")
        print(f"model-volume: {volume}", file=sys.stderr)
    except BuildError as error:
        print(f"model-volume: {error}", file=sys.stderr)
        return 1
    return 0


def make_volume(tools: Path, folder: Path, disk: Path) -> Path:
    """The disk, and beside it the file that is returned.

    Args:
        tools: Debian trixie with systemd-repart, mkfs.erofs and libcryptsetup.

    Raises:
        BuildError: no model is there, or the tools failed.
    """
    if not (folder / "config.json").is_file():
        raise BuildError(f"{folder}: there is no config.json")
    if any(path.is_symlink() for path in folder.rglob("*")):
        # A cache of downloads is made of links that lead out of it.
        raise BuildError(f"{folder}: links are not copied; give a folder of plain files")
    disk.unlink(missing_ok=True)
    disk.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dcv-model-", dir=disk.parent) as name:
        made = Path(name)
        done = subprocess.run(
            [
                *("bwrap", "--unshare-net", "--unshare-pid", "--die-with-parent", "--clearenv"),
                *("--ro-bind", tools, "/", "--proc", "/proc", "--dev", "/dev"),
                *("--tmpfs", "/run", "--dir", "/run/model", "--ro-bind", folder, "/run/model"),
                *("--bind", made, "/var/tmp", "--ro-bind", DEFINITIONS, "/mnt"),
                *("--setenv", "PATH", "/usr/bin:/usr/sbin"),
                *("--setenv", "SOURCE_DATE_EPOCH", EPOCH),
                *("--setenv", "SYSTEMD_REPART_MKFS_OPTIONS_EROFS", f"--all-root -T{EPOCH}"),
                *("systemd-repart", "--offline=yes", "--empty=create", "--size=auto"),
                *("--definitions=/mnt", "--root=/run/model", f"--seed={SEED}", "--dry-run=no"),
                *("--json=short", "--no-pager", "/var/tmp/disk"),
            ],
            stdout=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"systemd-repart ended with {done.returncode}")
        hashes = {one["roothash"] for one in json.loads(done.stdout) if one.get("roothash")}
        if len(hashes) != 1:
            raise BuildError("systemd-repart named no root hash")
        shutil.move(made / "disk", disk)
    volume = disk.with_name(f"{disk.name}.volume")
    volume.write_text(
        "DATA=/dev/disk/by-partlabel/dcv-model\n"
        "HASH=/dev/disk/by-partlabel/dcv-model-verity\n"
        f"ROOT={hashes.pop()}\n",
        encoding="utf-8",
    )
    return volume


if __name__ == "__main__":
    sys.exit(main())

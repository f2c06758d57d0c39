"""What the image says about itself, read once at boot.

None of it has to be believed: a relying party looks up what a machine must show that runs the image
of this digest, and compares what the machine's evidence shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ConfigError

OS_RELEASE = Path("usr/lib/os-release")
COMMAND_LINE = Path("proc/cmdline")

MAX_BYTES = 64 << 10

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ROOTHASH = re.compile(r"(?:^|\s)roothash=([0-9a-f]{64})(?=\s|$)")
_ASSIGNMENT = re.compile(r'(?P<name>[A-Z_]+)="?(?P<value>[^"\n]{1,256})"?\Z')


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the image says about itself; None where there is no image, as in development.

    Attributes:
        version, commit: from the measured os-release (`VERSION_ID`, `BUILD_ID`).
        roothash: of the dm-verity root, lowercase hex, from the kernel's command line.
        uki_digest: `sha256:…` of the UKI.
        repo_url: where the source is.
    """

    version: str | None = None
    commit: str | None = None
    roothash: str | None = None
    uki_digest: str | None = None
    repo_url: str | None = None


def read_image_facts(digest_file: Path, *, root: Path) -> ImageFacts:
    """Read them.

    Args:
        digest_file: holds `sha256:…` of the UKI.
        root: the file system's.

    Raises:
        ConfigError: a file cannot be read, or does not say what it should.
    """
    digest = _read(digest_file).strip()
    if not _DIGEST.match(digest):
        raise ConfigError("[attestation] image_digest_file: expected sha256: and 64 hex digits")
    release = {
        found["name"]: found["value"]
        for line in _read(root / OS_RELEASE).splitlines()
        if (found := _ASSIGNMENT.match(line.strip()))
    }
    roothash = _ROOTHASH.search(_read(root / COMMAND_LINE))
    if roothash is None:
        raise ConfigError("the kernel's command line: expected roothash=")
    return ImageFacts(
        version=release.get("VERSION_ID"),
        commit=release.get("BUILD_ID"),
        roothash=roothash[1],
        uki_digest=digest,
        repo_url=release.get("HOME_URL"),
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text") from error

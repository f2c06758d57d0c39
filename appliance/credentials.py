"""Secrets that the appliance is handed: read once, sent where they belong, shown nowhere.

systemd puts each into a file of its own in a folder of memory (systemd.exec(5), LoadCredential=);
`cli` says which folder. The configuration names the file and never holds what is in it. In the
image they come out of the machine's TPM (`attester.unseal`).
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from appliance.config import Attestation
from appliance.errors import ConfigError

MAX_SECRET_BYTES = 512
"""Of a credential; one that is sealed has room for less (`wire.sealed`)."""

_SECRET = re.compile(rb"[\x21-\x7e]+\Z")
"""Printable ASCII without blanks: what a header takes as it is, and a message cannot break on."""


class Secret:
    """A text that only `reveal` gives out: no `repr`, format, comparison or pickle shows it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text, for whoever it is meant for."""
        return self._text

    def __repr__(self) -> str:
        return "Secret()"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written down")


@dataclass(frozen=True, slots=True)
class VendorKeys:
    """What vendors' services know this operator by; None where none is configured.

    Attributes:
        nvidia: a bearer token for NVIDIA's attestation services. intel: a subscription key.
    """

    nvidia: Secret | None = None
    intel: Secret | None = None


NO_KEYS = VendorKeys()


def read_vendor_keys(attestation: Attestation, folder: Path | None) -> VendorKeys:
    """The keys whose credentials the configuration names.

    Args:
        folder: with the credentials; None where the process was given none.

    Raises:
        ConfigError: one is named and not there, or is no secret. The message names the key of the
            configuration and the credential.
    """

    def read(setting: str, name: str) -> Secret | None:
        if not name:
            return None
        where = f"[attestation] {setting}: the credential `{name}`"
        if folder is None:
            raise ConfigError(f"{where}: this process was given no credentials")
        return Secret(_read(folder / name, where))

    return VendorKeys(
        nvidia=read("nvidia_service_key", attestation.nvidia_service_key),
        intel=read("intel_pcs_key", attestation.intel_pcs_key),
    )


def is_secret(data: bytes) -> bool:
    """Whether these bytes are one: printable ASCII without blanks or line ends."""
    return _SECRET.match(data) is not None


def _read(path: Path, where: str) -> str:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ConfigError(f"{where}: expected a file")
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    if len(data) > MAX_SECRET_BYTES or not is_secret(data):
        raise ConfigError(
            f"{where}: expected 1 to {MAX_SECRET_BYTES} printable characters, no blanks, no line end"
        )
    return data.decode("ascii")

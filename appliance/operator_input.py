"""What the operator may say to an image somebody else built: one small TOML file.

The measured file lies in the image; this one comes from a disk or the cloud's metadata, from
whoever runs the machine, and no reference value vouches for it. So it can only tighten: it adds
what the measured file's `[operator]` section makes room for, lowers limits, and is refused where it
says anything else. Its sections and keys are spelt like those of the measured file:

    [auth]
    keys = [{name = "alice", sha256 = "…", max_concurrent = 8}]
    [tls]
    names = ["inference.example.com"]
    chain_file = "/run/dcv/config/chain.pem"
    [limits]
    max_concurrent = 64
    [attestation]
    nvidia_service_key = "sealed_nvidia"

The digest of its exact bytes is told to clients, who may want to know that it has not changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from appliance.config import (
    ApiKey,
    CredentialName,
    Limits,
    MeasuredConfig,
    Name,
    check_config,
    parse_toml,
    require_keys,
)
from appliance.errors import ConfigError

MAX_BYTES = 2 << 20
"""Of the file; 10 000 keys are half of it."""

LowerLimits = msgspec.defstruct(
    "LowerLimits",
    [(field.name, field.type | None, None) for field in msgspec.structs.fields(Limits)],
    frozen=True,
    forbid_unknown_fields=True,
)
"""`[limits]` as in the measured file, each key optional."""


class GivenAuth(Struct, frozen=True, forbid_unknown_fields=True):
    """`[auth]`: API keys to add."""

    keys: Annotated[tuple[ApiKey, ...], Meta(max_length=10_000)] = ()


class GivenTls(Struct, frozen=True, forbid_unknown_fields=True):
    """`[tls]`: names to be known by, and where a certificate chain for this boot's key appears."""

    names: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=32)] | None = None
    chain_file: Name | None = None


class GivenAttestation(Struct, frozen=True, forbid_unknown_fields=True):
    """`[attestation]`: the credentials with the operator's own keys of vendors' services."""

    nvidia_service_key: CredentialName = ""
    intel_pcs_key: CredentialName = ""


class GivenSections(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    auth: GivenAuth = GivenAuth()
    tls: GivenTls = GivenTls()
    attestation: GivenAttestation = GivenAttestation()
    limits: LowerLimits = LowerLimits()  # type: ignore[valid-type]  # made from the declarations


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """A decoded file; what it says is not yet allowed (`tighten`).

    Attributes:
        keys: API keys to add.
        names: for `[tls] names`; None leaves them.
        chain_file: for `[tls] chain_file`, absolute; None leaves it.
        credentials: names of those that are given, by key of `[attestation]`.
        limits: those that are given, by name.
        digest: `sha256:` and the hex SHA-256 of the file's exact bytes.
    """

    keys: tuple[ApiKey, ...]
    names: tuple[str, ...] | None
    chain_file: str | None
    credentials: dict[str, str]
    limits: dict[str, int | float]
    digest: str


def load_operator_input(path: Path) -> OperatorInput:
    """Read and decode a file.

    Raises:
        ConfigError: unreadable, too large, or as for `parse_operator_input`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the operator's input: {error.strerror}") from error
    return parse_operator_input(data, folder=path.resolve().parent)


def parse_operator_input(data: bytes, *, folder: Path) -> OperatorInput:
    """Decode the bytes of a file; a relative path is taken from `folder`.

    Raises:
        ConfigError: too large, not UTF-8, not TOML, an unknown key, a wrong type, out of bounds.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the operator's input: expected at most {MAX_BYTES} bytes")
    try:
        sections = parse_toml(data.decode("utf-8"), GivenSections)
    except UnicodeDecodeError as error:
        raise ConfigError("the operator's input: not UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"the operator's input: {error.message}") from error
    limits = msgspec.structs.asdict(sections.limits)
    chain_file = sections.tls.chain_file
    return OperatorInput(
        keys=sections.auth.keys,
        names=sections.tls.names,
        chain_file=None if chain_file is None else str(folder / chain_file),
        credentials={
            key: name for key, name in msgspec.structs.asdict(sections.attestation).items() if name
        },
        limits={name: value for name, value in limits.items() if value is not None},
        digest="sha256:" + hashlib.sha256(data).hexdigest(),
    )


def tighten(config: MeasuredConfig, given: OperatorInput) -> MeasuredConfig:
    """The measured configuration with what the operator gave.

    Raises:
        ConfigError: it would allow more than the measured file does, or the two contradict each
            other; the message names the key.
    """
    _check_keys(config, given)
    _check_names(config, given)
    _check_chain_file(config, given)
    _check_credentials(config, given)
    _check_limits(config, given)
    replace = msgspec.structs.replace
    tightened = replace(
        config,
        auth=replace(config.auth, keys=config.auth.keys + given.keys),
        tls=replace(
            config.tls,
            names=config.tls.names if given.names is None else given.names,
            chain_file=config.tls.chain_file if given.chain_file is None else given.chain_file,
        ),
        attestation=replace(config.attestation, **given.credentials),
        limits=replace(config.limits, **given.limits),
    )
    check_config(tightened)
    require_keys(tightened)
    return tightened


def _check_keys(config: MeasuredConfig, given: OperatorInput) -> None:
    if given.keys and config.auth.mode != "keys":
        raise ConfigError(
            f"the operator's input: [auth] keys: [auth] mode is `{config.auth.mode}`, not `keys`"
        )
    if len(given.keys) > config.operator.max_keys:
        raise ConfigError(
            f"the operator's input: [auth] keys: [operator] max_keys is {config.operator.max_keys},"
            f" got {len(given.keys)}"
        )


def _check_names(config: MeasuredConfig, given: OperatorInput) -> None:
    domains = config.operator.domains
    for name in given.names or ():
        if "*" not in domains and not any(_within(name, domain) for domain in domains):
            raise ConfigError(
                f"the operator's input: [tls] names: `{name}` is not within [operator] domains"
            )


def _within(name: str, domain: str) -> bool:
    """Whether a name is a domain or below it; by labels, and case does not matter (RFC 4343)."""
    return f".{name}".lower().endswith(f".{domain}".lower())


def _check_chain_file(config: MeasuredConfig, given: OperatorInput) -> None:
    if given.chain_file is None:
        return
    if config.operator.chain_file != "accepted":
        raise ConfigError(
            "the operator's input: [tls] chain_file: [operator] chain_file refuses it"
        )
    if config.tls.chain_file:
        raise ConfigError("the operator's input: [tls] chain_file: the measured file has its own")


def _check_credentials(config: MeasuredConfig, given: OperatorInput) -> None:
    """Where they are sent is for the measured file to say; that they are is no concession."""
    for key in given.credentials:
        where = f"the operator's input: [attestation] {key}"
        if config.operator.credentials != "accepted":
            raise ConfigError(f"{where}: [operator] credentials refuses it")
        if getattr(config.attestation, key):
            raise ConfigError(f"{where}: the measured file has its own")


def _check_limits(config: MeasuredConfig, given: OperatorInput) -> None:
    for name, value in given.limits.items():
        measured = getattr(config.limits, name)
        if not value <= measured:
            raise ConfigError(
                f"the operator's input: [limits] {name}: expected at most {measured}, got {value}"
            )

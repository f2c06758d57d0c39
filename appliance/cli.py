"""The `dcv` command: arguments in, exit status out. Everything else is elsewhere."""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from appliance import __version__
from appliance.config import ApiKey, effective_config, load_config, require_keys
from appliance.credentials import read_vendor_keys
from appliance.engine.command import parse_extra_args
from appliance.errors import EX_SOFTWARE, EX_USAGE, ConfigError
from appliance.log import configure_log
from appliance.notify import Notifier
from appliance.operator_input import load_operator_input, tighten
from appliance.run import run
from appliance.serving.auth import create_key, hash_key
from appliance.serving.keys import close_memory
from appliance.verifier.chat import add_chat
from appliance.verifier.commands import add_appraise
from appliance.verifier.proxy import add_proxy
from appliance.verifier.receipt_command import add_receipt
from appliance.verifier.replay import add_replay
from appliance.verifier.verify_command import add_verify

DEFAULT_ATTESTER_SOCKET = "/run/dcv-attester/attester.sock"
FIRST_INHERITED = 3
"""SD_LISTEN_FDS_START."""

DEFAULT_STATUS_SOCKET = "/run/dcv/status.sock"
STATUS_TIMEOUT_S = 5.0
MAX_STATUS_BYTES = 1 << 20

GARBAGE_OBJECTS = 10_000
"""More than before, until garbage is looked for; a few megabytes of it at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.command(arguments)
    return status


def serve_command(arguments: argparse.Namespace) -> int:
    """`dcv serve`: boot and serve, or only check the configuration."""
    try:
        config, operator_input_digest = load_config(arguments.config), None
        if arguments.operator_input is not None:
            given = load_operator_input(arguments.operator_input)
            config, operator_input_digest = tighten(config, given), given.digest
        parse_extra_args(config.engine.extra_args)
        if arguments.check:  # on any machine: no secret is looked for
            print(json.dumps(effective_config(config), indent=2))
            return 0
        require_keys(config)
        close_memory()
        vendor_keys = read_vendor_keys(config.attestation, _credentials(os.environ))
    except ConfigError as error:
        return _refuse(error)
    _calm_garbage_collector()
    log = configure_log(format=config.log.format, level=config.log.level)
    notifier = Notifier.from_environment(os.environ, pid=os.getpid())
    try:
        ended_by = trio.run(
            partial(
                run,
                config,
                log=log,
                notifier=notifier,
                operator_input_digest=operator_input_digest,
                vendor_keys=vendor_keys,
            )
        )
    except Exception:  # noqa: BLE001  # `run` logs every other; what cannot be logged is not printed
        status = EX_SOFTWARE
    else:
        status = 0 if ended_by is None else ended_by.exit_status
    _give_up_unwritten_log()
    return status


def _credentials(environment: Mapping[str, str]) -> Path | None:
    """The folder that systemd put credentials into (systemd.exec(5)); None without any."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    return Path(folder) if folder else None


def _refuse(error: ConfigError) -> int:
    """Said on standard error; returns the exit status."""
    print(f"dcv: {error.message}\ndcv: {error.advice}", file=sys.stderr)
    return error.exit_status


def _calm_garbage_collector() -> None:
    """Look for cycles less often, and never among what was imported, which stays anyway.

    Python does after every 700 objects more than before. Of 256 requests at once each holds some
    hundreds, so that it would look at all of them again and again (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)


def _give_up_unwritten_log() -> None:
    """What standard error could not take is not tried again at exit: the interpreter would make
    its failure the exit status (120)."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = None


def attester_command(arguments: argparse.Namespace) -> int:
    """`dcv attester`: collect evidence for one gateway, until it is gone."""
    # Only here: the gateway's process never imports what talks to devices.
    from appliance.attester.main import run_attester  # noqa: PLC0415

    try:
        config = load_config(arguments.config)
    except ConfigError as error:
        return _refuse(error)
    log = configure_log(format=config.log.format, level=config.log.level)
    where = _inherited_socket(os.environ, os.getpid())
    return trio.run(
        partial(
            run_attester,
            arguments.socket if where is None else where,
            config.attestation,
            gateway=arguments.gateway or str(os.getuid()),
            log=log,
        )
    )


def unseal_command(arguments: argparse.Namespace) -> int:
    """`dcv unseal`: what was sealed to this machine's TPM, into files for systemd."""
    from appliance.attester.unseal import run_unseal  # noqa: PLC0415  # as above

    try:
        config = load_config(arguments.config)
    except ConfigError as error:
        return _refuse(error)
    log = configure_log(format=config.log.format, level=config.log.level)
    return trio.run(
        partial(run_unseal, config.attestation, arguments.sealed, arguments.out, log=log)
    )


def _inherited_socket(environment: Mapping[str, str], pid: int) -> int | None:
    """The one descriptor that systemd hands over (sd_listen_fds(3)); None without any."""
    if environment.get("LISTEN_PID") != str(pid) or environment.get("LISTEN_FDS") != "1":
        return None
    return FIRST_INHERITED


def new_key_command(arguments: argparse.Namespace) -> int:
    """`dcv keys new NAME`: the key to standard output, what to store of it to standard error."""
    key = create_key(secrets.token_bytes)
    entry = {"name": arguments.name, "sha256": hash_key(key)}
    try:
        msgspec.convert(entry, ApiKey, strict=True)
    except msgspec.ValidationError:
        print("dcv: NAME: expected 1 to 64 letters, digits, `.`, `_` or `-`", file=sys.stderr)
        return EX_USAGE
    print(key)
    print(
        f"# add to the configuration; the key above is shown only now\n"
        f'[[auth.keys]]\nname = "{entry["name"]}"\nsha256 = "{entry["sha256"]}"',
        file=sys.stderr,
    )
    return 0


def status_command(arguments: argparse.Namespace) -> int:
    """`dcv status`: 0 serving, 1 not serving, 2 nobody answers."""
    document = _ask_status(arguments.socket)
    if document is None:
        return 2
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _print_status(document)
    return 0 if document.get("status") == "serving" else 1


def csr_command(arguments: argparse.Namespace) -> int:
    """`dcv csr`: 0 printed, 1 there is no key yet, 2 nobody answers."""
    document = _ask_status(arguments.socket)
    if document is None:
        return 2
    match document.get("tls"):
        case {"csr": str(csr)}:
            print(csr, end="")
            return 0
        case _:
            print("dcv: the appliance has no TLS key yet: it has just started", file=sys.stderr)
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcv", description="Confidential, verifiable LLM inference: the appliance."
    )
    parser.add_argument("--version", action="version", version=f"dcv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="boot the appliance and serve",
        description="Boot in numbered stages, then serve until SIGTERM, which drains.",
        epilog="Exit status: 0 stopped in order, 69 the engine did not start or evidence could "
        "not be had, 70 the engine died or a defect, 71 the port cannot be opened, 77 the evidence "
        "does not hold, 78 the configuration or the model is wrong.",
    )
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file")
    serve.add_argument(
        "--operator-input",
        type=Path,
        metavar="FILE",
        help="TOML file of the operator's, which may only tighten what the configuration allows",
    )
    serve.add_argument(
        "--check", action="store_true", help="validate, print the effective configuration, exit"
    )
    serve.set_defaults(command=serve_command)

    attester = commands.add_parser(
        "attester",
        help="collect evidence for the appliance (its own unit starts this)",
        description="Collect this machine's evidence for one gateway, over a Unix socket of which "
        "there is one connection, ever. Ends with it, or on SIGTERM.",
        epilog="Exit status: 0 ended in order, 69 the socket or the gateway failed, 78 the "
        "configuration is wrong.",
    )
    attester.add_argument(
        "--socket",
        type=Path,
        default=Path(DEFAULT_ATTESTER_SOCKET),
        metavar="PATH",
        help="to listen on, unless systemd hands one over; default: %(default)s",
    )
    attester.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file")
    attester.add_argument(
        "--gateway", metavar="USER", help="who may connect, name or number; default: this user"
    )
    attester.set_defaults(command=attester_command)

    unseal = commands.add_parser(
        "unseal",
        help="have the TPM give out sealed secrets (its own unit starts this)",
        description="Write the public part of the TPM's storage key, and each secret that was sealed "
        "to it for what this machine has booted (image/seal.py).",
        epilog="Exit status: 0 all of them, 69 the TPM failed, 77 it gives one out no more, 78 the "
        "configuration is wrong or there is no TPM.",
    )
    unseal.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file")
    unseal.add_argument(
        "--sealed", type=Path, required=True, metavar="FILE", help="lines of image/seal.py; or none"
    )
    unseal.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="gets storage-key and secrets/NAME",
    )
    unseal.set_defaults(command=unseal_command)

    keys = commands.add_parser("keys", help="API keys")
    key_commands = keys.add_subparsers(required=True, metavar="COMMAND")
    new = key_commands.add_parser(
        "new",
        help="make an API key",
        description="Print a new key on standard output, once, and the line for the configuration "
        "on standard error. Only the line is stored anywhere.",
    )
    new.add_argument("name", help="for you: letters, digits, `.`, `_`, `-`")
    new.set_defaults(command=new_key_command)

    status = commands.add_parser(
        "status",
        help="what a running appliance is doing",
        description="Ask the appliance on its local socket.",
        epilog="Exit status: 0 serving, 1 not serving, 2 no answer.",
    )
    _add_socket(status)
    status.add_argument("--json", action="store_true", help="the document as it is")
    status.set_defaults(command=status_command)

    csr = commands.add_parser(
        "csr",
        help="the certificate request for a running appliance's TLS key",
        description="Ask the appliance on its local socket and print the request as PEM. The key "
        "lives one boot. From elsewhere: GET /.well-known/dcv/csr.",
        epilog="Exit status: 0 printed, 1 no key yet, 2 no answer.",
    )
    _add_socket(csr)
    csr.set_defaults(command=csr_command)

    add_verify(commands)
    add_receipt(commands)
    add_replay(commands)
    add_chat(commands)
    add_proxy(commands)
    add_appraise(commands)
    return parser


def _add_socket(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--socket", default=DEFAULT_STATUS_SOCKET, metavar="PATH", help="default: %(default)s"
    )


def _ask_status(path: str) -> dict[str, object] | None:
    """The status document; None, and said on standard error, when no appliance answers."""
    try:
        return _read_status(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "what answers is no appliance"
        print(f"dcv: no appliance at {path}: {reason}", file=sys.stderr)
        return None


def _read_status(path: str) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(STATUS_TIMEOUT_S)
        connection.connect(path)
        data = b""
        while (part := connection.recv(65_536)) and len(data) < MAX_STATUS_BYTES:
            data += part
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("expected an object")  # noqa: TRY004  # bad bytes, not a bad call
    return document


def _print_status(document: dict[str, object]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in document.items():
        table.add_row(f"[bold]{name}[/bold]", _words(value))
    Console().print(table)


def _words(value: object) -> str:
    """On one line; what has several (the CSR) has a command of its own."""
    if isinstance(value, dict):
        return " ".join(
            f"{key}={item}"
            for key, item in value.items()
            if item not in ("", None) and "\n" not in str(item)
        )
    return "none" if value is None else str(value)

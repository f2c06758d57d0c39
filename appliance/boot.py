"""The boot, in numbered stages. Nothing listens on the public port before stage 10.

    1 configuration   the settings make sense together; the engine's command can be made
    2 keys            the TLS key is born; its certificate is written for clients; the authorities
                      of client certificates are read
    5 model           every weight file is the one the configuration names
    7 engine          started, ready, reachable from loopback only
    10 listener       opened by `run`, which then says READY=1

The numbers are those of the whole design; stages 3, 4, 6, 8 and 9 (attester, GPU evidence, GPU
ready state, golden self-test, self-verification) belong to attestation, which is not there yet.

Each stage logs one line, shows in the lifecycle, has a deadline, and fails as a BootError that
names it.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from appliance.config import MeasuredConfig
from appliance.engine.command import EngineCommand, EngineKeys, engine_command
from appliance.engine.process import RunningEngine, available_threads, choose_port
from appliance.engine.weights import verify_model_files
from appliance.errors import (
    ApplianceError,
    BootError,
    CertificateRefused,
    ConfigError,
    EngineStartFailed,
)
from appliance.log import Log
from appliance.serving.certificates import parse_client_authorities, read_certificates
from appliance.serving.keys import TlsIdentity, create_tls_identity
from appliance.serving.lifecycle import Lifecycle
from appliance.serving.tokenizing import ModelTokenizer, load_tokenizer

QUICK_S = 60.0
"""For a stage that only computes."""

SLACK_S = 60.0
"""Beyond a stage's own deadline, so that its own error comes first."""

KEY_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Booted:
    """What the stages before the listener made."""

    tls: TlsIdentity
    tls_context: ssl.SSLContext
    engine: RunningEngine
    tokenizer: ModelTokenizer | None


StartEngine = Callable[[EngineCommand, EngineKeys], Awaitable[RunningEngine]]


async def boot(
    config: MeasuredConfig,
    *,
    start_engine: StartEngine,
    publish_tls: Callable[[TlsIdentity], None],
    lifecycle: Lifecycle,
    log: Log,
    now: Callable[[], datetime.datetime],
    random: Callable[[int], bytes],
) -> Booted:
    """Run stages 1 to 7.

    Args:
        start_engine: starts supervision in a nursery of the caller's and returns once the engine
            is ready; the caller ends it.
        publish_tls: told the TLS key as soon as it is born, so that an operator can have a
            certificate made while the model loads.
        now: timezone-aware wall clock. random: so many random bytes.

    Raises:
        BootError: the first stage that failed, and why.
    """

    async def stage(
        number: int, name: str, deadline_s: float, step: Callable[[], Awaitable[T]]
    ) -> T:
        return await run_stage(
            number, name, step, deadline_s=deadline_s, lifecycle=lifecycle, log=log
        )

    # 1. Configuration. It was decoded before we were called; this makes what follows from it.
    keys = EngineKeys(api=random(KEY_BYTES).hex(), admin=random(KEY_BYTES).hex())
    command = await stage(1, "configuration", QUICK_S, partial(_command, config, keys))
    # 2. Keys, one role each.
    tls, tls_context = await stage(2, "keys", QUICK_S, partial(_tls, config, now))
    publish_tls(tls)
    # 5. Weights. In the image dm-verity vouches for the volume; here every file is hashed.
    tokenizer = await stage(
        5, "model", config.engine.ready_deadline_s, partial(_model, config, lifecycle)
    )
    # 7. Engine.
    engine = await stage(
        7,
        "engine",
        config.engine.ready_deadline_s + SLACK_S,
        partial(start_engine, command, keys),
    )
    return Booted(tls=tls, tls_context=tls_context, engine=engine, tokenizer=tokenizer)


async def run_stage(
    number: int,
    name: str,
    step: Callable[[], Awaitable[T]],
    *,
    deadline_s: float,
    lifecycle: Lifecycle,
    log: Log,
) -> T:
    """Run one stage: announce it, bound it, log how long it took.

    Raises:
        BootError: it failed, or did not end within its deadline.
    """
    lifecycle.begin_stage(number, name)
    started = trio.current_time()
    try:
        with trio.fail_after(deadline_s):
            result = await step()
    except trio.TooSlowError:
        cause = EngineStartFailed(f"expected it to end within {deadline_s:g} s")
        raise BootError(number, name, cause) from None
    except ApplianceError as error:
        raise BootError(number, name, error) from error
    log.info("boot_stage", stage=number, name=name, s=round(trio.current_time() - started, 3))
    return result


async def _command(config: MeasuredConfig, keys: EngineKeys) -> EngineCommand:
    return engine_command(
        config.engine,
        config.model,
        port=choose_port(),
        keys=keys,
        threads=available_threads(),
    )


async def _tls(
    config: MeasuredConfig, now: Callable[[], datetime.datetime]
) -> tuple[TlsIdentity, ssl.SSLContext]:
    try:
        identity = create_tls_identity(config.tls.names, now=now())
    except ValueError as error:
        raise ConfigError(f"[tls] names: {error}") from error
    if config.tls.certificate_file:
        write_public_file(Path(config.tls.certificate_file), identity.certificate)
    if not config.tls.client_ca_file:
        return identity, identity.server_context()
    try:
        authorities = parse_client_authorities(read_certificates(Path(config.tls.client_ca_file)))
        return identity, identity.server_context(client_cas=authorities)
    except CertificateRefused as error:
        raise ConfigError(f"[tls] client_ca_file: {error.message}") from error
    except ssl.SSLError as error:
        raise ConfigError(f"[tls] client_ca_file: OpenSSL says {error.reason}") from error


async def _model(config: MeasuredConfig, lifecycle: Lifecycle) -> ModelTokenizer | None:
    def report(detail: str) -> None:
        trio.from_thread.run_sync(lifecycle.describe, detail)

    await trio.to_thread.run_sync(
        partial(verify_model_files, config.model, progress=report), abandon_on_cancel=True
    )
    return await trio.to_thread.run_sync(load_tokenizer, Path(config.model.path))


def write_public_file(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all, mode 0644.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error

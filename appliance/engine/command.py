"""How SGLang is started: a pure function from the configuration.

Every setting travels in a file that only we and the engine can read (`--config FILE.yaml`), so
that no key is ever on a command line. The file is JSON, which YAML 1.1 reads, without floats in
exponent form, which PyYAML would read as strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from appliance.config import REFUSED_ENGINE_ARGUMENTS, Engine, Model
from appliance.engine.client import LOOPBACK
from appliance.errors import ConfigError
from appliance.wire.canonical import JsonValue

# Other spellings of options that are ours. Ours stand last in the file and win anyway; an
# operator who writes one should still hear that it has no effect.
_OUR_ALIASES = frozenset(
    {
        "api-key",
        "admin-api-key",
        "attention-backend",
        "context-length",
        "data-parallel-size",
        "device",
        "dist-init-addr",
        "dp",
        "dp-size",
        "dtype",
        "enable-deterministic-inference",
        "enable-metrics",
        "host",
        "is-embedding",
        "max-running-requests",
        "max-total-tokens",
        "mem-fraction-static",
        "model",
        "model-path",
        "nccl-init-addr",
        "nnodes",
        "node-rank",
        "port",
        "random-seed",
        "reasoning-parser",
        "served-model-name",
        "sleep-on-idle",
        "stream-interval",
        "tensor-parallel-size",
        "tool-call-parser",
        "tp",
        "tp-size",
    }
)


_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_NUMBER = re.compile(r"-[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class EngineKeys:
    """Bearer keys of one engine start. Both are needed: without an admin key SGLang's
    administrative endpoints accept the ordinary one."""

    api: str = field(repr=False)
    admin: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """Everything one engine start needs.

    Attributes:
        argv: the program and its arguments; free of secrets.
        environment: the whole environment of the child, nothing is inherited.
        settings_text: content of the settings file, with the keys in it.
        settings_file, init_file: below the runtime folder; the second is torch's rendezvous.
        port: of the engine's HTTP server, on loopback.
        readable, writable: files and folders, with all that is in them, which the engine may read
            and execute, and which it may change. No others (engine/confine.py).
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    settings_text: str = field(repr=False)
    settings_file: Path
    init_file: Path
    port: int
    readable: tuple[str, ...]
    writable: tuple[str, ...]


SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/sbin", "/etc", "/proc", "/sys")
"""Programs and libraries of the machine, and what numeric libraries look up about it."""

SCRATCH_FOLDERS = ("/tmp", "/dev/shm")  # noqa: S108  # in the image both belong to dcv.service alone
"""ZeroMQ's sockets and Prometheus' counters; memory shared between SGLang's processes."""


def engine_command(
    engine: Engine, model: Model, *, port: int, keys: EngineKeys, threads: int
) -> EngineCommand:
    """The command for one start.

    Args:
        port: a free TCP port on loopback for the engine's HTTP server.
        threads: CPU threads for numeric libraries; processors available to us.

    Raises:
        ConfigError: `extra_args` names an option that is ours or refused.
    """
    runtime = Path(engine.runtime_dir)
    settings_file = runtime / "settings.yaml"
    init_file = runtime / "torch.init"
    program = engine.unsafe_command or (engine.python, "-m", "sglang.launch_server")
    settings = effective_settings(engine, model)
    settings |= {"host": LOOPBACK, "port": port, "api-key": keys.api, "admin-api-key": keys.admin}
    return EngineCommand(
        argv=(*program, "--config", str(settings_file)),
        environment=_environment(engine, runtime=runtime, init_file=init_file, threads=threads),
        # Not ASCII alone: YAML reads the two escapes of a surrogate pair as two characters.
        settings_text=json.dumps(settings, indent=1, ensure_ascii=False) + "\n",
        settings_file=settings_file,
        init_file=init_file,
        port=port,
        readable=_readable(engine, model),
        writable=(str(runtime), *SCRATCH_FOLDERS),
    )


def effective_settings(engine: Engine, model: Model) -> dict[str, JsonValue]:
    """All options the engine is given, but for its address and its keys.

    Raises:
        ConfigError: as for `parse_extra_args`; or one of them is ours on this device.
    """
    extra, ours = parse_extra_args(engine.extra_args), engine_settings(engine, model)
    if both := extra.keys() & ours.keys():
        raise ConfigError(
            f"[engine] extra_args: `{min(both)}` may not be set with these [engine] settings"
        )
    return {**extra, **ours}


def engine_settings(engine: Engine, model: Model) -> dict[str, JsonValue]:
    """SGLang's options as the configuration means them, without address and keys.

    These decide what the engine computes; they are what a settings digest covers.
    """
    settings: dict[str, JsonValue] = {
        "model-path": model.path,
        "served-model-name": model.id,
        "device": engine.device,
        "dtype": engine.dtype,
        "attention-backend": engine.attention_backend,
        "enable-deterministic-inference": engine.deterministic,
        "random-seed": engine.random_seed,
        "tp-size": engine.tensor_parallel,
        "dp-size": engine.data_parallel,
        "stream-interval": engine.stream_interval,
        "enable-metrics": True,
        "log-level": "info",
        # Access lines; they hold paths and status only, and we have our own.
        "log-level-http": "warning",
    }
    if engine.device == "cpu":
        settings["sleep-on-idle"] = True  # else the scheduler spins on a core we share
        if engine.deterministic:
            # Where a long prompt is cut depends on who else is served, and torch_native rounds
            # otherwise behind another cut (docs/determinism.md). So none is cut.
            settings["chunked-prefill-size"] = -1
            # For a whole prompt SGLang would set aside more memory than a small machine has.
            settings["mem-fraction-static"] = 0.5
    if model.task == "embed":
        settings["is-embedding"] = True
        # SGLang salts no embedding's prefix, so tenants would share what is cached of theirs.
        settings["disable-radix-cache"] = True
    optional: dict[str, JsonValue] = {
        "context-length": engine.context_length,
        "mem-fraction-static": engine.memory_fraction,
        "max-running-requests": engine.max_running_requests,
        "max-total-tokens": engine.max_total_tokens,
        "tool-call-parser": engine.tool_call_parser or None,
        "reasoning-parser": engine.reasoning_parser or None,
    }
    settings |= {name: value for name, value in optional.items() if value is not None}
    if engine.nodes > 1:
        settings |= {
            "nnodes": engine.nodes,
            "node-rank": engine.node_rank,
            "dist-init-addr": engine.coordinator,
        }
    return settings


def parse_extra_args(arguments: Iterable[str]) -> dict[str, JsonValue]:
    """`name=value` and `name` (a flag) as settings.

    argparse accepts any unambiguous prefix of an option, so a prefix of one of ours is ours too.

    Raises:
        ConfigError: the name is ours, or refused because it would log content, listen beyond
            loopback or run what was not measured.
    """
    settings: dict[str, JsonValue] = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"[engine] extra_args: expected `name=value`, got `{argument}`")
        if value.startswith("-") and not _NUMBER.fullmatch(value):
            # SGLang makes argv of its file: `lora-paths=--log-requests` would be two options.
            raise ConfigError(f"[engine] extra_args: `{name}` may not have a value like an option")
        if any(ours.startswith(name) for ours in _OUR_ALIASES):
            raise ConfigError(
                f"[engine] extra_args: `{name}` has its own key in [engine] or [model]"
            )
        if any(
            refused.startswith(name) or name.startswith(refused)
            for refused in REFUSED_ENGINE_ARGUMENTS
        ):
            raise ConfigError(f"[engine] extra_args: `{name}` may not be set")
        settings[name] = value if equals else True
    return settings


def _readable(engine: Engine, model: Model) -> tuple[str, ...]:
    if engine.unsafe_command:
        return ("/",)  # a program of which nothing is known
    named = (
        value for value in parse_extra_args(engine.extra_args).values() if isinstance(value, str)
    )
    return (
        *SYSTEM_FOLDERS,
        str(Path(engine.python).parent.parent),  # the environment: bin/python is two below
        *engine.python_path,
        model.path,
        *(value for value in named if value.startswith("/")),
    )


def _environment(engine: Engine, *, runtime: Path, init_file: Path, threads: int) -> dict[str, str]:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(runtime),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the working directory is no place to import from
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if engine.nodes == 1:
        # torch's TCP store would listen on every interface, whatever --host says.
        environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{init_file}"
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["NCCL_SOCKET_IFNAME"] = "lo"
    if engine.python_path:
        environment["PYTHONPATH"] = ":".join(engine.python_path)
    if engine.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # By default OpenMP's threads spin at every barrier, also while the one they wait for is
        # not running: beside one other busy process that made each product seven times slower.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        # SGLang's seeded sampler is under torch.compile: the first sampled request would wait for a
        # C compiler (5 to 25 s measured), and there is none in an image.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment

"""`just serve`: the appliance in the foreground, with the development configuration.

    python image/development/serve.py [--engine real|fake] [--config FILE] [dcv serve options]

Writes `.run/dcv.toml` for what this machine has and becomes `dcv serve`. State, logs and the
certificate to trust (`tls.pem`) lie beside it. With `--config` it uses that file instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from paths import ENGINE_CPU_PATH, ENGINE_PYTHON, LAYOUT, model_digests, model_directory

MODEL_ID: Final = "smollm2-135m-instruct"
PORT: Final = 8443
FAKE_ENGINE: Final = LAYOUT.root / "tests" / "fakes" / "sglang_engine.py"
POLICY: Final = {"tee_types": ["unsafe_simulated"], "gpus": "unsafe_simulated"}
"""Of the simulated hardware, for the appliance and for whoever verifies it."""

NVIDIA_DEVICE: Final = Path("/dev/nvidiactl")


def development_config(*, engine: str, port: int) -> str:
    """The configuration file, as TOML, for this machine.

    Args:
        engine: `real` or `fake` (the tests' stand-in).
        port: of the public listener on loopback.
    """
    gpu = NVIDIA_DEVICE.exists()
    listen: dict[str, object] = {"port": port}
    tls: dict[str, object] = {"certificate_file": "tls.pem"}
    model: dict[str, object] = {
        "id": MODEL_ID,
        "path": str(model_directory()),
        "max_model_len": 8192,
    }
    settings: dict[str, object] = {
        "runtime_dir": "engine",
        "device": "cuda" if gpu else "cpu",
        # On a CPU 32-bit floats: fast enough at this size.
        "dtype": "bfloat16" if gpu else "float32",
        "attention_backend": "fa3" if gpu else "torch_native",
        "max_running_requests": 16,
        "tool_call_parser": "pythonic",
        "max_total_tokens": 32768,
        "ready_deadline_s": 900.0,
        "stop_grace_s": 20.0,
    }
    if engine == "fake":
        settings["unsafe_command"] = [sys.executable, str(FAKE_ENGINE)]
    else:
        settings["python"] = str(ENGINE_PYTHON)
        settings["python_path"] = [] if gpu else [str(ENGINE_CPU_PATH)]
    sections: dict[str, Mapping[str, object]] = {
        "listen": listen,
        "tls": tls,
        "auth": {"mode": "loopback"},
        "attestation": {"cpu": "simulated", "gpu": "simulated"},
        "policy": POLICY,
        "limits": {"drain_s": 10.0},
        "engine": settings,
        "model": model,
        "model.files": model_digests(),
    }
    return "\n".join(_section(name, values) for name, values in sections.items())


def write_config(folder: Path, *, engine: str, port: int) -> Path:
    """Write the configuration below `folder`; returns its path."""
    if not model_directory().exists():
        raise SystemExit("the embedded model is not here: run `just setup --only model`")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "dcv.toml"
    path.write_text(development_config(engine=engine, port=port), encoding="utf-8")
    (folder / "policy.toml").write_text(_section("policy", POLICY), encoding="utf-8")
    return path


def _section(name: str, values: Mapping[str, object]) -> str:
    # JSON's strings, numbers, booleans and flat lists are TOML's.
    lines = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in values.items()]
    return f"[{name}]\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Write the configuration unless one is given, then become `dcv serve`."""
    parser = argparse.ArgumentParser(prog="just serve", description=__doc__)
    parser.add_argument("--engine", choices=("real", "fake"), default="real")
    parser.add_argument("--config", type=Path, help="use this file instead of the development one")
    parser.add_argument("--port", type=int, default=PORT)
    arguments, rest = parser.parse_known_args()
    config = arguments.config or write_config(
        LAYOUT.run, engine=arguments.engine, port=arguments.port
    )
    dcv = Path(sys.executable).with_name("dcv")
    os.execv(dcv, [str(dcv), "serve", "--config", str(config), *rest])


if __name__ == "__main__":
    main()

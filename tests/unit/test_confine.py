"""The engine's confinement, on this kernel, with small programs in the engine's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from appliance.config import Engine, Model
from appliance.engine import confine
from appliance.engine.command import SYSTEM_FOLDERS, EngineKeys, engine_command
from appliance.engine.process import confinement

ABI = confine.landlock_abi()
landlock = pytest.mark.skipif(ABI == 0, reason="this kernel has no Landlock")
scoped = pytest.mark.skipif(
    ABI < confine.SCOPES_ABI, reason="this kernel's Landlock does not keep signals in"
)

PYTHON = Path(sysconfig.get_config_var("prefix"))  # the installation, not the environment
INTERPRETER = os.path.realpath(sys.executable)


def confined(
    code: str, *, read: tuple[str, ...] = (), write: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """What `code` comes to, run by an isolated Python that may only read itself and `read`."""
    rules = {"read": [*SYSTEM_FOLDERS, str(PYTHON), *read], "write": list(write)}
    return subprocess.run(
        [
            *(sys.executable, "-I", "-S", confine.__file__, json.dumps(rules)),
            *(INTERPRETER, "-I", "-S", "-c", code),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str]) -> bool:
    return result.returncode == 1 and "PermissionError" in result.stderr


def test_no_program_below_it_can_gain_privileges() -> None:
    result = confined("print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in result.stdout


def test_it_says_how_it_is_confined() -> None:
    expected = f"confined by Landlock, ABI {ABI}" if ABI else "not confined: no Landlock here"
    assert confined("").stderr == f"{expected}\n"


@landlock
def test_what_the_rules_do_not_name_cannot_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "receipts.sqlite3"
    secret.write_text("CANARY")
    code = f"print(open({str(secret)!r}).read())"
    assert refused(confined(code))
    assert confined(code, read=(str(secret),)).stdout == "CANARY\n"
    assert confined(code, read=(str(tmp_path),)).stdout == "CANARY\n"
    assert refused(confined(f"import os; os.listdir({str(tmp_path)!r})"))


@landlock
def test_what_may_be_read_may_not_be_changed(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_text("weights")
    for code in (
        f"open({str(weights)!r}, 'a')",
        f"import os; os.truncate({str(weights)!r}, 0)",
        f"import os; os.unlink({str(weights)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
    ):
        assert refused(confined(code, read=(str(tmp_path),))), code
    assert weights.read_text() == "weights"


@landlock
def test_scratch_may_be_changed_and_not_executed(tmp_path: Path) -> None:
    made = tmp_path / "folder" / "program"
    code = f"""
import os
os.mkdir({str(made.parent)!r})
with open({str(made)!r}, "w") as file: file.write("#!/bin/sh\\n")
os.chmod({str(made)!r}, 0o700)
os.rename({str(made)!r}, {str(made)!r} + "2")
os.rename({str(made)!r} + "2", {str(made)!r})
os.execv({str(made)!r}, ["program"])
"""
    assert refused(confined(code, write=(str(tmp_path),)))
    assert made.exists()


@landlock
def test_the_rules_outlast_exec_and_fork(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("CANARY")
    result = confined(f"import os; os.system('cat {secret}')")
    assert "CANARY" not in result.stdout
    assert "Permission denied" in result.stderr


@scoped
def test_it_cannot_signal_who_started_it() -> None:
    assert refused(confined(f"import os; os.kill({os.getpid()}, 0)"))


@landlock
def test_it_cannot_trace_who_started_it() -> None:
    """Also where another memory is only looked at, as its own user may else."""
    result = confined(f"open('/proc/{os.getpid()}/mem', 'rb')")
    assert refused(result)


def test_a_path_that_is_not_there_gives_nothing_and_stops_nothing(tmp_path: Path) -> None:
    result = confined("print('runs')", read=(str(tmp_path / "absent" / "folder"),))
    assert result.stdout == "runs\n"


def test_a_program_that_is_not_there_is_told_as_such() -> None:
    rules = json.dumps({"read": ["/"], "write": []})
    result = subprocess.run(
        [sys.executable, "-I", "-S", confine.__file__, rules, "/nonexistent"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 127
    assert "cannot start the engine: No such file or directory" in result.stderr


@landlock
def test_a_rule_that_the_kernel_refuses_ends_the_start(tmp_path: Path) -> None:
    """Nothing is started less confined than it was meant to be."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    result = confined("print('runs')", read=(str(loop),))
    assert result.returncode == 127
    assert result.stdout == ""


# --------------------------------------------------------------------------------- what is named


def rules_of(engine: Engine) -> dict[str, list[str]]:
    model = Model(id="m", path="/srv/model", files={"config.json": "00" * 32})
    command = engine_command(engine, model, port=1, keys=EngineKeys(api="a", admin="b"), threads=1)
    rules: dict[str, list[str]] = json.loads(confinement(command))
    return rules


def test_the_engine_reads_its_environment_the_model_and_the_system_and_writes_scratch() -> None:
    rules = rules_of(
        Engine(
            python="/opt/dcv/engine/bin/python",
            runtime_dir="/run/dcv/engine",
            python_path=("/opt/dcv/engine-cpu",),
            extra_args=("chat-template=/srv/template.jinja", "schedule-policy=fcfs"),
        )
    )
    assert rules["read"] == [
        *SYSTEM_FOLDERS,
        "/opt/dcv/engine",
        "/opt/dcv/engine-cpu",
        "/srv/model",
        "/srv/template.jinja",
        "/opt/dcv/engine",  # where its interpreter is no link
    ]
    assert rules["write"] == ["/run/dcv/engine", "/tmp", "/dev/shm"]


def test_an_interpreter_that_is_a_link_may_read_its_installation(tmp_path: Path) -> None:
    interpreter = tmp_path / "engine/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(INTERPRETER)
    assert rules_of(Engine(python=str(interpreter)))["read"][-1] == str(
        Path(INTERPRETER).parent.parent
    )


def test_of_a_program_in_the_engines_place_only_writing_is_restricted() -> None:
    rules = rules_of(Engine(unsafe_command=("/srv/stand-in/bin/engine",)))
    assert rules["read"] == ["/", "/srv/stand-in"]

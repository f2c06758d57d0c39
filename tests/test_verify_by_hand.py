"""docs/verify-by-hand.md is true: its commands run, print what it says, and fail on a flipped bit.

The blocks run in order in one bash, as a reader would paste them, against an appliance in this
process. To see them fail, the block that asks the appliance is replaced by one that brings back
what it got, with something in it changed.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.integration.appliance import RunningAppliance, start_appliance
from tests.vectors_dir import VECTORS, needs_vectors

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "verify-by-hand.md"
TOOLS = ("bash", "openssl", "jq", "curl", "basenc", "od", "dd", "tac", "awk")
MARK = "-- end of a block --"
RUN_S = 60

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason=f"the document needs {', '.join(TOOLS)}",
)

Tamper = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Block:
    """A block of commands, under which heading it stands, and what the document says it prints."""

    heading: str
    commands: str
    output: str


def blocks() -> list[Block]:
    pattern = re.compile(
        r"^## (?P<heading>.+?)$"
        r"|^```sh\n(?P<commands>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
        re.MULTILINE | re.DOTALL,
    )
    found, heading = [], ""
    for match in pattern.finditer(DOCUMENT.read_text()):
        heading = match["heading"] or heading
        if match["commands"] is not None:
            found.append(Block(heading, match["commands"], match["output"] or ""))
    return found


BLOCKS = blocks()
ASKING = next(index for index, block in enumerate(BLOCKS) if "curl " in block.commands)
HARDWARE = next(index for index, block in enumerate(BLOCKS) if "$H100" in block.commands)
STEPS = BLOCKS[:HARDWARE]


@dataclass(frozen=True)
class Run:
    """What one bash did: what each block printed; of the one that failed, as far as it came."""

    status: int
    printed: list[str]
    errors: str

    @property
    def last(self) -> str:
        """What it printed last."""
        return "".join(self.printed).rstrip("\n").rpartition("\n")[2]


def run_blocks(commands: list[str], folder: Path, **variables: str) -> Run:
    """One bash over all of them, with nothing of ours in its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    script = "".join(f"{one}echo '{MARK}'\n" for one in commands)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TMPDIR": str(folder), **variables}
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    printed = done.stdout.split(f"{MARK}\n")
    return Run(done.returncode, printed[:-1] if done.returncode == 0 else printed, done.stderr)


async def run_against(appliance: RunningAppliance, folder: Path, count: int = 1) -> list[Run]:
    """The document against an appliance, by so many readers at once; each keeps what it got."""
    runs: list[Run] = []

    async def read(kept: Path) -> None:
        commands = [block.commands for block in STEPS]
        commands[ASKING] += f"mkdir {kept}\ncp * {kept}\n"
        run = await trio.to_thread.run_sync(
            lambda: run_blocks(commands, kept.with_suffix(".tmp"), URL=appliance.url)
        )
        runs.append(run)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(read, folder / f"kept{number}")
    return runs


def run_on_kept(kept: Path, folder: Path) -> Run:
    """The document over what an appliance answered earlier."""
    commands = [block.commands for block in STEPS]
    commands[ASKING] = f"cp {kept}/* .\n"
    return run_blocks(commands, folder)


async def kept_from(nursery: trio.Nursery, tmp_path: Path, count: int = 1) -> list[Path]:
    """What `count` readers got from one appliance at the same time."""
    (tmp_path / "appliance").mkdir()
    appliance = await start_appliance(
        nursery,
        tmp_path / "appliance",
        # A slow device, so that who asks at the same time shares an epoch.
        sections={"attestation": {"simulated_latency_s": 1.0, "gpu_count": 2}},
    )
    runs = await run_against(appliance, tmp_path, count)
    nursery.cancel_scope.cancel()
    assert [run.status for run in runs] == [0] * count, [run.errors for run in runs]
    return [tmp_path / f"kept{number}" for number in range(count)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What four readers got at the same time from one appliance with two GPUs."""
    folder = tmp_path_factory.mktemp("by-hand")
    got: list[Path] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            got.extend(await kept_from(nursery, folder, count=4))

    trio.run(main)
    return got


async def test_the_commands_print_what_the_document_says(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    (tmp_path / "appliance").mkdir()
    appliance = await start_appliance(nursery, tmp_path / "appliance")
    [run] = await run_against(appliance, tmp_path)
    assert run.errors == ""
    assert run.status == 0
    for block, printed in zip(STEPS, run.printed, strict=True):
        assert printed == block.output, block.heading
    assert any("root: same\n" in block.output for block in STEPS)  # they do print something


def test_the_commands_follow_a_path_from_any_leaf_of_an_epoch(
    kept: list[Path], tmp_path: Path
) -> None:
    inclusions = [
        json.loads((one / "report.json").read_text())["attestation"]["evidence"]["gpu"]["inclusion"]
        for one in kept
    ]
    assert max(len(one["path"]) for one in inclusions) >= 1  # else nothing was climbed
    for number, one in enumerate(kept):
        assert run_on_kept(one, tmp_path / str(number)).status == 0


def flip_base64(section: dict[str, Any], name: str, offset: int) -> None:
    data = bytearray(base64.b64decode(section[name]))
    data[offset] ^= 1
    section[name] = base64.b64encode(data).decode()


def flip_hex(section: dict[str, Any], name: str) -> None:
    section[name] = section[name][:-1] + format(int(section[name][-1], 16) ^ 1, "x")


def swap_gpus(report: dict[str, Any]) -> None:
    report["attestation"]["evidence"]["gpu"]["gpus"].reverse()


def flip_key(report: dict[str, Any]) -> None:
    flip_hex(report["attestation"]["workload_keyset"]["receipt_signing_keys"][0], "public_key")


def flip_cpu(offset: int) -> Tamper:
    return lambda report: flip_base64(
        report["attestation"]["evidence"]["cpu"], "report_b64", offset
    )


def flip_gpu(offset: int) -> Tamper:
    return lambda report: flip_base64(
        report["attestation"]["evidence"]["gpu"]["gpus"][1], "report_b64", offset
    )


def set_model(report: dict[str, Any]) -> None:
    report["attestation"]["evidence"]["workload"]["model"]["id"] = "another"


def set_policy(report: dict[str, Any]) -> None:
    report["attestation"]["evidence"]["policy"]["revocation"] = "required"


def flip_root(report: dict[str, Any]) -> None:
    flip_hex(report["attestation"]["evidence"]["gpu"]["inclusion"], "root")


def set_index_to_a_command(report: dict[str, Any]) -> None:
    inclusion = report["attestation"]["evidence"]["gpu"]["inclusion"]
    inclusion["leaf_index"] = "a[$(touch pwned)]"


def set_size(report: dict[str, Any]) -> None:
    report["attestation"]["evidence"]["gpu"]["inclusion"]["tree_size"] += 1


@pytest.mark.parametrize(
    ("tamper", "steps", "said"),
    [
        pytest.param(flip_key, "2", "keyset digest: DIFFERENT", id="a key"),
        pytest.param(set_model, "2", "subject: DIFFERENT", id="the model"),
        pytest.param(set_policy, "2", "policy digest: DIFFERENT", id="the policy"),
        pytest.param(flip_cpu(0x50), "5", "Verification failure", id="REPORT_DATA"),
        pytest.param(flip_cpu(0x90), "5", "Verification failure", id="MEASUREMENT"),
        pytest.param(flip_cpu(0x180), "5", "Verification failure", id="REPORTED_TCB"),
        pytest.param(flip_cpu(0x2A0), "5", "Verification failure", id="the CPU's signature"),
        pytest.param(flip_root, "6", "root: DIFFERENT", id="the root"),
        # A larger tree may give this leaf the same path; the nonce has the size in it.
        pytest.param(set_size, "67", "", id="the tree's size"),
        pytest.param(set_index_to_a_command, "6", "keyset: same", id="an index that is no number"),
        pytest.param(flip_gpu(4), "7", "nonce: DIFFERENT", id="the GPU's nonce"),
        pytest.param(flip_gpu(600), "7", "Verification failure", id="a measurement of the GPU"),
        pytest.param(flip_gpu(-1), "7", "Verification failure", id="the GPU's signature"),
        pytest.param(swap_gpus, "7", "device: DIFFERENT", id="the GPUs' order"),
    ],
)
def test_a_changed_report_stops_the_commands(
    kept: list[Path], tmp_path: Path, tamper: Tamper, steps: str, said: str
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(kept[1], changed)
    report = json.loads((changed / "report.json").read_text())
    tamper(report)
    (changed / "report.json").write_text(json.dumps(report))
    run = run_on_kept(changed, tmp_path / "run")
    assert run.status != 0
    assert STEPS[len(run.printed) - 1].heading[0] in steps, run.printed
    assert run.last.startswith(said), run.printed
    assert not list((tmp_path / "run").rglob("pwned"))


@pytest.mark.parametrize(
    ("file", "step"), [("nonce", "3"), ("spki.der", "4")], ids=["another nonce", "another TLS key"]
)
def test_a_report_for_somebody_else_stops_the_commands(
    kept: list[Path], tmp_path: Path, file: str, step: str
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(kept[0], changed)
    data = bytearray((changed / file).read_bytes())
    data[3] ^= 1
    (changed / file).write_bytes(data)
    run = run_on_kept(changed, tmp_path / "run")
    assert run.status != 0
    assert STEPS[len(run.printed) - 1].heading[0] == step
    assert "DIFFERENT" in run.last


def real_evidence(folder: Path) -> dict[str, str]:
    """The folders that the document asks for; the vectors' own names made its names."""
    snp, h100 = folder / "snp", folder / "h100"
    snp.mkdir(parents=True)
    shutil.copy(VECTORS / "snp" / "ars_test-report.bin", snp / "report.bin")
    shutil.copy(VECTORS / "snp" / "ars_test-vcek.der", snp / "vek.der")
    h100.mkdir()
    for name in ("report.bin", "chain.pem", "nonce.hex"):
        shutil.copy(VECTORS / "nvidia" / "h100_595.71.05" / name, h100 / name)
    return {"SNP": str(snp), "H100": str(h100)}


def run_on_hardware(kept: Path, folder: Path, variables: dict[str, str]) -> Run:
    commands = [block.commands for block in BLOCKS]
    commands[ASKING] = f"cp {kept}/* .\n"
    return run_blocks(commands, folder, **variables)


@needs_vectors
def test_the_commands_hold_on_real_hardware(kept: list[Path], tmp_path: Path) -> None:
    run = run_on_hardware(kept[0], tmp_path / "run", real_evidence(tmp_path / "real"))
    assert run.errors == ""
    assert run.printed[HARDWARE] == BLOCKS[HARDWARE].output


@needs_vectors
@pytest.mark.parametrize(
    ("file", "offset"),
    [
        ("snp/report.bin", 0x90),
        ("snp/vek.der", 400),
        ("h100/report.bin", 4),
        ("h100/report.bin", 700),
        ("h100/chain.pem", 300),
    ],
)
def test_real_evidence_with_a_flipped_bit_stops_the_commands(
    kept: list[Path], tmp_path: Path, file: str, offset: int
) -> None:
    variables = real_evidence(tmp_path / "real")
    path = tmp_path / "real" / file
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    run = run_on_hardware(kept[0], tmp_path / "run", variables)
    assert run.status != 0
    assert len(run.printed) == HARDWARE + 1  # all before it passed, it began and did not end

"""Runs harnesses under atheris, each in a process of its own and bounded in time.

    python tests/fuzz/run.py --seconds 60 [NAME...]

Prints one line for each harness, and its findings. Exits with 1 if there was one: the input is
kept under the folder that `--keep` names.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MAX_INPUT_BYTES = 64 << 10
RSS_MB = 2048
ONE_INPUT_S = 10
GRACE_S = 120
"""For instrumentation, and for reading the seeds."""

EXECUTED = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
COVERED = re.compile(r"cov: (\d+)")


def child(name: str, arguments: list[str]) -> None:
    """One harness, in this process; libFuzzer ends it."""
    import atheris  # type: ignore[import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["appliance"]):
        from tests.fuzz.harnesses import HARNESSES

    atheris.Setup([sys.argv[0], *arguments], HARNESSES[name].run)
    atheris.Fuzz()


def names() -> list[str]:
    """Of all harnesses."""
    from tests.fuzz.harnesses import HARNESSES

    return list(HARNESSES)


def run(name: str, seconds: int, keep: Path) -> bool:
    """Run one; whether it found nothing."""
    from tests.fuzz.harnesses import HARNESSES

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus = Path(folder)
        for number, seed in enumerate(HARNESSES[name].seeds()):
            (corpus / f"seed{number}").write_bytes(seed)
        begun = time.monotonic()
        done = subprocess.run(
            [
                *(sys.executable, __file__, "--child", name),
                *(f"-max_total_time={seconds}", f"-timeout={ONE_INPUT_S}"),
                *(f"-rss_limit_mb={RSS_MB}", f"-max_len={MAX_INPUT_BYTES}"),
                *(f"-artifact_prefix={keep}/{name}-", "-print_final_stats=1", folder),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + GRACE_S,
            check=False,
        )
    took = time.monotonic() - begun
    executed, covered = EXECUTED.findall(done.stderr), COVERED.findall(done.stderr)
    good = done.returncode == 0 and bool(executed)
    print(
        f"{name:24} {took:6.0f} s {int(executed[-1]) if executed else 0:>11,} executions "
        f"{covered[-1] if covered else '0':>6} edges  {'-' if good else 'FINDING'}",
        flush=True,
    )
    if not good:
        # libFuzzer's own lines say little; Python's traceback stands before them.
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
    return good


def main() -> int:
    """As the command line says."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each harness")
    parser.add_argument("--keep", type=Path, help="folder for inputs that were findings")
    parser.add_argument("names", nargs="*", metavar="NAME", help="harnesses; all without")
    arguments = parser.parse_args()
    known = names()
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"no such harness: {', '.join(unknown)}; there are {', '.join(known)}")
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    keep.mkdir(parents=True, exist_ok=True)
    good = [run(one, arguments.seconds, keep) for one in arguments.names or known]
    print(f"{len(good)} harnesses, {good.count(False)} with findings; inputs in {keep}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Verifying a thousand times keeps nothing: resident memory stays where it was.

Measured in a process of its own, after a warm-up that fills caches and the allocator's pools.
"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 100
TIMES = 1_000
MOST_BYTES = 2 << 20
RUN_S = 240


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_thousand_verifications_leave_memory_flat() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_memory"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < MOST_BYTES, f"{before} bytes before, {after} after"


def resident() -> int:
    """Bytes, without garbage."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def verify_all(times: int) -> None:
    """A GPU's report with its chain, two manifests and OCSP answers, and a SEV-SNP report; every
    tenth time also refused ones, as a refusal has a traceback."""
    from appliance.rats.result import Tier
    from tests.vectors.case import expected, judge, load

    good = [load(name) for name in ("nvidia_gpu_good", "sev_snp_good")]
    refused = [load(name) for name in ("nvidia_gpu_rim_digest", "sev_snp_bad_signature")]
    assert all(case.expect is Tier.AFFIRMING for case in good)
    assert all(case.error == "unauthentic" for case in refused)
    for number in range(times):
        for case in (*good, *refused) if number % 10 == 0 else good:
            assert judge(case) == expected(case)


if __name__ == "__main__":
    verify_all(WARM_UP)
    before = resident()
    verify_all(TIMES)
    print(before, resident())

"""How long verification takes: `python tests/bench/verification.py`.

Uses the vendor-signed vectors where they are, and generated ones where they are not. A row whose
median misses what was asked for makes the exit status 1.
"""

from __future__ import annotations

import datetime
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.rats.appraise import Context, appraise_report, authenticate_cpu
from appliance.rats.gpus import Memory
from appliance.rats.model import Anchors
from appliance.rats.result import Tier
from appliance.rats.schemes import nvidia_gpu
from appliance.wire.evidence import CpuEvidence, GpuEvidence
from appliance.wire.report import parse_report
from tests.bench.results import Bound, Number, console, missed, percentile
from tests.bench.simulated_report import AT, NONCE, POLICY, SPKI, simulated_report
from tests.vectors.case import anchors_of, cpu_evidence, gpu_evidence, load
from tests.vectors_dir import VECTORS

LEAST = 30
H100 = VECTORS / "nvidia" / "h100_595.71.05"
SNP = VECTORS / "snp"
TDX = VECTORS / "tdx"


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        source: `vendor`, `generated` or `simulated`.
        asked: milliseconds that the median may take; None where nothing was asked.
    """

    name: str
    source: str
    run: Callable[[], object]
    asked: float | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU's evidence, and what it is held to."""

    source: str
    evidence: GpuEvidence
    nonce: bytes
    anchors: Anchors
    at: datetime.datetime


def gpu() -> Gpu:
    """NVIDIA's own evidence, or ours."""
    if H100.is_dir():
        rims = tuple(path.read_bytes() for path in sorted(H100.glob("*.xml")))
        evidence = GpuEvidence(
            "nvidia_gpu",
            (H100 / "report.bin").read_bytes(),
            (H100 / "chain.pem").read_bytes(),
            rims,
        )
        nonce = bytes.fromhex((H100 / "nonce.hex").read_text().strip())
        return Gpu("vendor", evidence, nonce, load_anchors(), AT)
    case = load("nvidia_gpu_good")
    return Gpu("generated", gpu_evidence(case), case.bound_to, anchors_of(case), case.at)


def gpu_rows() -> Iterator[Row]:
    one = gpu()
    root, rim_root = one.anchors.nvidia_device, one.anchors.nvidia_rim
    chains = nvidia_gpu.ChainCache()

    def report(cache: nvidia_gpu.ChainCache | None) -> object:
        return nvidia_gpu.authenticate(
            one.evidence, root=root, at=one.at, nonce=one.nonce, chains=cache
        )

    yield Row("GPU report, chain cached", one.source, lambda: report(chains), 2)
    yield Row("GPU report, chain cold", one.source, lambda: report(None), 10)
    for number, document in enumerate(one.evidence.rims, 1):

        def rim(document: bytes = document) -> object:
            return nvidia_gpu.authenticate_rim(document, root=rim_root, at=one.at)

        yield Row(f"RIM {number}, {len(document) >> 10} KiB", one.source, rim, 15)
    claims = report(None)
    assert isinstance(claims, nvidia_gpu.NvidiaGpuClaims)
    rims = [
        nvidia_gpu.authenticate_rim(document, root=rim_root, at=one.at)
        for document in one.evidence.rims
    ]
    yield Row("GPU measurements compared", one.source, lambda: nvidia_gpu.compare(claims, rims))


def cpu_row(
    name: str,
    source: str,
    evidence: CpuEvidence,
    anchors: Anchors,
    at: datetime.datetime,
    asked: float | None = None,
) -> Row:
    return Row(name, source, lambda: authenticate_cpu(evidence, anchors=anchors, at=at), asked)


def cpu_rows() -> Iterator[Row]:
    if SNP.is_dir():
        evidence = CpuEvidence(
            "sev_snp",
            {"report": (SNP / "ars_test-report.bin").read_bytes()},
            {"vek": (SNP / "ars_test-vcek.der").read_bytes()},
        )
        yield cpu_row("SEV-SNP report", "vendor", evidence, load_anchors(), AT, 3)
    else:
        snp = load("sev_snp_good")
        yield cpu_row("SEV-SNP report", "generated", cpu_evidence(snp), anchors_of(snp), snp.at, 3)
    for name, label in (
        ("tdx_good", "TDX quote"),
        ("tpm2_good", "TPM quote with its log"),
        ("azure_vtpm_good", "Azure: SEV-SNP and vTPM"),
    ):
        case = load(name)
        yield cpu_row(label, "generated", cpu_evidence(case), anchors_of(case), case.at)


def report_rows() -> Iterator[Row]:
    anchors = load_simulated_anchors(load_anchors())
    for count in (1, 8):
        data = simulated_report(gpus=count)

        def whole(memory: Memory, data: bytes = data) -> None:
            context = Context(POLICY, anchors, None, AT, memory)
            result = appraise_report(
                parse_report(data), nonce=NONCE, spki_sha256=SPKI, context=context
            )
            assert result.verdict is Tier.WARNING

        remembered = Memory()

        def warm(memory: Memory = remembered, run: Callable[[Memory], None] = whole) -> None:
            run(memory)

        def cold(run: Callable[[Memory], None] = whole) -> None:
            run(Memory())

        name = f"whole report, {count} GPU{'s' if count > 1 else ''}"
        yield Row(f"{name}, remembered", "simulated", warm)
        yield Row(f"{name}, cold", "simulated", cold)


def measure(run: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each run; the first ones do not count."""
    for _ in range(5):
        run()
    gc.collect()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begun))
    return times


def measure_all(*, seconds: float) -> list[Number]:
    """Every row, measured for so long; prints the table."""
    table = Table(title="Verification, one thread", title_justify="left", title_style="bold")
    for heading in ("", "evidence"):
        table.add_column(heading)
    for heading in ("runs", "median", "p95", "at most"):
        table.add_column(heading, justify="right")
    table.add_column("")
    numbers = list[Number]()
    for row in (*gpu_rows(), *cpu_rows(), *report_rows()):
        console.print(f"verification: {row.name}", style="dim")
        times = measure(row.run, seconds)
        bound = None if row.asked is None else Bound(row.asked)
        number = Number(row.name, statistics.median(times), "ms", bound, digits=2)
        numbers.append(number)
        name, median, asked, remark = number.cells()
        late = f"{percentile(times, 95):.2f} ms"
        table.add_row(name, row.source, str(len(times)), median, late, asked, remark)
    console.print(table)
    return numbers


def main() -> int:
    """Print the table; the exit status."""
    warnings.simplefilter("error")
    return 1 if missed(measure_all(seconds=1.0)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""One generated vector: how its file is read and written, and how this verifier is asked about it.

The form is described in README.md. This reader is strict, so that a file that means something
else to another reader fails here.
"""

from __future__ import annotations

import base64
import datetime
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography import x509

from appliance.config import Policy
from appliance.errors import EvidenceError, Malformed
from appliance.rats import binding
from appliance.rats.appraise import authenticate_cpu, judge_cpu
from appliance.rats.gpus import Memory, appraise_gpus, summary
from appliance.rats.model import AmdRoots, Anchors
from appliance.rats.reference import ImageReference
from appliance.rats.result import AttestationResult, Tier
from appliance.wire.evidence import CPU_PARTS, ENDORSEMENTS, CpuEvidence, GpuEvidence

FOLDER = Path(__file__).resolve().parent
SUFFIX = ".case"
ONCE = ("base", "scheme", "expect", "error", "findings", "at", "bound_to", "amd_product")
SEVERAL = ("policy", "reference", "comment", "without")
IMAGE_DIGEST = "sha256:" + "00" * 32

Parts = Mapping[str, tuple[bytes, ...]]
"""By name; a GPU may have several `rim` and `ocsp`."""


@dataclass(frozen=True)
class Case:
    """One piece of evidence, what it is judged with, and the only right verdict.

    Attributes:
        name: the file's, without its suffix.
        error: the code of the refusal; empty where the evidence is authentic.
        findings: names of all rules that must find something, and no other may.
        bound_to: the nonce of a GPU's report, the report data of CPU evidence.
        policy: lines of `[policy]`, TOML; none is the default policy.
        reference: measurements and the one value each must have; None for no reference values.
        parts: all of them, also those that the file leaves to its base.
        base: the case that it differs from; empty for none.
    """

    name: str
    scheme: str
    expect: Tier
    at: datetime.datetime
    bound_to: bytes
    parts: Parts
    error: str = ""
    findings: frozenset[str] = frozenset()
    amd_product: str = ""
    policy: tuple[str, ...] = ()
    reference: Mapping[str, str] | None = None
    comment: str = ""
    base: str = ""

    def all(self, name: str) -> tuple[bytes, ...]:
        """Every part of that name."""
        return self.parts.get(name, ())

    def one(self, name: str) -> bytes:
        """The part of that name, which must be there once."""
        (value,) = self.all(name)
        return value

    @property
    def rules(self) -> Policy:
        """The policy that its lines make."""
        return msgspec.convert(tomllib.loads("\n".join(self.policy)), Policy)


@dataclass(frozen=True)
class Outcome:
    """What a verifier makes of a case."""

    verdict: Tier
    error: str = ""
    findings: frozenset[str] = field(default=frozenset())


def expected(case: Case) -> Outcome:
    """What it has to make of it."""
    return Outcome(case.expect, case.error, case.findings)


def judge(case: Case) -> Outcome:
    """What this verifier makes of it."""
    try:
        result = appraise(case)
    except (Malformed, EvidenceError) as error:
        return Outcome(Tier.CONTRAINDICATED, error.code)
    return Outcome(result.verdict, "", frozenset(one.check for one in result.all_findings()))


def appraise(case: Case) -> AttestationResult:
    """Authenticate, compare what it is bound to, and hold it to the policy.

    Raises:
        Malformed, EvidenceError: as the scheme.
    """
    anchors = anchors_of(case)
    if case.scheme == "nvidia_gpu":
        statements = appraise_gpus(
            [gpu_evidence(case)],
            nonce=case.bound_to,
            policy=case.rules,
            anchors=anchors,
            at=case.at,
            memory=Memory(),
        )
        return summary(statements)
    claims = authenticate_cpu(cpu_evidence(case), anchors=anchors, at=case.at)
    binding.check_report_data(claims.report_data, case.bound_to, what=case.scheme)
    return judge_cpu(claims, image_reference(case), case.rules)


def gpu_evidence(case: Case) -> GpuEvidence:
    """Of a GPU's case."""
    return GpuEvidence(
        "nvidia_gpu", case.one("report"), case.one("chain"), case.all("rim"), case.all("ocsp")
    )


def cpu_evidence(case: Case) -> CpuEvidence:
    """Of any other case."""
    needed, allowed = CPU_PARTS[case.scheme]
    own = {name: case.one(name) for name in case.parts if name in needed | allowed}
    return CpuEvidence(
        case.scheme,
        {name: value for name, value in own.items() if name not in ENDORSEMENTS},
        {name: value for name, value in own.items() if name in ENDORSEMENTS},
    )


def anchors_of(case: Case) -> Anchors:
    """The roots that the case wants pinned."""
    amd: tuple[AmdRoots, ...] = ()
    if case.amd_product:
        ark, ask, asvk = (_certificate(case.one(name)) for name in ("ark", "ask", "asvk"))
        amd = (AmdRoots(case.amd_product, ark, ask, asvk),)
    return Anchors(
        nvidia_device=tuple(_certificate(one) for one in case.all("device_root")),
        nvidia_rim=tuple(_certificate(one) for one in case.all("rim_root")),
        amd=amd,
        intel_root=b"".join(case.all("intel_root")),
        tpm=tuple(_certificate(one) for one in case.all("tpm_root")),
    )


def image_reference(case: Case) -> ImageReference | None:
    """The case's reference values, in the table of its scheme."""
    if case.reference is None:
        return None
    values = {name: frozenset({value}) for name, value in case.reference.items()}
    pcrs = {name: value for name, value in values.items() if name.startswith("pcr")}
    others = {name: value for name, value in values.items() if name not in pcrs}
    match case.scheme:
        case "sev_snp":
            return ImageReference(IMAGE_DIGEST, sev_snp=others)
        case "tdx":
            return ImageReference(IMAGE_DIGEST, tdx=others)
        case _:
            return ImageReference(IMAGE_DIGEST, pcrs=pcrs, azure=others)


def _certificate(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def grouped(parts: Iterable[tuple[str, bytes]]) -> Parts:
    """Parts by name, sorted; those of one name in their order."""
    found: dict[str, tuple[bytes, ...]] = {}
    for name, value in sorted(parts, key=lambda part: part[0]):
        found[name] = (*found.get(name, ()), value)
    return found


def write(case: Case, folder: Path = FOLDER) -> None:
    """Put it where it belongs, as far as it differs from its base, which must be there."""
    base = load(case.base, folder).parts if case.base else {}
    lines = [
        f"base: {case.base}",
        f"scheme: {case.scheme}",
        f"expect: {case.expect}",
        f"error: {case.error}",
        f"findings: {' '.join(sorted(case.findings))}",
        f"at: {case.at:%Y-%m-%dT%H:%M:%SZ}",
        f"bound_to: {case.bound_to.hex()}",
        f"amd_product: {case.amd_product}",
    ]
    lines += [f"policy: {one}" for one in case.policy]
    lines += [f"reference: {name}={value}" for name, value in (case.reference or {}).items()]
    lines += [f"without: {name}" for name in sorted(base.keys() - case.parts.keys())]
    lines += [f"comment: {one}" for one in textwrap.wrap(case.comment, 88)]
    parts = [
        f"{name}: {base64.b64encode(one).decode()}"
        for name, values in sorted(case.parts.items())
        if values != base.get(name)
        for one in values
    ]
    text = "\n".join([*(one.rstrip() for one in lines), "", *(one.rstrip() for one in parts), ""])
    (folder / f"{case.name}{SUFFIX}").write_text(text, encoding="ascii")


def read(path: Path) -> Case:
    """Read a file."""
    head, _, body = path.read_text(encoding="ascii").partition("\n\n")
    once: dict[str, str] = {}
    several: dict[str, list[str]] = {name: [] for name in SEVERAL}
    for name, value in map(_split, head.splitlines()):
        if name in several:
            several[name].append(value)
        else:
            assert name in ONCE, f"{path.name}: no such line: {name}"
            assert name not in once, f"{path.name}: twice: {name}"
            once[name] = value
    assert once.keys() == set(ONCE), f"{path.name}: expected {ONCE}"
    own = grouped(
        (name, base64.b64decode(value, validate=True))
        for name, value in map(_split, body.splitlines())
    )
    base = dict(read(path.with_name(f"{once['base']}{SUFFIX}")).parts) if once["base"] else {}
    for name in several["without"]:
        del base[name]
    references = [one.partition("=") for one in several["reference"]]
    return Case(
        name=path.stem,
        scheme=once["scheme"],
        expect=Tier(once["expect"]),
        error=once["error"],
        findings=frozenset(once["findings"].split()),
        at=datetime.datetime.strptime(once["at"], "%Y-%m-%dT%H:%M:%SZ").replace(
            tzinfo=datetime.UTC
        ),
        bound_to=bytes.fromhex(once["bound_to"]),
        amd_product=once["amd_product"],
        policy=tuple(several["policy"]),
        reference={name: value for name, _, value in references} or None,
        comment=" ".join(several["comment"]),
        parts=dict(sorted({**base, **own}.items())),
        base=once["base"],
    )


def files() -> list[Path]:
    """Every case, in the order of their names."""
    return sorted(FOLDER.glob(f"*{SUFFIX}"))


def load(name: str, folder: Path = FOLDER) -> Case:
    """The case of that name."""
    return read(folder / f"{name}{SUFFIX}")


def _split(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    assert colon, f"expected `name: value`, got {line[:40]}"
    return name, value.strip()

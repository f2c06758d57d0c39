"""What a policy asks of a GPU. Each class holds claims to one rule of `[policy]`.

Revocation is asked elsewhere (`rats.revocation`), and the nonce was compared before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.config import Policy
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes.nvidia_gpu import AuthenticatedRim, NvidiaGpuClaims, compare
from appliance.wire.nvidia_gpu import GpuIdentity, SwitchIdentity

SWITCHES = ("LS10",)
"""NVSwitches whose reports are read."""

SIMULATED = "simulated"


class Rule(Protocol):
    """One of them."""

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """What is not as the rule has it; nothing where all is well."""
        ...


@dataclass(frozen=True, slots=True)
class Simulation:
    """Evidence under the published test root is nobody's: at best a warning."""

    gpus: str

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """One for simulated evidence."""
        if claims.scheme == SIMULATED:
            accepted = self.gpus == "unsafe_simulated"
            yield Finding(
                Tier.WARNING if accepted else Tier.CONTRAINDICATED,
                "nvidia_gpu.simulated",
                "evidence of NVIDIA's",
                "evidence under the published test root",
                "Expect no protection: anyone can make this evidence.",
            )


@dataclass(frozen=True, slots=True)
class Architecture:
    """The chip is one of these, by NVIDIA's name, and of this kind."""

    chips: tuple[str, ...]
    kind: type[GpuIdentity | SwitchIdentity]

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """One for another chip."""
        if claims.chip not in self.chips or not isinstance(claims.identity, self.kind):
            yield _contraindicated(
                "architecture",
                " or ".join(self.chips) or "none",
                claims.chip,
                "Use hardware that the policy names in gpu_architectures.",
            )


@dataclass(frozen=True, slots=True)
class Versions:
    """Driver and VBIOS are among these exact versions; an empty list accepts any."""

    drivers: tuple[str, ...]
    vbios: tuple[str, ...]

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """One for each that is not."""
        driver = claims.driver_version
        if self.drivers and driver is not None and driver not in self.drivers:
            yield _contraindicated(
                "driver",
                " or ".join(self.drivers),
                driver,
                "Install a driver that the policy names in gpu_drivers.",
            )
        accepted = {one.upper() for one in self.vbios}
        if accepted and claims.vbios_version.upper() not in accepted:
            yield _contraindicated(
                "vbios",
                " or ".join(self.vbios),
                claims.vbios_version,
                "Flash a VBIOS that the policy names in gpu_vbios.",
            )


@dataclass(frozen=True, slots=True)
class Feature:
    """How the GPU is passed through.

    SPT (one GPU) and MPT (several, their links encrypted) keep everything that leaves the GPU
    secret. In PPCIE mode the links between GPUs are in the clear and only the NVSwitches, which
    are attested by themselves, keep them apart. A report without the flag is from a driver that
    knew no other mode than SPT.
    """

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """One for every other mode."""
        if claims.feature == "PPCIE":
            yield Finding(
                Tier.WARNING,
                "nvidia_gpu.feature",
                "SPT or MPT",
                "PPCIE",
                "Attest the NVSwitches too: in protected PCIe mode they guard the GPUs' links.",
            )
        elif claims.feature not in (None, "SPT", "MPT"):
            yield _contraindicated(
                "feature", "SPT or MPT", str(claims.feature), "Use a mode that is known here."
            )


@dataclass(frozen=True, slots=True)
class Measurements:
    """The report matches NVIDIA's reference values."""

    rims: Sequence[AuthenticatedRim]

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """As `compare`."""
        yield from compare(claims, self.rims)


@dataclass(frozen=True, slots=True)
class RimExpiry:
    """The reference values' signers are valid when the report's chain was held to be."""

    rims: Sequence[AuthenticatedRim]
    expired: str

    def check(self, claims: NvidiaGpuClaims) -> Iterator[Finding]:
        """One for each that is not."""
        for one in self.rims:
            expected = (
                f"a manifest for {one.rim.colloquial_version} whose signer is valid at "
                f"{claims.at:%Y-%m-%d}"
            )
            if claims.at > one.valid_until:
                yield Finding(
                    Tier.WARNING if self.expired == "warn" else Tier.CONTRAINDICATED,
                    "nvidia_gpu.rim_expired",
                    expected,
                    f"valid until {one.valid_until:%Y-%m-%d}",
                    "Get the manifest anew from NVIDIA's RIM service: it is signed again there.",
                )
            elif claims.at < one.valid_from:
                # Nothing is forgiven here: nobody has signed it yet.
                yield _contraindicated(
                    "rim_not_yet_valid",
                    expected,
                    f"valid from {one.valid_from:%Y-%m-%d}",
                    "Check the machine's clock.",
                )


def appraise_gpu(
    claims: NvidiaGpuClaims, rims: Sequence[AuthenticatedRim], policy: Policy
) -> AttestationResult:
    """The verdict on one GPU. `rims` may have expired: `[policy] expired_rims` says what then."""
    own = (
        Architecture(policy.gpu_architectures, GpuIdentity),
        Versions(policy.gpu_drivers, policy.gpu_vbios),
        Feature(),
    )
    return _appraise(claims, rims, policy, own)


def appraise_switch(
    claims: NvidiaGpuClaims, rims: Sequence[AuthenticatedRim], policy: Policy
) -> AttestationResult:
    """The verdict on one NVSwitch; `gpu_architectures`, `_drivers` and `_vbios` are not its."""
    return _appraise(claims, rims, policy, (Architecture(SWITCHES, SwitchIdentity),))


def _appraise(
    claims: NvidiaGpuClaims,
    rims: Sequence[AuthenticatedRim],
    policy: Policy,
    own: tuple[Rule, ...],
) -> AttestationResult:
    rules: tuple[Rule, ...] = (
        Simulation(policy.gpus),
        *own,
        Measurements(rims),
        RimExpiry(rims, policy.expired_rims),
    )
    found = (one for rule in rules for one in rule.check(claims))
    return conclude(claims.to_json(), found)


def _contraindicated(rule: str, expected: str, got: str, advice: str) -> Finding:
    return Finding(Tier.CONTRAINDICATED, f"nvidia_gpu.{rule}", expected, got, advice)

"""The pinned roots: certificates that came with the package, each held to its digest here.

A root decides what is believed, so it is named twice: as a file, and by its SHA-256 in this
module. A replaced file is refused. `rats/anchors/README.md` says where each one comes from.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable

from cryptography import x509

from appliance.errors import ConfigError, Malformed
from appliance.rats import chain
from appliance.rats.model import AmdRoots, Anchors

NVIDIA_DEVICE = "nvidia_device_identity_ca.pem"
NVIDIA_RIM = "nvidia_corim_signing_root_ca.pem"
INTEL = "intel_sgx_root_ca.pem"

DIGESTS: dict[str, tuple[str, ...]] = {
    # file: SHA-256 of its certificates, in order. AMD's files are ARK, ASK, ASVK.
    "amd_milan.pem": (
        "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b",
        "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5",
    ),
    "amd_genoa.pem": (
        "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521",
        "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372",
    ),
    "amd_turin.pem": (
        "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
        "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185",
        "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c",
    ),
    INTEL: ("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3",),
    NVIDIA_DEVICE: ("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48",),
    NVIDIA_RIM: ("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1",),
}

_AMD = {"amd_milan.pem": "Milan", "amd_genoa.pem": "Genoa", "amd_turin.pem": "Turin"}

# The published test roots. They have no digest here: nothing that they vouch for is ever more
# than a warning, and the production image has none of these files.
SIMULATED_NVIDIA_DEVICE = "simulated_nvidia_device.pem"
SIMULATED_NVIDIA_RIM = "simulated_nvidia_rim.pem"
SIMULATED_AMD = "simulated_amd.pem"


def load_anchors(*, tpm_roots: bytes = b"") -> Anchors:
    """The vendors' roots, and the ones above TPMs' attestation keys that the operator pins.

    Args:
        tpm_roots: PEM, the file of [attestation] tpm_roots_file; empty pins none.

    Raises:
        ConfigError: a file is missing or is not the one this module knows; `tpm_roots` is not
            PEM certificates.
    """
    folder = _folder()
    return Anchors(
        nvidia_device=_pinned(folder, NVIDIA_DEVICE),
        nvidia_rim=_pinned(folder, NVIDIA_RIM),
        amd=load_amd(),
        intel_root=load_intel(),
        tpm=_parse(tpm_roots, "[attestation] tpm_roots_file") if tpm_roots else (),
    )


def load_amd() -> tuple[AmdRoots, ...]:
    """AMD's alone, one entry for each product line: Milan, Genoa, Turin.

    Raises:
        ConfigError: as for `load_anchors`.
    """
    folder = _folder()
    return tuple(AmdRoots(product, *_pinned(folder, name)) for name, product in _AMD.items())


def load_intel() -> bytes:
    """Intel's alone, DER.

    Raises:
        ConfigError: as for `load_anchors`.
    """
    (root,) = _pinned(_folder(), INTEL)
    return chain.der_of(root)


def load_simulated_anchors(anchors: Anchors) -> Anchors:
    """The same, and the published test roots beside them, in fields of their own.

    Raises:
        ConfigError: this installation has none.
    """
    folder = _folder()
    return replace(
        anchors,
        simulated_nvidia_device=_simulated(folder, SIMULATED_NVIDIA_DEVICE),
        simulated_nvidia_rim=_simulated(folder, SIMULATED_NVIDIA_RIM),
        simulated_amd=(_simulated_amd(_simulated(folder, SIMULATED_AMD)),),
    )


def _folder() -> Traversable:
    return resources.files("appliance.rats") / "anchors"


def _pinned(folder: Traversable, name: str) -> tuple[x509.Certificate, ...]:
    certificates = _parse(_read(folder, name), name)
    digests = tuple(chain.sha256_of(one) for one in certificates)
    if digests != DIGESTS[name]:
        raise ConfigError(
            f"{name}: expected certificates {', '.join(DIGESTS[name])}, got {', '.join(digests)}"
        )
    return certificates


def _read(folder: Traversable, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise ConfigError(f"{name}: this installation lacks a pinned root") from None


def _simulated(folder: Traversable, name: str) -> tuple[x509.Certificate, ...]:
    try:
        pem = (folder / name).read_bytes()
    except OSError:
        raise ConfigError("unknown provider `simulated`") from None
    return _parse(pem, name)


def _simulated_amd(certificates: tuple[x509.Certificate, ...]) -> AmdRoots:
    if len(certificates) != 3:
        raise ConfigError(f"{SIMULATED_AMD}: expected an ARK, an ASK and an ASVK")
    return AmdRoots("Milan", *certificates)


def _parse(pem: bytes, name: str) -> tuple[x509.Certificate, ...]:
    try:
        return chain.parse_pem_chain(pem, field=name)
    except Malformed as error:
        raise ConfigError(error.message) from None

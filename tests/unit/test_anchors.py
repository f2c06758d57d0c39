"""The pinned roots: which files, which bytes, and what happens to others."""

from __future__ import annotations

import base64
import datetime
import importlib.util
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.endorsements import anchors
from appliance.endorsements.anchors import (
    DIGESTS,
    load_amd,
    load_anchors,
    load_intel,
    load_simulated_anchors,
)
from appliance.errors import ConfigError
from appliance.rats import chain
from appliance.rats.model import AmdRoots, Anchors
from tests.fakes.amd_evidence import amd_roots
from tests.vectors_dir import VECTORS, needs_vectors

FILES = Path(anchors.__file__).parent.parent / "rats" / "anchors"
TODAY = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed files that a test may spoil."""
    copy = tmp_path / "anchors"
    shutil.copytree(FILES, copy)
    monkeypatch.setattr(anchors, "_folder", lambda: copy)
    return copy


def test_amd_has_three_product_lines_whose_roots_issue_their_intermediates() -> None:
    lines = load_amd()
    assert [line.product for line in lines] == ["Milan", "Genoa", "Turin"]
    for line in lines:
        assert common_name(line.ark) == f"ARK-{line.product}"
        assert common_name(line.ask) == f"SEV-{line.product}"
        assert common_name(line.asvk) == f"SEV-VLEK-{line.product}"
        line.ark.verify_directly_issued_by(line.ark)
        for issuer in (line.ask, line.asvk):
            chain.authenticate_path([issuer], roots=[line.ark], at=TODAY, what="authority")


def common_name(certificate: x509.Certificate) -> str:
    (attribute,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


def test_intels_root_is_its_own_issuer_and_a_ca() -> None:
    root = x509.load_der_x509_certificate(load_intel())
    assert common_name(root) == "Intel SGX Root CA"
    root.verify_directly_issued_by(root)
    assert root.not_valid_after_utc.year == 2049


def test_every_pinned_file_has_a_digest_and_every_digest_a_file() -> None:
    installed = {path.name for path in FILES.glob("*.pem") if "simulated" not in path.name}
    assert installed == set(DIGESTS)


def test_all_roots_load() -> None:
    loaded = load_anchors()
    assert loaded.amd == load_amd()
    assert loaded.intel_root == load_intel()
    assert [common_name(one) for one in loaded.nvidia_device] == ["NVIDIA Device Identity CA"]
    assert [common_name(one) for one in loaded.nvidia_rim] == ["NVIDIA CoRIM signing Root CA"]
    assert loaded.tpm == ()
    assert loaded.simulated_amd == ()
    assert loaded.simulated_nvidia_device == loaded.simulated_nvidia_rim == ()


def test_the_operator_pins_the_roots_of_tpms() -> None:
    roots = amd_roots("Milan")
    pem = roots.ark.public_bytes(Encoding.PEM) + roots.ask.public_bytes(Encoding.PEM)
    assert load_anchors(tpm_roots=pem).tpm == (roots.ark, roots.ask)
    with pytest.raises(ConfigError, match="tpm_roots_file"):
        load_anchors(tpm_roots=b"no certificate")


@pytest.mark.parametrize("name", DIGESTS)
def test_a_replaced_file_is_refused(folder: Path, name: str) -> None:
    mine = amd_roots("Milan").ark.public_bytes(Encoding.PEM)
    (folder / name).write_bytes(mine * len(DIGESTS[name]))
    with pytest.raises(ConfigError, match=f"{name}: expected certificates"):
        load_anchors()


@pytest.mark.parametrize("name", DIGESTS)
def test_one_more_certificate_is_refused(folder: Path, name: str) -> None:
    mine = amd_roots("Milan").ark.public_bytes(Encoding.PEM)
    (folder / name).write_bytes((folder / name).read_bytes() + mine)
    with pytest.raises(ConfigError, match=name):
        load_anchors()


@pytest.mark.parametrize("name", DIGESTS)
def test_a_missing_or_unreadable_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=name):
        load_anchors()
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: this installation lacks"):
        load_anchors()


def test_the_simulated_roots_stand_beside_the_real_ones() -> None:
    real = load_anchors()
    both = load_simulated_anchors(real)
    (line,) = both.simulated_amd
    assert line.product == "Milan"
    line.ask.verify_directly_issued_by(line.ark)
    line.asvk.verify_directly_issued_by(line.ark)
    assert both.simulated_nvidia_device
    assert both.simulated_nvidia_rim
    assert (both.amd, both.intel_root, both.nvidia_rim) == (
        real.amd,
        real.intel_root,
        real.nvidia_rim,
    )
    assert not set(simulated(both)) & set(pinned(real))


def pinned(loaded: Anchors) -> list[x509.Certificate]:
    return [*loaded.nvidia_device, *loaded.nvidia_rim, *amd_certificates(loaded.amd)]


def simulated(loaded: Anchors) -> list[x509.Certificate]:
    return [
        *loaded.simulated_nvidia_device,
        *loaded.simulated_nvidia_rim,
        *amd_certificates(loaded.simulated_amd),
    ]


def amd_certificates(lines: tuple[AmdRoots, ...]) -> list[x509.Certificate]:
    return [one for line in lines for one in (line.ark, line.ask, line.asvk)]


@pytest.mark.parametrize("name", ["nvidia_device", "nvidia_rim", "amd"])
def test_without_its_files_there_is_no_simulated_provider(folder: Path, name: str) -> None:
    (folder / f"simulated_{name}.pem").unlink()
    load_anchors()
    with pytest.raises(ConfigError, match="unknown provider `simulated`"):
        load_simulated_anchors(Anchors())


def test_a_simulated_root_that_does_not_parse_is_refused(folder: Path) -> None:
    (folder / "simulated_amd.pem").write_bytes(amd_roots("Milan").ark.public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError, match="simulated_amd"):
        load_simulated_anchors(Anchors())


@needs_vectors
def test_amds_certificates_are_those_of_the_vectors() -> None:
    for line in load_amd():
        folder = VECTORS / "snp" / f"amd_{line.product.lower()}"
        for name in ("ark", "ask", "asvk"):
            assert chain.der_of(getattr(line, name)) == (folder / f"{name}.der").read_bytes()


@needs_vectors
def test_intels_root_is_the_one_at_the_end_of_its_chains() -> None:
    pem = (VECTORS / "tdx" / "ars_collateral" / "tcb_signing_chain.pem").read_bytes()
    assert chain.der_of(x509.load_pem_x509_certificates(pem)[-1]) == load_intel()


@needs_vectors
def test_nvidias_roots_are_those_of_the_vectors() -> None:
    loaded = load_anchors()
    folder = VECTORS / "nvidia" / "roots"
    for certificates, name in (
        (loaded.nvidia_device, "verifier_device_root.pem"),
        (loaded.nvidia_rim, "verifier_RIM_root.pem"),
    ):
        assert certificates == chain.parse_pem_chain((folder / name).read_bytes(), field=name)


def packaged(package: str) -> list[bytes]:
    """Every file of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"`{package}` is not installed here, and no test needs it but this one")
    [folder] = spec.submodule_search_locations
    return [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()]


def is_in(files: list[bytes], certificate: bytes) -> bool:
    """As DER, or as base64 in lines."""
    text = base64.b64encode(certificate)
    return any(certificate in one or text in b"".join(one.split()) for one in files)


def test_intels_root_is_the_one_that_the_tdx_library_carries() -> None:
    assert is_in(packaged("dcap_qvl"), load_intel())


@pytest.mark.parametrize(
    ("package", "product"),
    [("omne_attest", "Milan"), ("tinfoil", "Genoa"), ("sev_attest_tool", "Genoa")],
)
def test_amds_certificates_are_those_of_the_packages_that_carry_them(
    package: str, product: str
) -> None:
    """The other five are in no package that was found: rats/anchors/README.md."""
    files = packaged(package)
    [line] = [one for one in load_amd() if one.product == product]
    assert all(is_in(files, chain.der_of(one)) for one in (line.ark, line.ask))

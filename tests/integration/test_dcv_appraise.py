"""`dcv appraise`: files in, one verdict out.

Cases are vendor-signed vectors (tests/vectors_dir.py); `AT` lies inside the certificates' time of
those that still hold. What has no vector is made by the fakes, in the vendors' formats.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.cli import main
from appliance.verifier import appraise_cpu, receipt_command, verify_command
from appliance.verifier.raw_evidence import MAX_FILE_BYTES, split_certificates
from appliance.wire.azure_hcl import parse_hcl_report
from appliance.wire.azure_json import parse_azure_json
from appliance.wire.event_log import parse_event_log, replay
from appliance.wire.pem import join_pem
from tests.fakes import nvidia_evidence as fake
from tests.fakes.amd_evidence import rsa_key
from tests.fakes.azure_evidence import quote_message
from tests.fakes.software_tpm import (
    Firmware,
    SoftwareTpm,
    needs_software_tpm,
    software_tpm,
)
from tests.vectors_dir import VECTORS, needs_vectors

AT = "2026-11-23T12:00:00Z"
IN_2025 = "2025-06-20T00:00:00Z"
NVIDIA, SNP, TDX, AZURE = (VECTORS / name for name in ("nvidia", "snp", "tdx", "azure"))
H100, UNIT, RIMS, ROOTS = (NVIDIA / one for one in ("h100_595.71.05", "nvat_unit", "rims", "roots"))
DRIVER_RIM = H100 / "NV_GPU_DRIVER_GH100_595.71.05.xml"
VBIOS_RIM = H100 / "NV_GPU_VBIOS_1010_0210_886_96009F0004.xml"
SWITCH_RIM = RIMS / "switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml"

STATUS = {"affirming": 0, "contraindicated": 1, None: 2, "warning": 3}


@dataclass(frozen=True)
class Told:
    """What the command said."""

    status: int
    document: dict[str, Any]

    @property
    def verdict(self) -> str | None:
        verdict: str | None = self.document["verdict"]
        return verdict

    @property
    def code(self) -> str | None:
        error = self.document["error"]
        return None if error is None else str(error["code"])

    @property
    def message(self) -> str:
        return str(self.document["error"]["message"])

    @property
    def claims(self) -> dict[str, Any]:
        claims: dict[str, Any] = self.document["claims"]
        return claims

    @property
    def checks(self) -> list[str]:
        return [str(one["check"]) for one in self.document["findings"]]


def appraise(scheme: str, *arguments: object, at: str | None = AT) -> Told:
    """The command in this process, held to its stable form."""
    words = ["appraise", scheme, *map(str, arguments), "--json"]
    if at is not None:
        words += ["--at", at]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(words)
    told = Told(status, json.loads(out.getvalue()))
    assert list(told.document) == ["verdict", "error", "claims", "findings"]
    assert status == STATUS[told.verdict]
    error = told.document["error"]
    assert error is None or list(error) == ["code", "message"]
    assert error is None or "internal_error" not in error["message"], error
    assert (told.verdict == "affirming") <= (error is None and not told.document["findings"])
    return told


def device(report: str, chain: str) -> tuple[object, ...]:
    return ("--report", UNIT / report, "--chain", UNIT / chain)


def evidence(name: str) -> tuple[object, ...]:
    return ("--evidence", NVIDIA / name)


def rims(*files: Path) -> tuple[object, ...]:
    return tuple(word for file in files for word in ("--rim", file))


FULL = ("--report", H100 / "report.bin", "--chain", H100 / "chain.pem")
HOPPER = device("hopperAttestationReport.txt", "hopperCertChain.txt")
HOPPER_580 = device("hopper_580.159.03_report.txt", "hopper_580.159.03_chain.txt")
HOPPER_535_RIM = RIMS / "1010_0200_882_96005E0001_PROD.swidtag"
HOPPER_580_RIM = RIMS / "1010_0205_862_9600740020_PROD.swidtag"
WHEEL = device("wheel_550.90.07_report.txt", "wheel_550.90.07_chain.txt")
SWITCH = evidence("switch_evidence_ls10.json")
REPORT = SNP / "ars_test-report.bin"
SNP_CASE = ("--report", REPORT, "--vek", SNP / "ars_test-vcek.der")
VLEK_CASE = ("--report", SNP / "ars_test-vlek-report.bin", "--vek", SNP / "ars_test-vlek.der")
GOOGLE = SNP / "google_milan_report.bin"
TDX_CASE = (
    *("--quote", TDX / "phala_tdx_quote_v4.bin"),
    *("--collateral", TDX / "phala_tdx_quote_collateral.json"),
)

REFERENCE_VALUES = "nvidia_gpu.reference_values"
RIM_MISSING = "nvidia_gpu.rim_missing"

Case = tuple[str, tuple[object, ...], str, str, str | None, set[str]]
CASES: dict[str, Case] = {
    # name: scheme, arguments, time, verdict, error code, checks among the findings
    "H100 with every reference value": (
        *("nvidia-gpu", (*FULL, *rims(DRIVER_RIM, VBIOS_RIM)), AT, "affirming", None, set()),
    ),
    "H100 with the driver's only": (
        *("nvidia-gpu", (*FULL, *rims(DRIVER_RIM)), AT, "warning", None, {RIM_MISSING}),
    ),
    "H100 without reference values": (
        *("nvidia-gpu", FULL, AT, "warning", None, {REFERENCE_VALUES}),
    ),
    "H100 asked with another nonce": (
        *("nvidia-gpu", (*FULL, "--nonce", "00" * 32), AT, "contraindicated", "stale", set()),
    ),
    "H100 whose manifests' signers have expired": (
        *("nvidia-gpu", (*FULL, *rims(DRIVER_RIM, VBIOS_RIM)), "2028-05-01T00:00:00Z"),
        *("contraindicated", None, {"nvidia_gpu.rim_expired"}),
    ),
    "H100 before its manifests were signed": (
        *("nvidia-gpu", (*FULL, *rims(DRIVER_RIM)), "2026-01-01T00:00:00Z"),
        *("contraindicated", "stale", set()),
    ),
    "H100 with the manifest of another driver": (
        *("nvidia-gpu", (*FULL, *rims(RIMS / "NV_GPU_DRIVER_GH100_550.144.03.xml")), AT),
        *("contraindicated", None, {"nvidia_gpu.rim_version", RIM_MISSING}),
    ),
    "H100 under the root of the manifests": (
        *("nvidia-gpu", (*FULL, "--root", ROOTS / "verifier_RIM_root.pem"), AT),
        *("contraindicated", "unauthentic", set()),
    ),
    "H100 with another device's chain": (
        *("nvidia-gpu", ("--report", H100 / "report.bin", *HOPPER[2:]), AT),
        *("contraindicated", "unauthentic", set()),
    ),
    "Hopper 535": ("nvidia-gpu", HOPPER, AT, "warning", None, {REFERENCE_VALUES}),
    "Hopper 535 with its VBIOS's expired manifest": (
        *("nvidia-gpu", (*HOPPER, *rims(HOPPER_535_RIM)), AT, "contraindicated", None),
        {"nvidia_gpu.rim_expired", RIM_MISSING},
    ),
    "Hopper 535 with its VBIOS's manifest, in time": (
        *("nvidia-gpu", (*HOPPER, *rims(HOPPER_535_RIM)), IN_2025, "warning", None, {RIM_MISSING}),
    ),
    "Hopper 580": ("nvidia-gpu", HOPPER_580, AT, "warning", None, {REFERENCE_VALUES}),
    "Hopper 580 with a manifest that it does not match": (
        *("nvidia-gpu", (*HOPPER_580, *rims(HOPPER_580_RIM)), IN_2025, "contraindicated", None),
        {"nvidia_gpu.measurement", RIM_MISSING},
    ),
    "Hopper 570, called expired for its manifest": (
        "nvidia-gpu",
        device("hopperAttestationReportExpired.txt", "hopperCertChainExpired.txt"),
        *(AT, "warning", None, {REFERENCE_VALUES}),
    ),
    "a report with a bad signature": (
        "nvidia-gpu",
        device("hopperAttestationReportInvalidSignature.txt", "hopperCertChain.txt"),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "Blackwell": (
        "nvidia-gpu",
        device("blackwellAttestationReport.txt", "blackwellCertChain.txt"),
        *(AT, "warning", None, {REFERENCE_VALUES}),
    ),
    "the wheel's sample": ("nvidia-gpu", WHEEL, AT, "warning", None, {REFERENCE_VALUES}),
    "the wheel's sample and its manifest": (
        *("nvidia-gpu", (*WHEEL, *rims(RIMS / "Driver_RIM_test_no_gpu.swidtag")), AT),
        *("contraindicated", None, {"nvidia_gpu.rim_version"}),
    ),
    "a manifest with a bad signature": (
        *("nvidia-gpu", (*HOPPER, *rims(RIMS / "incorrect_signature_driver_rim.xml")), AT),
        *("contraindicated", "unauthentic", set()),
    ),
    "a manifest whose measurements were changed": (
        "nvidia-gpu",
        (*HOPPER, *rims(RIMS / "NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml")),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "Hopper 590 in JSON, PPCIE": (
        *("nvidia-gpu", evidence("evidence_hopper_590_12.json"), AT, "warning", None),
        {REFERENCE_VALUES, "nvidia_gpu.feature"},
    ),
    "Hopper in JSON": (
        *("nvidia-gpu", evidence("hopper_evidence.json"), AT, "warning", None, {REFERENCE_VALUES}),
    ),
    "Hopper whose certificate is on hold, nobody asked": (
        *("nvidia-gpu", evidence("hopper_evidence_cert_hold.json"), AT, "warning", None),
        {REFERENCE_VALUES},
    ),
    "NRAS's own certificates for evidence": (
        *("nvidia-gpu", evidence("nras_gpu_x5c_chain.json"), AT),
        *("contraindicated", "malformed", set()),
    ),
    "claims of NVIDIA's tools for evidence": (
        *("nvidia-gpu", evidence("dstack_nvattest_h100_claims.json"), AT),
        *("contraindicated", "malformed", set()),
    ),
    "LS10 with its reference values": (
        *("nvidia-switch", (*SWITCH, *rims(SWITCH_RIM)), AT, "affirming", None, set()),
    ),
    "LS10 from files": (
        "nvidia-switch",
        device("switchAttestationReport.txt", "switchCertChain.txt"),
        *(AT, "warning", None, {REFERENCE_VALUES}),
    ),
    "LS10 and a manifest that was changed": (
        "nvidia-switch",
        (
            *SWITCH,
            *rims(RIMS / "NV_SWITCH_BIOS_5612_0002_890_9610550001_measurement_mismatch.xml"),
        ),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "a switch for a GPU": (
        *("nvidia-gpu", SWITCH, AT, "contraindicated", None, {"nvidia_gpu.architecture"}),
    ),
    "a GPU for a switch": (
        *("nvidia-switch", FULL, AT, "contraindicated", None, {"nvidia_gpu.architecture"}),
    ),
    "Milan": ("sev-snp", SNP_CASE, AT, "warning", None, {"sev_snp.reference"}),
    "Milan with AMD's intermediates": (
        *("sev-snp", (*SNP_CASE, "--ca", SNP / "milan_ask_ark.pem"), AT, "warning", None),
        {"sev_snp.reference"},
    ),
    "Milan, bound to what was asked": (
        "sev-snp",
        (
            *SNP_CASE,
            "--report-data",
            "EC6C52D7533CC2C4F45BE7849CF112AB82B2009FE7BD43E71ED08C14400AD7E2",
        ),
        *(AT, "warning", None, {"sev_snp.reference"}),
    ),
    "Milan, bound to something else": (
        *("sev-snp", (*SNP_CASE, "--report-data", "00" * 64), AT, "contraindicated", None),
        {"sev_snp.report_data"},
    ),
    "Milan, debuggable": (
        "sev-snp",
        ("--report", GOOGLE, "--vek", SNP / "google_milan_vcek.der"),
        *(AT, "contraindicated", None, {"sev_snp.debug"}),
    ),
    "a certificate that AMD did not sign": (
        "sev-snp",
        ("--report", REPORT, "--vek", SNP / "ars_test-vcek-invalid-new.der"),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "another chip's certificate": (
        "sev-snp",
        ("--report", GOOGLE, "--vek", SNP / "ars_test-vcek.der"),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "another product's certificate": (
        "sev-snp",
        ("--report", REPORT, "--vek", SNP / "virtee_vcek_turin.der"),
        *(AT, "contraindicated", "unauthentic", set()),
    ),
    "an issuer that is not AMD's": (
        *("sev-snp", (*SNP_CASE, "--ca", ROOTS / "verifier_RIM_root.pem"), AT),
        *("contraindicated", "unauthentic", set()),
    ),
    "a VLEK in its time": (
        *("sev-snp", (*VLEK_CASE, "--ca", SNP / "amd_milan" / "asvk.der"), "2025-11-23T00:00:00Z"),
        *("warning", None, {"sev_snp.reference"}),
    ),
    "a VLEK after its time": ("sev-snp", VLEK_CASE, AT, "contraindicated", "stale", set()),
    "Milan of an Azure machine, with Azure's chain": (
        "sev-snp",
        ("--report", "hcl", "--vek", AZURE / "trustee_snp_vcek.pem"),
        *(AT, "warning", None, {"sev_snp.reference"}),
    ),
    "a TD in its collateral's time": (
        *("tdx", TDX_CASE, IN_2025, "warning", None, {"tdx.reference"}),
    ),
    "a TD after its collateral's time": ("tdx", TDX_CASE, AT, "contraindicated", "stale", set()),
    "a TD bound to something else": (
        *("tdx", (*TDX_CASE, "--report-data", "ab" * 32), IN_2025, "contraindicated", None),
        {"tdx.report_data"},
    ),
    "an SGX enclave for a TD": (
        "tdx",
        (
            *("--quote", TDX / "phala_sgx_quote_v3.bin"),
            *("--collateral", TDX / "phala_sgx_quote_collateral.json"),
        ),
        *(IN_2025, "contraindicated", "unauthentic", set()),
    ),
    "a TD with another platform's collateral": (
        *("tdx", ("--quote", TDX / "ars_tdx_quote_5.dat", *TDX_CASE[2:]), IN_2025),
        *("contraindicated", "unauthentic", set()),
    ),
    "a debuggable TD": (
        *("tdx", ("--quote", TDX / "ars_tdx_quote_4.dat", "--collateral", "ars")),
        *("2026-03-17T00:00:00Z", "contraindicated", "contraindicated", set()),
    ),
}
AZURE_NONCES = {
    "trustee_snp_evidence-v1.json": b"challenge".hex(),
    "trustee_snp_evidence-v2.json": (
        "982f5c6e45df0ed3f10b6f60b02f0c8390e281300f3805e2279c16168cd6ae9aa398f647caa2338748cd0fd9f5f819ef"
    ),
    "trustee_snp_evidence-genoa.json": (
        "0218488bae25d2509232bf676f1a66a30d7372add909109b36016ef136f2938ca05475f8b46094de6b64270ea35d950f"
    ),
    "ars_snp_milan-v3-attestation.json": "",
}


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    """Files that are in the vectors only as parts of others."""
    hcl = (AZURE / "trustee_snp_hcl-report.bin").read_bytes()
    files = {"hcl": hcl[32 : 32 + 1184], "ars": ars_collateral()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in files}


def ars_collateral() -> bytes:
    """Of the debuggable TD's platform, from the parts as Intel's service answers them."""
    folder = TDX / "ars_collateral"
    issuers = json.loads((TDX / "phala_tdx_quote_collateral.json").read_bytes())
    table = (folder / "tcb_info_50806f000000.json").read_text()
    identity = (folder / "td_qe_identity.json").read_text()
    document = {
        "pck_crl_issuer_chain": issuers["pck_crl_issuer_chain"],
        "root_ca_crl": (folder / "root_ca_crl.der").read_bytes().hex(),
        "pck_crl": (folder / "pck_crl_platform.der").read_bytes().hex(),
        "tcb_info_issuer_chain": (folder / "tcb_signing_chain.pem").read_text(),
        "tcb_info": as_signed(table, "tcbInfo"),
        "tcb_info_signature": json.loads(table)["signature"],
        "qe_identity_issuer_chain": (folder / "qe_identity_signing_chain.pem").read_text(),
        "qe_identity": as_signed(identity, "enclaveIdentity"),
        "qe_identity_signature": json.loads(identity)["signature"],
    }
    return json.dumps(document).encode()


def as_signed(text: str, name: str) -> str:
    """A member as it is spelled: that is what the signature is over."""
    found = re.search(rf'"{name}"\s*:\s*', text)
    assert found is not None
    _, end = json.JSONDecoder().raw_decode(text, found.end())
    return text[found.end() : end]


# --- every vector --------------------------------------------------------------------------------


@needs_vectors
@pytest.mark.parametrize("name", CASES)
def test_every_vector_gets_its_verdict(name: str, made: dict[str, Path]) -> None:
    scheme, arguments, at, verdict, code, checks = CASES[name]
    told = appraise(scheme, *(made.get(str(one), one) for one in arguments), at=at)
    assert (told.verdict, told.code) == (verdict, code), told.document
    assert set(told.checks) >= checks
    assert bool(told.checks) == bool(checks)
    assert bool(told.claims) == (code is None)
    if {REFERENCE_VALUES, "sev_snp.reference", "tdx.reference"} & checks:
        got = [one["got"] for one in told.document["findings"]]
        assert any("authentic, not compared" in one for one in got)


@needs_vectors
def test_the_nonce_of_the_positive_set_is_affirmed_with_and_without_asking() -> None:
    nonce = (H100 / "nonce.hex").read_text().strip()
    arguments = (*FULL, *rims(DRIVER_RIM, VBIOS_RIM))
    asked = appraise("nvidia-gpu", *arguments, "--nonce", nonce.upper())
    unasked = appraise("nvidia-gpu", *arguments)
    assert asked.verdict == unasked.verdict == "affirming"
    assert asked.claims["nonce"] == unasked.claims["nonce"] == nonce
    assert (asked.claims["nonce_compared"], unasked.claims["nonce_compared"]) == (True, False)
    assert asked.claims["driver_version"] == "595.71.05"
    assert [one["version"] for one in asked.claims["rims"]] == ["595.71.05", "96.00.9F.00.04"]


@needs_vectors
def test_a_root_of_the_callers_is_told_in_the_claims() -> None:
    pinned = appraise("nvidia-gpu", *FULL).claims["trusted_root"]
    given = appraise("nvidia-gpu", *FULL, "--root", ROOTS / "verifier_device_root.pem")
    assert pinned["pinned"] is True
    assert given.claims["trusted_root"] == {"sha256": pinned["sha256"], "pinned": False}
    der = split_certificates((ROOTS / "verifier_device_root.pem").read_bytes(), field="root")[0]
    assert pinned["sha256"] == hashlib.sha256(der).hexdigest()


@needs_vectors
@pytest.mark.parametrize("name", AZURE_NONCES)
def test_azure_evidence_of_every_shape_is_authentic_and_not_compared(name: str) -> None:
    unasked = appraise("azure-vtpm", "--evidence", AZURE / name)
    assert (unasked.verdict, unasked.code) == ("warning", None)
    assert {"azure_vtpm.reference", "sev_snp.reference"} <= set(unasked.checks)
    assert "sev_snp.revocation" not in unasked.checks
    assert [one.get("submod") for one in unasked.document["findings"]][-1] == "hardware"
    assert "submods" not in unasked.claims  # the hardware's are among its own
    nonce = AZURE_NONCES[name]
    asked = appraise("azure-vtpm", "--evidence", AZURE / name, "--nonce", nonce)
    assert (asked.verdict, asked.claims["report_data"]) == ("warning", nonce)
    assert (asked.claims["nonce_compared"], unasked.claims["nonce_compared"]) == (True, False)
    other = appraise("azure-vtpm", "--evidence", AZURE / name, "--nonce", nonce + "00")
    assert (other.verdict, other.code) == ("contraindicated", None)
    assert "azure_vtpm.report_data" in other.checks


@needs_vectors
def test_azure_parts_of_two_machines_are_unbound(tmp_path: Path) -> None:
    one, other = (
        json.loads((AZURE / f"trustee_snp_evidence-{name}.json").read_bytes())
        for name in ("v1", "v2")
    )
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps({**one, "tpm_quote": other["tpm_quote"]}))
    told = appraise("azure-vtpm", "--evidence", file)
    assert (told.verdict, told.code) == ("contraindicated", "unauthentic")
    quote = {**one["tpm_quote"], "pcrs": other["tpm_quote"]["pcrs"]}
    file.write_text(json.dumps({**one, "tpm_quote": quote}))
    told = appraise("azure-vtpm", "--evidence", file)
    assert (told.verdict, told.code) == ("contraindicated", "unbound")


@needs_vectors
def test_azure_tdx_needs_intels_collateral_and_may_get_it_by_itself(tmp_path: Path) -> None:
    document = json.loads((AZURE / "trustee_snp_evidence-v2.json").read_bytes())
    del document["vcek"]
    hcl = (AZURE / "trustee_tdx_hcl-report.bin").read_bytes()
    quote = (AZURE / "trustee_tdx_td-quote.bin").read_bytes()
    document["hcl_report"] = base64.urlsafe_b64encode(hcl).decode().rstrip("=")
    document["td_quote"] = base64.urlsafe_b64encode(quote).decode().rstrip("=")
    file = tmp_path / "tdx.json"
    file.write_text(json.dumps(document))
    told = appraise("azure-vtpm", "--evidence", file)
    assert (told.code, "collateral" in told.message) == ("unauthentic", True)
    # Another platform's collateral is read, and does not vouch for this one.
    collateral = ("--collateral", TDX / "phala_tdx_quote_collateral.json")
    told = appraise("azure-vtpm", "--evidence", file, *collateral, at=IN_2025)
    assert (told.code, "Fmspc" in told.message) == ("unauthentic", True)


# --- spellings of the same evidence ----------------------------------------------------------------

SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "binary": bytes,
    "hex": lambda data: data.hex().encode(),
    "HEX in lines": lambda data: b"\r\n".join(
        data.hex().upper()[at : at + 64].encode() for at in range(0, 2 * len(data), 64)
    ),
    "base64": base64.encodebytes,
    "base64url": lambda data: base64.urlsafe_b64encode(data).rstrip(b"="),
}


@needs_vectors
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_may_be_binary_hex_or_base64(spelling: str, tmp_path: Path) -> None:
    spell = SPELLINGS[spelling]
    chain = split_certificates((H100 / "chain.pem").read_bytes(), field="chain")
    files = {
        "report": (H100 / "report.bin").read_bytes(),
        "chain": b"".join(chain),
        "rim": DRIVER_RIM.read_bytes(),
        "snp": REPORT.read_bytes(),
        "vek": (SNP / "ars_test-vcek.der").read_bytes(),
        "quote": (TDX / "phala_tdx_quote_v4.bin").read_bytes(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(spell(data))
    device_files = ("--report", tmp_path / "report", "--chain", tmp_path / "chain")
    told = appraise("nvidia-gpu", *device_files, *rims(tmp_path / "rim", VBIOS_RIM))
    assert told.verdict == "affirming", told.document
    told = appraise("sev-snp", "--report", tmp_path / "snp", "--vek", tmp_path / "vek")
    assert (told.verdict, told.code) == ("warning", None)
    told = appraise("tdx", "--quote", tmp_path / "quote", *TDX_CASE[2:], at=IN_2025)
    assert (told.verdict, told.code) == ("warning", None)


@needs_vectors
def test_a_vek_may_come_as_pem_with_its_issuers_also_among_the_authorities(tmp_path: Path) -> None:
    vek = (SNP / "ars_test-vcek.der").read_bytes()
    whole = tmp_path / "chain.pem"
    whole.write_bytes(join_pem((vek,)) + (SNP / "milan_ask_ark.pem").read_bytes())
    told = appraise("sev-snp", "--report", REPORT, "--vek", whole, "--ca", whole)
    assert (told.verdict, told.checks) == ("warning", ["sev_snp.reference"])


@needs_vectors
def test_a_manifest_may_be_the_answer_of_nvidias_service(tmp_path: Path) -> None:
    wrapped = tmp_path / "rim.json"
    text = base64.b64encode(DRIVER_RIM.read_bytes()).decode()
    wrapped.write_text(json.dumps({"id": DRIVER_RIM.stem, "rim": text, "rim_format": "TCG"}))
    assert appraise("nvidia-gpu", *FULL, *rims(wrapped, VBIOS_RIM)).verdict == "affirming"


@needs_vectors
@pytest.mark.parametrize("extra", [b"", b"\0" * 32, b"\0"])
def test_a_report_has_exactly_its_length(extra: bytes, tmp_path: Path) -> None:
    (tmp_path / "report").write_bytes(REPORT.read_bytes() + extra)
    told = appraise("sev-snp", "--report", tmp_path / "report", *SNP_CASE[2:])
    assert told.code == ("malformed" if extra else None)


# --- JSON as NVIDIA's tools exchange it --------------------------------------------------------


def item(name: str) -> dict[str, Any]:
    (one,) = json.loads((NVIDIA / name).read_bytes())
    return dict(one)


def h100_item() -> dict[str, Any]:
    return {
        "arch": "HOPPER",
        "evidence": base64.b64encode((H100 / "report.bin").read_bytes()).decode(),
        "certificate": base64.b64encode((H100 / "chain.pem").read_bytes()).decode(),
        "nonce": (H100 / "nonce.hex").read_text().strip(),
    }


def written(folder: Path, document: object) -> tuple[object, ...]:
    (folder / "evidence.json").write_text(json.dumps(document))
    return ("--evidence", folder / "evidence.json")


ENVELOPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda one: [one],
    "an object": lambda one: one,
    "nvattest": lambda one: {"evidences": [one], "result_code": 0, "result_message": "Ok"},
    "an NRAS request": lambda one: {
        "nonce": one["nonce"],
        "arch": one["arch"],
        "evidence_list": [{"evidence": one["evidence"], "certificate": one["certificate"]}],
    },
    "without a nonce": lambda one: [
        {"evidence": one["evidence"], "certificate": one["certificate"]}
    ],
}


@needs_vectors
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_one_device_in_every_envelope_is_affirmed(envelope: str, tmp_path: Path) -> None:
    document = ENVELOPES[envelope](h100_item())
    arguments = (*written(tmp_path, document), *rims(DRIVER_RIM, VBIOS_RIM))
    told = appraise("nvidia-gpu", *arguments)
    assert told.verdict == "affirming", told.document
    assert told.claims["nonce_compared"] is (envelope != "without a nonce")
    stale = appraise("nvidia-gpu", *arguments, "--nonce", "11" * 32)
    assert (stale.verdict, stale.code) == ("contraindicated", "stale")


@needs_vectors
@pytest.mark.parametrize("envelope", ["a list", "an object", "nvattest", "an NRAS request"])
def test_the_nonce_in_the_file_must_be_the_reports(envelope: str, tmp_path: Path) -> None:
    document = ENVELOPES[envelope](h100_item() | {"nonce": "22" * 32})
    told = appraise("nvidia-gpu", *written(tmp_path, document), *rims(DRIVER_RIM, VBIOS_RIM))
    assert (told.verdict, told.code) == ("contraindicated", "stale")
    # The caller's own nonce does not stand in for one in the file that is wrong.
    nonce = (H100 / "nonce.hex").read_text().strip()
    told = appraise("nvidia-gpu", *written(tmp_path, document), "--nonce", nonce)
    assert (told.verdict, told.code) == ("contraindicated", "stale")


@needs_vectors
def test_of_several_devices_each_is_appraised_and_the_worst_counts(tmp_path: Path) -> None:
    good, other = h100_item(), item("hopper_evidence_cert_hold.json")
    told = appraise("nvidia-gpu", *written(tmp_path, [good, good]), *rims(DRIVER_RIM, VBIOS_RIM))
    assert told.verdict == "affirming"
    arguments = rims(DRIVER_RIM, VBIOS_RIM)
    told = appraise("nvidia-gpu", *written(tmp_path, [good, other]), *arguments)
    assert told.verdict == "warning"
    versions = {name: one["driver_version"] for name, one in told.claims["submods"].items()}
    assert versions == {"GPU-0": "595.71.05", "GPU-1": "570.86.10"}
    # A manifest for its neighbour is no finding on a device.
    assert [(one["submod"], one["check"]) for one in told.document["findings"]] == [
        ("GPU-1", REFERENCE_VALUES)
    ]
    report = bytearray(base64.b64decode(other["evidence"]))
    report[-1] ^= 1
    forged = other | {"evidence": base64.b64encode(report).decode()}
    told = appraise("nvidia-gpu", *written(tmp_path, [good, forged, other]), *arguments)
    assert (told.verdict, told.code) == ("contraindicated", "unauthentic")
    assert told.message.startswith("GPU-1: ")
    assert told.claims["submods"]["GPU-0"]["driver_version"] == "595.71.05"
    assert told.claims["submods"]["GPU-1"] == {}


@needs_vectors
def test_switches_are_named_as_such(tmp_path: Path) -> None:
    one = item("switch_evidence_ls10.json")
    told = appraise("nvidia-switch", *written(tmp_path, [one, one]), *rims(SWITCH_RIM))
    assert (told.verdict, list(told.claims["submods"])) == ("affirming", ["SWITCH-0", "SWITCH-1"])


BROKEN: dict[str, object] = {
    "nothing": [],
    "too many": [{}] * 65,
    "no object": [1],
    "no evidence": [{"certificate": "AAAA"}],
    "numbers for evidence": [{"evidence": 1, "certificate": "AAAA"}],
    "no base64": [{"evidence": "!!", "certificate": "AAAA"}],
    "a bad nonce": [{"evidence": "AAAA", "certificate": "AAAA", "nonce": "zz"}],
    "a short nonce": [{"evidence": "AAAA", "certificate": "AAAA", "nonce": "00"}],
    "an empty envelope": {"evidences": []},
    "an envelope of text": {"evidences": "AAAA"},
    "text": "AAAA",
    "null": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_evidence_files_of_another_shape_are_malformed(name: str, tmp_path: Path) -> None:
    told = appraise("nvidia-gpu", *written(tmp_path, BROKEN[name]))
    assert (told.verdict, told.code) == ("contraindicated", "malformed")


# --- a TPM -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quoted:
    """A quote's files."""

    folder: Path

    def arguments(self, **more: object) -> list[object]:
        words: list[object] = []
        for name in ("quote", "signature", "ak", "pcrs"):
            words += [f"--{name}", self.folder / name]
        for name, value in more.items():
            words += [f"--{name.replace('_', '-')}", value]
        return words


@pytest.fixture
def azure_quote(tmp_path: Path) -> Quoted:
    """A real vTPM's: Azure's, by the key that its paravisor vouches for."""
    parts = parse_azure_json((AZURE / "trustee_snp_evidence-v2.json").read_bytes()).parts
    key = parse_hcl_report(parts["hcl_report"]).claims.attestation_key
    (tmp_path / "ak").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for name in ("quote", "signature", "pcrs"):
        (tmp_path / name).write_bytes(parts[name])
    return Quoted(tmp_path)


PCRS_WITH_12 = {0: b"a" * 32, 4: b"b" * 32, 7: b"c" * 32, 11: b"d" * 32, 12: bytes(32)}


def made_quote(folder: Path, pcrs: dict[int, bytes]) -> Quoted:
    """By a key of this process."""
    key = rsa_key("test AK")
    message = quote_message(b"nonce", pcrs)
    files = {
        "quote": message,
        "signature": key.sign(message, padding.PKCS1v15(), hashes.SHA256()),
        "ak": key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "pcrs": json.dumps(
            {"sha256": {str(pcr): value.hex() for pcr, value in pcrs.items()}}
        ).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Quoted(folder)


def reference_file(folder: Path, *images: dict[str, list[str]]) -> Path:
    document = {
        "api_version": "dcv/1",
        "images": [
            {"image_digest": f"sha256:{index:064x}", "pcrs": pcrs}
            for index, pcrs in enumerate(images)
        ],
    }
    (folder / "reference.json").write_text(json.dumps(document))
    return folder / "reference.json"


@needs_vectors
def test_a_real_vtpms_quote_is_authentic_and_a_warning(azure_quote: Quoted) -> None:
    told = appraise("tpm", *azure_quote.arguments())
    assert (told.verdict, told.code) == ("warning", None)
    assert {"tpm2.memory", "tpm2.reference"} <= set(told.checks)
    assert told.claims["report_data"] == AZURE_NONCES["trustee_snp_evidence-v2.json"]
    other = azure_quote.folder / "other"
    other.write_bytes(
        rsa_key("test AK")
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    told = appraise("tpm", *azure_quote.arguments(ak=other))
    assert (told.verdict, told.code) == ("contraindicated", "unauthentic")


@needs_vectors
def test_pcr_values_may_be_all_24_in_a_row(azure_quote: Quoted) -> None:
    document = json.loads((AZURE / "trustee_snp_evidence-v2.json").read_bytes())
    row = azure_quote.folder / "row"
    row.write_text("".join(document["tpm_quote"]["pcrs"]))
    assert appraise("tpm", *azure_quote.arguments(pcrs=row)).verdict == "warning"
    row.write_text("".join(document["tpm_quote"]["pcrs"][::-1]))
    assert appraise("tpm", *azure_quote.arguments(pcrs=row)).code == "unbound"


def test_reference_values_of_any_image_will_do_and_never_a_mixture(tmp_path: Path) -> None:
    quoted = made_quote(tmp_path, PCRS_WITH_12)
    good = {str(pcr): [PCRS_WITH_12[pcr].hex()] for pcr in (4, 7, 11)}
    bad_4, bad_7 = good | {"4": ["00" * 32]}, good | {"7": ["00" * 32]}
    told = appraise("tpm", *quoted.arguments(reference=reference_file(tmp_path, bad_4, good)))
    assert (told.verdict, told.checks) == ("warning", ["tpm2.memory"])
    assert told.claims["image_digest"] == f"sha256:{1:064x}"
    told = appraise("tpm", *quoted.arguments(reference=reference_file(tmp_path, bad_4, bad_7)))
    assert (told.verdict, told.code) == ("contraindicated", None)
    assert "tpm2.pcr4" in told.checks


def test_a_reference_file_that_does_not_parse_says_nothing_about_the_quote(tmp_path: Path) -> None:
    quoted = made_quote(tmp_path, PCRS_WITH_12)
    (tmp_path / "reference").write_text("{}")
    told = appraise("tpm", *quoted.arguments(reference=tmp_path / "reference"))
    assert (told.status, told.verdict, told.code) == (2, None, "could_not_verify")


def test_an_event_log_must_give_the_quoted_values(tmp_path: Path) -> None:
    firmware = Firmware().boot()
    (tmp_path / "log").write_bytes(firmware.log)
    replayed = {4: replay_of(firmware.log, 4), 7: replay_of(firmware.log, 7)}
    quoted = made_quote(tmp_path, replayed)
    told = appraise("tpm", *quoted.arguments(event_log=tmp_path / "log"))
    assert (told.verdict, told.claims["event_log"]["replayed_pcrs"]) == ("warning", [4, 7])
    firmware.measure(4, b"something else")
    (tmp_path / "log").write_bytes(firmware.log.hex().encode())
    told = appraise("tpm", *quoted.arguments(event_log=tmp_path / "log"))
    assert (told.verdict, told.code) == ("contraindicated", "unbound")
    assert "PCR 4" in told.message
    (tmp_path / "log").write_bytes(firmware.log[:-1])
    told = appraise("tpm", *quoted.arguments(event_log=tmp_path / "log"))
    assert (told.verdict, told.code) == ("contraindicated", "malformed")


def replay_of(log: bytes, pcr: int) -> bytes:
    return replay(parse_event_log(log))[pcr]


@pytest.fixture
def tpm() -> Iterator[SoftwareTpm]:
    with software_tpm() as started:
        yield started


@needs_software_tpm
@pytest.mark.parametrize("form", ["serialized", "values", "text"])
@pytest.mark.parametrize("key", ["tpmt", "der"])
def test_what_tpm2_tools_write_is_read(
    tpm: SoftwareTpm, form: str, key: str, tmp_path: Path
) -> None:
    tpm.key(0x81010001)
    (tmp_path / "log").write_bytes(Firmware(tpm).boot().log)
    pcrs = "sha256:0,4,7,11,12"
    tpm.tool(
        *("tpm2_quote", "-c", "0x81010001", "-l", pcrs, "-q", "abcd", "-m", "quote"),
        *("-s", "signature", "-o", "pcrs", "-F", "serialized" if form == "text" else form),
    )
    if form == "text":
        (tpm.folder / "pcrs").write_bytes(tpm.tool("tpm2_pcrread", pcrs))
    for name in ("quote", "signature", "pcrs"):
        shutil.copy(tpm.folder / name, tmp_path / name)
    shutil.copy(tpm.folder / f"key.{key}", tmp_path / "ak")
    told = appraise("tpm", *Quoted(tmp_path).arguments(event_log=tmp_path / "log"))
    assert (told.verdict, told.code) == ("warning", None), told.document
    assert told.claims["report_data"] == "abcd"
    assert told.claims["event_log"]["replayed_pcrs"] == [0, 4, 7, 11]


# --- bad arguments, unreadable files -----------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("nvidia-gpu", ()),
        ("nvidia-gpu", ("--report", "FILE")),
        ("nvidia-gpu", ("--chain", "FILE")),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--evidence", "FILE")),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--nonce", "zz")),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--nonce", "00" * 31)),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--nonce", "")),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--root", "FILE")),
        ("nvidia-gpu", ("--report", "FILE", "--chain", "FILE", "--rim", "MISSING")),
        ("nvidia-switch", ("--evidence", "MISSING")),
        ("nvidia-switch", ("--evidence", "FOLDER")),
        ("sev-snp", ("--report", "FILE", "--vek", "MISSING")),
        ("sev-snp", ("--report", "FILE", "--vek", "FILE", "--ca", "MISSING")),
        ("sev-snp", ("--report", "FILE", "--vek", "FILE", "--report-data", "00" * 33)),
        ("tdx", ("--quote", "FILE", "--collateral", "FILE", "--report-data", "0")),
        ("tdx", ("--quote", "MISSING", "--collateral", "FILE")),
        ("azure-vtpm", ("--evidence", "FILE", "--nonce", "00" * 67)),
        ("azure-vtpm", ("--evidence", "FILE", "--collateral", "MISSING")),
    ],
)
def test_bad_arguments_and_unreadable_files_leave_the_verdict_open(
    scheme: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "FILE").write_bytes(b"no evidence")
    (tmp_path / "FOLDER").mkdir()
    words = [
        str(tmp_path / one) if one in {"FILE", "MISSING", "FOLDER"} else one for one in arguments
    ]
    told = appraise(scheme, *words)
    assert (told.status, told.verdict, told.code) == (2, None, "could_not_verify")
    assert (told.claims, told.checks) == ({}, [])


@pytest.mark.parametrize("at", ["yesterday", "2026-11-23", "2026-11-23T12:00:00"])
def test_a_time_without_an_offset_leaves_the_verdict_open(at: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no evidence")
    told = appraise("sev-snp", "--report", tmp_path / "file", "--vek", tmp_path / "file", at=at)
    assert (told.status, told.code) == (2, "could_not_verify")


def test_a_file_of_more_than_16_mib_is_no_evidence(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    told = appraise("azure-vtpm", "--evidence", tmp_path / "large")
    assert (told.verdict, told.code) == ("contraindicated", "malformed")


def test_empty_files_are_no_evidence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    for scheme, options in (
        ("nvidia-gpu", ("--report", "--chain")),
        ("nvidia-switch", ("--evidence",)),
        ("sev-snp", ("--report", "--vek")),
        ("tdx", ("--quote", "--collateral")),
        ("azure-vtpm", ("--evidence",)),
        ("tpm", ("--quote", "--signature", "--ak", "--pcrs")),
    ):
        words = [word for option in options for word in (option, empty)]
        told = appraise(scheme, *words)
        assert (told.verdict, told.code) == ("contraindicated", "malformed"), scheme


@pytest.mark.parametrize(
    ("module", "parser", "words"),
    [
        (appraise_cpu, "appraise_azure_file", ["appraise", "azure-vtpm", "--evidence"]),
        (verify_command, "parse_bundle", ["verify"]),
        (receipt_command, "parse_json_object", ["receipt", "verify"]),
    ],
    ids=["raw evidence", "a bundle", "a receipt"],
)
def test_a_defect_of_a_parser_is_told_as_evidence_that_is_refused(
    module: ModuleType,
    parser: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The only place where something of ours is replaced: the defect is not there to be met."""

    def fails(*_: object, **__: object) -> None:
        raise IndexError("secret bytes of the evidence")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(module, parser, fails)
    status = main([*words, str(tmp_path / "file"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (status, document["verdict"]) == (1, "contraindicated")
    assert "internal_error" in document["error"]["message"]
    assert "secret" not in json.dumps(document)


# --- the command as auditors run it --------------------------------------------------------------


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", "appraise", *map(str, words)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


SCRIPTED = (
    "H100 with every reference value",
    "H100 asked with another nonce",
    "a report with a bad signature",
    "Hopper in JSON",
    "LS10 with its reference values",
    "Milan",
    "Milan, debuggable",
    "a TD in its collateral's time",
)


@needs_vectors
@pytest.mark.parametrize("name", SCRIPTED)
def test_exit_statuses_and_json_of_the_real_command(name: str) -> None:
    scheme, arguments, at, verdict, code, _ = CASES[name]
    done = run(scheme, *arguments, "--at", at, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == STATUS[verdict]
    assert document["verdict"] == verdict
    assert (document["error"] or {}).get("code") == code
    assert done.stderr == ""
    assert document == appraise(scheme, *arguments, at=at).document


@needs_vectors
def test_the_clock_is_the_default_time() -> None:
    """The VLEK's year is over for good; the device certificates of NVIDIA never end."""
    expired = run("sev-snp", *VLEK_CASE, "--json")
    assert (expired.returncode, json.loads(expired.stdout)["error"]["code"]) == (1, "stale")
    assert run("nvidia-gpu", *FULL).returncode == 3


@needs_vectors
def test_people_see_the_verdict_first_and_no_colour_in_a_pipe() -> None:
    done = run("sev-snp", *CASES["Milan, debuggable"][1], "--at", AT)
    assert done.returncode == 1
    assert done.stdout.startswith("CONTRAINDICATED")
    assert "sev_snp.debug" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_the_real_command_says_why_it_could_not_check(tmp_path: Path) -> None:
    gone = run("tdx", "--quote", tmp_path / "gone", "--collateral", tmp_path / "gone", "--json")
    assert (gone.returncode, json.loads(gone.stdout)["verdict"]) == (2, None)
    assert gone.stderr == ""
    unknown = run("sgx", "--quote", "x")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "invalid choice" in unknown.stderr
    missing = run("sev-snp", "--report", "x")
    assert (missing.returncode, "--vek" in missing.stderr) == (2, True)
    assert "Traceback" not in unknown.stderr + missing.stderr


# --- whatever the files hold ---------------------------------------------------------------------


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@needs_vectors
def test_no_flipped_bit_of_a_gpus_report_is_affirmed(tmp_path: Path) -> None:
    rng, file = random.Random(595), tmp_path / "report"
    data = (H100 / "report.bin").read_bytes()
    for _ in range(150):
        file.write_bytes(flipped(data, rng))
        told = appraise("nvidia-gpu", "--report", file, *FULL[2:], *rims(DRIVER_RIM, VBIOS_RIM))
        assert told.verdict == "contraindicated"
        assert told.code in {"malformed", "unauthentic", "unbound"}


@needs_vectors
@pytest.mark.filterwarnings("ignore:Attribute's length", "ignore:Parsed a serial number")
def test_no_flipped_bit_of_a_chain_is_affirmed_as_pem_or_der(tmp_path: Path) -> None:
    rng, file = random.Random(596), tmp_path / "chain"
    pem = (H100 / "chain.pem").read_bytes()
    arguments = (*FULL[:2], "--chain", file, *rims(DRIVER_RIM, VBIOS_RIM))
    for data in (pem, b"".join(split_certificates(pem, field="chain"))):
        file.write_bytes(data)
        assert appraise("nvidia-gpu", *arguments).verdict == "affirming"
        for _ in range(100):
            file.write_bytes(flipped(data, rng))
            assert appraise("nvidia-gpu", *arguments).verdict == "contraindicated"


@needs_vectors
def test_a_chain_that_breaks_off_in_its_last_certificate_is_refused(tmp_path: Path) -> None:
    file, pem = tmp_path / "chain", (H100 / "chain.pem").read_bytes()
    for length in range(pem.rindex(b"-----BEGIN") + 1, len(pem) - 1, 37):
        file.write_bytes(pem[:length])
        told = appraise("nvidia-gpu", *FULL[:2], "--chain", file, *rims(DRIVER_RIM, VBIOS_RIM))
        assert told.code == "malformed"


@needs_vectors
@pytest.mark.filterwarnings("ignore:Attribute's length", "ignore:Parsed a serial number")
@pytest.mark.parametrize("rim", [DRIVER_RIM, VBIOS_RIM], ids=["driver", "vbios"])
def test_no_flipped_bit_of_a_manifest_is_affirmed(rim: Path, tmp_path: Path) -> None:
    rng, file = random.Random(rim.name), tmp_path / "rim.xml"
    data = rim.read_bytes()
    others = [one for one in (DRIVER_RIM, VBIOS_RIM) if one != rim]
    for _ in range(60):
        file.write_bytes(flipped(data, rng))
        told = appraise("nvidia-gpu", *FULL, *rims(*others, file))
        assert told.verdict != "affirming", told.document


@needs_vectors
def test_no_flipped_bit_of_cpu_evidence_is_authentic(tmp_path: Path, azure_quote: Quoted) -> None:
    rng, file = random.Random(1184), tmp_path / "changed"
    vek = (SNP / "ars_test-vcek.der").read_bytes()
    quote = (TDX / "phala_tdx_quote_v4.bin").read_bytes()
    signed = 48 + 584
    message, signature = (
        (azure_quote.folder / name).read_bytes() for name in ("quote", "signature")
    )
    pcrs = (azure_quote.folder / "pcrs").read_bytes()
    for _ in range(40):
        for data, scheme, words, at in (
            (REPORT.read_bytes(), "sev-snp", ["--report", file, *SNP_CASE[2:]], AT),
            (vek, "sev-snp", [*SNP_CASE[:2], "--vek", file], AT),
            (quote[:signed], "tdx", ["--quote", file, *TDX_CASE[2:]], IN_2025),
            (message, "tpm", azure_quote.arguments(quote=file), AT),
            (signature, "tpm", azure_quote.arguments(signature=file), AT),
            (pcrs, "tpm", azure_quote.arguments(pcrs=file), AT),
        ):
            rest = quote[signed:] if scheme == "tdx" else b""
            file.write_bytes(flipped(data, rng) + rest)
            told = appraise(scheme, *words, at=at)
            assert told.verdict == "contraindicated", (scheme, told.document)
            assert told.code is not None


def nonsense(rng: random.Random, data: bytes) -> bytes:
    """Something like a file, and not it."""
    size = rng.choice([0, 1, 2, 37, 64, 600, 1184, 5000])
    match rng.randrange(8):
        case 0:
            return rng.randbytes(size)
        case 1:
            return rng.randbytes(size).hex().encode()
        case 2:
            return base64.b64encode(rng.randbytes(size))
        case 3:
            return data[: rng.randrange(len(data))]
        case 4:
            return data + rng.randbytes(rng.randrange(1, 40))
        case 5:
            at = rng.randrange(len(data))
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case 6:
            return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(rng.randbytes(size))
        case _:
            return rng.choice([b"[" * 100_000, b'{"evidences":' * 50, b"null", b'"\\ud800"', b"{}"])


@needs_vectors
@pytest.mark.parametrize(
    "scheme", ["nvidia-gpu", "nvidia-switch", "sev-snp", "tdx", "azure-vtpm", "tpm"]
)
def test_whatever_the_files_hold_the_command_answers(
    scheme: str, tmp_path: Path, azure_quote: Quoted
) -> None:
    """One file at a time is replaced; the form of the answer is checked by `appraise`."""
    rng = random.Random(scheme)
    options: dict[str, tuple[list[object], str]] = {
        "nvidia-gpu": ([*FULL, *rims(DRIVER_RIM)], AT),
        "nvidia-switch": ([*SWITCH, *rims(SWITCH_RIM)], AT),
        "sev-snp": ([*SNP_CASE, "--ca", SNP / "milan_ask_ark.pem"], AT),
        "tdx": ([*TDX_CASE], IN_2025),
        "azure-vtpm": (["--evidence", AZURE / "trustee_snp_evidence-v1.json"], AT),
        "tpm": (azure_quote.arguments(), AT),
    }
    words, at = options[scheme]
    for _ in range(120):
        place = rng.randrange(len(words) // 2) * 2 + 1
        original = Path(str(words[place])).read_bytes()
        changed = tmp_path / "changed"
        data = nonsense(rng, original) if rng.randrange(3) else flipped(original, rng)
        changed.write_bytes(data)
        told = appraise(scheme, *words[:place], changed, *words[place + 1 :], at=at)
        assert told.status in {0, 1, 3}
        if b"".join(data.split()) != b"".join(original.split()) and told.verdict == "affirming":
            # Only what nobody signed may differ: the text around the evidence.
            assert scheme == "nvidia-switch"
            assert told.claims["vbios_version"] == "96.10.55.00.01"


@needs_vectors
def test_every_kind_of_value_in_every_place_of_the_json_is_answered(tmp_path: Path) -> None:
    values: list[Any] = [None, True, 0, -1, 1.5, 2**53, "", "AA", "A" * 9999, [], [256], {}, [[]]]
    azure = json.loads((AZURE / "trustee_snp_evidence-v2.json").read_bytes())
    older = json.loads((AZURE / "trustee_snp_evidence-genoa.json").read_bytes())
    collateral = json.loads((TDX / "phala_tdx_quote_collateral.json").read_bytes())
    gpu = h100_item()
    file = tmp_path / "file.json"
    for document, scheme, words in (
        (azure, "azure-vtpm", ["--evidence", file]),
        (older, "azure-vtpm", ["--evidence", file]),
        (azure["tpm_quote"], "azure-vtpm", ["--evidence", file]),
        (collateral, "tdx", [*TDX_CASE[:2], "--collateral", file]),
        (gpu, "nvidia-gpu", ["--evidence", file]),
    ):
        for key in document:
            for value in values:
                changed = {**document, key: value}
                if document is azure["tpm_quote"]:
                    changed = {**azure, "tpm_quote": changed}
                file.write_text(json.dumps(changed))
                told = appraise(scheme, *words, at=IN_2025)
                assert told.verdict in {"contraindicated", "warning"}
                # Only what nobody signed may be anything; the list's issuers are in the quote too.
                unsigned = {"arch", "nonce", "version", "pck_crl_issuer_chain"}
                assert told.verdict == "contraindicated" or key in unsigned


def test_evidence_of_a_devices_own_root_is_taken_only_under_that_root(tmp_path: Path) -> None:
    """A root of the caller's is the caller's trust, and NVIDIA's manifests stay NVIDIA's."""
    gpu = fake.hopper()
    made = gpu.evidence()
    (tmp_path / "report").write_bytes(made.report)
    (tmp_path / "chain").write_bytes(made.certificate_chain)
    (tmp_path / "root").write_bytes(gpu.root.certificate.public_bytes(Encoding.DER))
    (tmp_path / "rim").write_bytes(fake.driver_rim())
    words: tuple[object, ...] = ("--report", tmp_path / "report", "--chain", tmp_path / "chain")
    at = f"{fake.AT:%Y-%m-%dT%H:%M:%SZ}"
    assert appraise("nvidia-gpu", *words, at=at).code == "unauthentic"
    words = (*words, "--root", tmp_path / "root")
    told = appraise("nvidia-gpu", *words, at=at)
    assert (told.verdict, told.claims["trusted_root"]["pinned"]) == ("warning", False)
    told = appraise("nvidia-gpu", *words, *rims(tmp_path / "rim"), at=at)
    assert (told.verdict, told.code) == ("contraindicated", "unauthentic")

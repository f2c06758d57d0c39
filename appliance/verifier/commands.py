"""`dcv appraise SCHEME …`: raw vendor evidence from files, offline."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from appliance.endorsements.anchors import load_anchors
from appliance.errors import Malformed, VerificationIncomplete
from appliance.rats.chain import parse_der_certificate
from appliance.rats.reference import ReferenceValues, parse_reference_values
from appliance.verifier import appraise_cpu, appraise_nvidia
from appliance.verifier.arguments import tell
from appliance.verifier.raw_evidence import parse_hex, parse_time, read_file, split_certificates
from appliance.verifier.verdict import Outcome, of_result

EXIT_STATUS = (
    "Exit status: 0 affirming, 1 contraindicated, 2 could not be checked (bad arguments, files that "
    "cannot be read), 3 warning. FILE may hold binary data, or hex or base64 text of them; "
    "certificates PEM or DER."
)

Scheme: TypeAlias = Callable[[argparse.Namespace, datetime.datetime], Outcome]


def add_appraise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `appraise` and what is below it."""
    appraise = commands.add_parser(
        "appraise",
        help="appraise raw vendor evidence from files, offline",
        description="Hold vendor evidence in files to the vendors' pinned roots, offline.",
        epilog=EXIT_STATUS,
    )
    schemes = appraise.add_subparsers(required=True, metavar="SCHEME")

    for name, kind, what in (
        ("nvidia-gpu", appraise_nvidia.GPU, "NVIDIA GPUs' attestation reports"),
        ("nvidia-switch", appraise_nvidia.SWITCH, "NVSwitches' attestation reports (LS10)"),
    ):
        one = _add(schemes, name, what, _nvidia(kind))
        _file(one, "--report", "the report, with its request; needs --chain")
        _file(one, "--chain", "the device's certificates, leaf first")
        _file(one, "--evidence", "JSON as NVIDIA's tools exchange it, of one or several devices")
        one.add_argument(
            "--rim", type=Path, action="append", default=[], metavar="FILE", help="reference values"
        )
        one.add_argument("--nonce", metavar="HEX", help="32 bytes that were asked with")
        _file(one, "--root", "trust these certificates above devices, not NVIDIA's pinned one")

    one = _add(schemes, "sev-snp", "an AMD SEV-SNP report", _sev_snp)
    _file(one, "--report", "the report, 1184 bytes", required=True)
    _file(one, "--vek", "certificate of the VCEK or VLEK; issuers may follow it", required=True)
    one.add_argument(
        "--ca", type=Path, action="append", default=[], metavar="FILE", help="AMD's intermediates"
    )
    _report_data(one)

    one = _add(schemes, "tdx", "an Intel TD quote", _tdx)
    _file(one, "--quote", "the quote, format 4 or 5", required=True)
    _file(one, "--collateral", "Intel's collateral, JSON (QuoteCollateralV3)", required=True)
    _report_data(one)

    one = _add(schemes, "azure-vtpm", "an Azure confidential VM's evidence", _azure_vtpm)
    _file(one, "--evidence", "JSON: HCL report, TPM quote, VCEK or TD quote", required=True)
    _file(one, "--collateral", "of TDX machines: Intel's collateral, where --evidence has none")
    one.add_argument("--nonce", metavar="HEX", help="the TPM quote's qualifying data, all of them")

    one = _add(schemes, "tpm", "a TPM's quote, by a key that you vouch for", _tpm)
    _file(one, "--quote", "TPMS_ATTEST", required=True)
    _file(one, "--signature", "TPMT_SIGNATURE, or the bare signature", required=True)
    _file(one, "--ak", "attestation key: PEM, DER, certificate or TPM2B_PUBLIC", required=True)
    _file(one, "--pcrs", "SHA-256 values, in any form of tpm2-tools, or JSON", required=True)
    _file(one, "--event-log", "the firmware's log (TCG2)")
    _file(one, "--reference", "reference values of images, JSON")


def appraise_command(arguments: argparse.Namespace) -> int:
    """`dcv appraise SCHEME …`: prints the outcome and returns its exit status."""
    return tell(arguments, _appraise)


def _appraise(arguments: argparse.Namespace) -> Outcome:
    scheme: Scheme = arguments.scheme
    return scheme(arguments, _at(arguments.at))


def _nvidia(kind: appraise_nvidia.Kind) -> Scheme:
    def appraise(arguments: argparse.Namespace, at: datetime.datetime) -> Outcome:
        anchors = load_anchors()
        nonce = None
        if arguments.nonce is not None:
            lengths = (appraise_nvidia.NONCE_BYTES,)
            nonce = parse_hex(arguments.nonce, option="--nonce", lengths=lengths)
        roots = appraise_nvidia.Roots(anchors.nvidia_device, anchors.nvidia_rim)
        if arguments.root is not None:
            roots = _given_roots(arguments.root, roots)
        # Every file is read before any is parsed: one that is missing leaves the verdict open.
        rims = [read_file(one, option="--rim") for one in arguments.rim]
        return appraise_nvidia.appraise_devices(
            kind,
            _devices(arguments, nonce),
            [appraise_nvidia.parse_rim_file(one) for one in rims],
            roots=roots,
            at=at,
        )

    return appraise


def _devices(
    arguments: argparse.Namespace, nonce: bytes | None
) -> tuple[appraise_nvidia.Device, ...]:
    report, chain, evidence = arguments.report, arguments.chain, arguments.evidence
    if evidence is not None and report is None and chain is None:
        return appraise_nvidia.parse_devices(read_file(evidence, option="--evidence"), nonce)
    if evidence is None and report is not None and chain is not None:
        report, chain = read_file(report, option="--report"), read_file(chain, option="--chain")
        return (appraise_nvidia.device_of(report, chain, nonce),)
    raise VerificationIncomplete("expected either --report and --chain, or --evidence")


def _given_roots(path: Path, pinned: appraise_nvidia.Roots) -> appraise_nvidia.Roots:
    """Above devices those of the file; what signs reference values stays NVIDIA's."""
    data = read_file(path, option="--root")
    try:
        given = tuple(
            parse_der_certificate(one, field="--root")
            for one in split_certificates(data, field="--root")
        )
    except Malformed as error:  # a trusted root is no evidence
        raise VerificationIncomplete(error.message) from None
    return appraise_nvidia.Roots(given, pinned.rim, pinned=False)


def _sev_snp(arguments: argparse.Namespace, at: datetime.datetime) -> Outcome:
    return of_result(
        appraise_cpu.appraise_sev_snp_files(
            read_file(arguments.report, option="--report"),
            read_file(arguments.vek, option="--vek"),
            [read_file(one, option="--ca") for one in arguments.ca],
            _given_report_data(arguments),
            anchors=load_anchors(),
            at=at,
        )
    )


def _tdx(arguments: argparse.Namespace, at: datetime.datetime) -> Outcome:
    return of_result(
        appraise_cpu.appraise_tdx_files(
            read_file(arguments.quote, option="--quote"),
            read_file(arguments.collateral, option="--collateral"),
            _given_report_data(arguments),
            anchors=load_anchors(),
            at=at,
        )
    )


def _azure_vtpm(arguments: argparse.Namespace, at: datetime.datetime) -> Outcome:
    nonce = None
    if arguments.nonce is not None:
        lengths = appraise_cpu.QUALIFYING_DATA_BYTES
        nonce = parse_hex(arguments.nonce, option="--nonce", lengths=lengths)
    given = arguments.collateral
    return of_result(
        appraise_cpu.appraise_azure_file(
            read_file(arguments.evidence, option="--evidence"),
            None if given is None else read_file(given, option="--collateral"),
            nonce,
            anchors=load_anchors(),
            at=at,
        )
    )


def _tpm(arguments: argparse.Namespace, at: datetime.datetime) -> Outcome:
    del at  # nothing of a bare key expires
    reference = None if arguments.reference is None else _reference(arguments.reference)
    files = {
        name: read_file(getattr(arguments, name), option=f"--{name.replace('_', '-')}")
        for name in ("quote", "signature", "ak", "pcrs", "event_log")
        if getattr(arguments, name) is not None
    }
    return of_result(appraise_cpu.appraise_tpm_files(files, reference))


def _reference(path: Path) -> ReferenceValues:
    """The caller's own file: one that does not parse says nothing about the evidence."""
    try:
        return parse_reference_values(read_file(path, option="--reference"))
    except Malformed as error:
        raise VerificationIncomplete(f"--reference: {error.message}") from None


def _given_report_data(arguments: argparse.Namespace) -> bytes | None:
    if arguments.report_data is None:
        return None
    lengths = appraise_cpu.REPORT_DATA_BYTES
    return parse_hex(arguments.report_data, option="--report-data", lengths=lengths)


def _at(text: str | None) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) if text is None else parse_time(text, option="--at")


def _add(
    schemes: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, run: Scheme
) -> argparse.ArgumentParser:
    one = schemes.add_parser(
        name, help=what, description=f"Appraise {what}, offline.", epilog=EXIT_STATUS
    )
    one.add_argument("--at", metavar="RFC3339", help="judge as of this time; default: now")
    one.add_argument("--json", action="store_true", help="the outcome as JSON")
    one.set_defaults(command=appraise_command, scheme=run)
    return one


def _file(
    parser: argparse.ArgumentParser, option: str, text: str, *, required: bool = False
) -> None:
    parser.add_argument(option, type=Path, metavar="FILE", required=required, help=text)


def _report_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report-data",
        metavar="HEX",
        help="that the evidence must be bound to: 64 bytes, or a digest of 32 or 48 and zeros",
    )

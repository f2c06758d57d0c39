"""An Azure confidential VM's evidence: the HCL report, a quote of its vTPM, the host's part.

NOT TRIED ON HARDWARE. Written from Microsoft's "Guest attestation for confidential VMs" and from
evidence that such machines made; tested with a software TPM in the vTPM's place and a local server
in the metadata service's.

    1. our data into NV index 0x01400002: the paravisor puts them into its next report's user-data
    2. the report from NV index 0x01400001; reading it makes the paravisor ask the hardware anew
    3. a quote by the key 0x81000003, over our data: this is what verifiers look at
    4. from the host's metadata service (plain HTTP over a link-local address): of SEV-SNP the
       chip's certificate, of TDX the TDREPORT's exchange for a quote

Nothing that the host answers is believed: verifiers check it against AMD's or Intel's root.
"""

from __future__ import annotations

from pathlib import Path

import httpx2
import trio

from appliance.attester.vtpm import EVENT_LOG, MAX_EXTRA_DATA_BYTES, Tpm, open_tpm, read_event_log
from appliance.config import Attestation
from appliance.errors import DeviceFault, Malformed, ProviderAbsent
from appliance.wire.azure_hcl import HclReport, parse_hcl_report
from appliance.wire.azure_json import decode_any_base64
from appliance.wire.canonical import JsonObject, parse_json_object
from appliance.wire.encoding import encode_base64
from appliance.wire.evidence import CpuEvidence
from appliance.wire.pem import join_pem, split_pem

HCL_REPORT_INDEX = 0x01400001
USER_DATA_INDEX = 0x01400002
USER_DATA_BYTES = 64
ATTESTATION_KEY = 0x81000003

CERTIFICATION = "/metadata/THIM/amd/certification"
TD_QUOTE = "/acc/tdquote"
MAX_ANSWER_BYTES = 1 << 20


async def collect_azure(
    settings: Attestation, report_data: bytes, *, event_log: Path = EVENT_LOG
) -> CpuEvidence:
    """Fresh evidence over these data.

    Args:
        settings: `tpm`, `imds_url`, and `endorsement_s` for each question to the host.
        report_data: at most 64 bytes. event_log: left out of the evidence where there is none.

    Raises:
        ProviderAbsent: no tools, no TPM, or not Azure's: no report or no key where they must be.
        DeviceFault: the TPM failed, its report does not parse, or the host gave no TD quote.

    The chip's certificate is an endorsement: when the host does not give it, it is left out, and
    whoever completes the evidence asks elsewhere. The deadline is the caller's.
    """
    assert len(report_data) <= MAX_EXTRA_DATA_BYTES
    with open_tpm(settings.tpm) as tpm:
        await _write_user_data(tpm, report_data.ljust(USER_DATA_BYTES, b"\0"))
        raw = await tpm.nv_read(HCL_REPORT_INDEX)
        parts = {"hcl_report": raw, **await tpm.quote(f"{ATTESTATION_KEY:#010x}", report_data)}
    if (log := await read_event_log(event_log)) is not None:
        parts["event_log"] = log
    try:
        report = parse_hcl_report(raw)
    except Malformed as error:
        raise DeviceFault(f"HCL report: {error.message}") from error
    endorsements: dict[str, bytes] = {}
    if report.kind == "tdx":
        parts["td_quote"] = await _td_quote(settings, report)
    else:
        endorsements = await _certification(settings)
    return CpuEvidence("azure_vtpm", parts, endorsements)


async def _write_user_data(tpm: Tpm, data: bytes) -> None:
    """Into its NV index, which the first caller after the VM's creation has to define."""
    tpm.path("user_data").write_bytes(data)
    index = f"{USER_DATA_INDEX:#010x}"
    write = ("tpm2_nvwrite", "-C", "o", "-i", str(tpm.path("user_data")), index)
    try:
        await tpm.run(*write)
    except ProviderAbsent:
        await tpm.run("tpm2_nvdefine", "-C", "o", "-s", str(USER_DATA_BYTES), index)
        await tpm.run(*write)


async def _certification(settings: Attestation) -> dict[str, bytes]:
    """`vek` and `authorities`: `{"vcekCert": PEM, "certificateChain": PEM, …}`; empty without."""
    try:
        answer = await _ask(settings, "GET", CERTIFICATION)
        first = split_pem(_text(answer, "vcekCert").encode(), field="vcekCert")
        rest = split_pem(_text(answer, "certificateChain").encode(), field="certificateChain")
    except (DeviceFault, Malformed):
        return {}
    return {"vek": first[0], "authorities": join_pem(rest)}


async def _td_quote(settings: Attestation, report: HclReport) -> bytes:
    """`{"report": base64url of the TDREPORT}` for `{"quote": base64url}`."""
    text = encode_base64(report.td_report).rstrip("=").replace("+", "-").replace("/", "_")
    try:
        answer = await _ask(settings, "POST", TD_QUOTE, {"report": text})
        return decode_any_base64(_text(answer, "quote"), field="quote")
    except Malformed as error:
        raise DeviceFault(f"TD quote: {error.message}") from error


async def _ask(
    settings: Attestation, method: str, path: str, body: JsonObject | None = None
) -> JsonObject:
    """One question to the host's metadata service, which wants the header against being asked by
    mistake.

    Raises:
        DeviceFault: no 200 answer in time and size. Malformed: not a JSON object.
    """
    url = settings.imds_url.rstrip("/") + path
    with trio.move_on_after(settings.endorsement_s):
        try:
            async with (
                httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
                client.stream(
                    method,
                    url,
                    json=body,
                    headers={"Metadata": "true", "accept-encoding": "identity"},
                ) as response,
            ):
                if response.status_code != 200:
                    raise DeviceFault(f"metadata service: {path}: HTTP {response.status_code}")
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > MAX_ANSWER_BYTES:
                        raise DeviceFault(f"metadata service: {path}: too long an answer")
                return parse_json_object(bytes(data), max_nesting=4)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            kind = type(error).__name__
            raise DeviceFault(f"metadata service: {path}: {kind}") from error
    raise DeviceFault(f"metadata service: {path}: no answer in {settings.endorsement_s:g} s")


def _text(answer: JsonObject, name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected text", field=name)
    return value

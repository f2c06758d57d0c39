"""One GPU's evidence before NVIDIA's own verifier, once, in a process that ends with the answer.

    parent ──stdin: one line of JSON, then silence── this process ──stdout: one JSON text── parent

It runs by path and isolated (`python -I`) on the interpreter of the SDK's own environment
(nv-attestation-sdk 2.7.3), imports the standard library and the SDK, and nothing of ours.

- It has no device: the parent collected the evidence. What the SDK would ask the driver (version
  of driver and VBIOS) is read from the report with the SDK's own parser; that the report agrees
  with the driver is therefore not part of this opinion.
- One GPU a process, because the SDK's verdict on several is not a conjunction: where the check of
  the second one raises, `cc_admin.attest` returns the verdict on the first. Besides, it keeps what
  it found in module lists and class attributes for the next one.
- Standard output is the parent's alone. What the SDK prints, some 35 lines with evidence and nonce
  in clear, goes to standard error; what it writes, two log files, into the working directory.
- The parent holds standard input open; its end of file means that the parent is gone.

Request: `nonce` hex, `mode` `local` or `remote`, `evidence` {`report_b64`, `cert_chain_b64` (PEM),
`arch` `HOPPER` or `BLACKWELL`}, `endpoints` {`rim_url`, `ocsp_url`, `nras_url`}, `service_key` or null.
Answer: `verdict`, `reason` (empty for a good verdict), `claims` {`overall`, `gpus`}, `token` as the
SDK returns it, `error` null or {`kind` `unavailable` or `failed`, `message`}. With an error there
is no verdict: `verdict` is null.

Tokens of the local mode are signed with the literal strings "secret" and "notasecret": they prove
nothing to anybody and must never be handed out as if they did.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any

ARCHITECTURES = {"HOPPER": 9, "BLACKWELL": 10}
"""As NVML counts them, which is how the SDK's GPU_ARCHITECTURE_MAP does."""

LOGGERS = ("gpu-verifier-info", "gpu-verifier-event", "sdk-logger")
"""Where the SDK leaves its exceptions: it catches every one and answers False."""

MAX_REASON = 300
RETRYABLE = (408, 429)


class Gpu:
    """A GPU as `cc_admin.attest` knows one, made of collected evidence (see NvmlHandler)."""

    def __init__(self, evidence: dict[str, str]) -> None:
        self._arch = ARCHITECTURES[evidence["arch"]]
        self._report = base64.b64decode(evidence["report_b64"])
        self._chain = read_chain(evidence)

    def get_gpu_architecture(self) -> int:
        """NVML's number."""
        return self._arch

    def get_uuid(self) -> str:
        """A name for log lines: the driver's is not in the evidence."""
        return "GPU-0"

    def get_driver_version(self) -> str:
        """As the report says: "595.71.05"."""
        version: bytes = self._opaque("OPAQUE_FIELD_ID_DRIVER_VERSION")
        return version.decode("ascii").removesuffix("\0")

    def get_vbios_version(self) -> str:
        """As the report says: "96.00.9f.00.04"."""
        version: str = import_module("verifier.utils").format_vbios_version(
            self._opaque("OPAQUE_FIELD_ID_VBIOS_VERSION")
        )
        return version

    def get_attestation_report(self) -> bytes:
        """The SPDM transcript."""
        return self._report

    def get_attestation_cert_chain(self) -> list[Any]:
        """PyOpenSSL certificates, leaf first. The SDK converts the list in place: a new one."""
        return list(self._chain)

    def _opaque(self, name: str) -> Any:
        settings = import_module("verifier.config").GPU_ARCHITECTURE_MAP[self._arch]
        report = import_module("verifier.attestation").AttestationReport(self._report, settings)
        return report.get_response_message().get_opaque_data().get_data(name)


def read_chain(evidence: dict[str, str]) -> list[Any]:
    """The device's certificates, its root replaced by the SDK's pinned one, as the SDK does it."""
    chains = import_module("verifier.nvml.gpu_cert_chains")
    handle = import_module("verifier.nvml.test_handle").TestHandle(
        base64.b64decode(evidence["cert_chain_b64"])
    )
    chain: list[Any] = chains.GpuCertificateChains(handle).GpuAttestationCertificateChain
    return chain


class Heard(logging.Handler):
    """Keeps the exceptions and the HTTP status that the SDK logs and then forgets."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.errors: list[BaseException] = []
        self.http_status: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Look at what was logged, not at its text."""
        values: list[Any] = [record.msg, *(record.args if isinstance(record.args, tuple) else ())]
        if record.exc_info:
            values.append(record.exc_info[1])
        self.errors += [value for value in values if isinstance(value, BaseException)]
        if str(record.msg).startswith("NRAS Response Code") and len(values) == 2:
            self.http_status = int(values[1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the SDK says about one GPU's evidence; never raises an `Exception`."""
    try:
        return _ask(request)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the parent is told and judges
        return _no_verdict("failed", _describe(error))


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    attestation = import_module("nv_attestation_sdk.attestation")
    heard = Heard()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(heard)
    # After a bad verdict the SDK asks the driver whether devtools are on, only to word a log line;
    # without a driver it waits 30 s for the answer.
    handler = import_module("verifier.cc_admin").NvmlHandler
    handler.is_cc_dev_mode = staticmethod(lambda: False)

    endpoints = request["endpoints"]
    local = request["mode"] == "local"
    environment = attestation.Environment.LOCAL if local else attestation.Environment.REMOTE
    sdk = attestation.Attestation("dcv")
    sdk.set_nonce(request["nonce"])
    sdk.set_claims_version("3.0")
    if request["service_key"] is not None:
        sdk.set_service_key(request["service_key"])
    sdk.add_verifier(
        attestation.Devices.GPU,
        environment,
        "" if local else endpoints["nras_url"],
        "",
        ocsp_url=endpoints["ocsp_url"],
        rim_url=endpoints["rim_url"],
    )
    evidence = request["evidence"]
    verdict = sdk.attest([Gpu(evidence) if local else _remote_evidence(evidence)]) is True
    token = json.loads(sdk.get_token())
    if not verdict and (excuse := _excuse(heard, local=local)) is not None:
        return _no_verdict(*excuse)
    claims = _read_claims(token)
    return {
        "verdict": verdict,
        "reason": "" if verdict else _reason(heard, claims),
        "claims": claims,
        "token": token,
        "error": None,
    }


def _remote_evidence(evidence: dict[str, str]) -> dict[str, str]:
    """One item of the list that `attest_gpu_remote.build_payload` takes."""
    chains = import_module("verifier.nvml.gpu_cert_chains").GpuCertificateChains
    return {
        "certificate": chains.extract_gpu_cert_chain_base64(read_chain(evidence)),
        "evidence": evidence["report_b64"],
        "arch": evidence["arch"],
    }


def _excuse(heard: Heard, *, local: bool) -> tuple[str, str] | None:
    """Why the SDK's False is no verdict on the evidence: who it asked did not answer, or not so
    that the answer can be believed."""
    for error in heard.errors:
        if _could_not_ask(error):
            return "unavailable", _describe(error)
    if (status := heard.http_status) is not None:
        kind = "unavailable" if status >= 500 or status in RETRYABLE else "failed"
        return kind, f"NVIDIA's service answered with status {status}"
    if heard.errors and not local:
        return "failed", f"no token of NVIDIA's service verified: {_describe(heard.errors[-1])}"
    return None


def _could_not_ask(error: BaseException) -> bool:
    """Whether a look-up went wrong, by the types and functions of SDK 2.7.3: it has no type of its
    own for OCSP, and wraps what goes wrong with a RIM in a RIMFetchError."""
    for one in _chain_of(error):
        places = {frame.f_code.co_name for frame, _ in traceback.walk_tb(one.__traceback__)}
        if (
            type(one).__name__ in {"RIMFetchError", "TimeoutError"}
            or "send_ocsp_request" in places
            # An OCSP answer such as `tryLater` has no certificates: cryptography's ValueError.
            or (isinstance(one, ValueError) and "ocsp_certificate_chain_validation" in places)
            or isinstance(one, OSError)  # `requests` errors are, and urllib's
        ):
            return True
    return False


def _chain_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _read_claims(token: Any) -> dict[str, Any]:
    """The claims in a token; their signatures count for nothing here (see the module)."""
    decode = import_module("jwt").decode
    options = {"verify_signature": False}
    bundle = next(iter(token[1].values()), None)
    if not isinstance(bundle, list):
        return {}  # what the SDK issues after an error: no claims
    overall, gpus = bundle
    return {
        "overall": decode(overall[1], options=options),
        "gpus": {name: decode(one, options=options) for name, one in gpus.items()},
    }


def _reason(heard: Heard, claims: dict[str, Any]) -> str:
    """The last exception is the one that ended the verification; without one a claim says why."""
    if heard.errors:
        return _describe(heard.errors[-1])
    good = (True, "success")
    checks = {
        name: value
        for gpu in claims.get("gpus", {}).values()
        for name, value in gpu.items()
        if isinstance(value, bool) or name == "measres"
    }
    return ", ".join(sorted(name for name, value in checks.items() if value not in good))


def _describe(error: BaseException) -> str:
    """One bounded line, with what is behind it. The SDK's messages hold ids and reasons, not
    evidence; a file's path is left out."""
    texts = [
        f"{type(one).__name__}: {one.strerror if getattr(one, 'filename', None) else one}"
        if isinstance(one, OSError)
        else f"{type(one).__name__}: {one}"
        for one in _chain_of(error)
    ]
    return " ".join("; from ".join(texts).split())[:MAX_REASON]


def _no_verdict(kind: str, message: str) -> dict[str, Any]:
    error = {"kind": kind, "message": message}
    return {"verdict": None, "reason": "", "claims": {}, "token": None, "error": error}


def main() -> int:
    """Answer the one request on standard input."""
    # 1. The answer's way out, kept from whatever prints.
    out = os.dup(1)
    os.dup2(2, 1)
    # 2. The request; then an end of file means that nobody waits for the answer.
    line = _read_line()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # 3. The question.
    text = json.dumps(answer(json.loads(line)))
    with os.fdopen(out, "w", encoding="utf-8") as file:
        file.write(text)
    return 0


def _read_line() -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            raise EOFError
        data += more
    return data


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)  # at once, whatever the SDK waits for


if __name__ == "__main__":
    sys.exit(main())

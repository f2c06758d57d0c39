"""NVIDIA's own verifier as an independent second opinion on GPU evidence.

    second_opinion ─┬─ one child per GPU, one after the other (nvidia_sdk_child.py)
                    └─ private folder, environment from scratch, one deadline over all

The SDK (nv-attestation-sdk 2.7.3) cannot share a process with us: it pins old libraries, keeps its
state in a singleton, logs evidence in clear and blocks. So it runs in its own environment, in a
child that answers once. Whatever the way out, the child is dead and its folder gone afterwards.
Its support ended on 2026-09-15; it cannot read the reports of drivers from CUDA 13.5 on.

What the opinion is worth. It is a second implementation, by the vendor, of the checks that
`rats.schemes.nvidia_gpu` makes: signature, chain, revocation, reference values. It says nothing
about what the GPU is bound to. Local tokens are signed with a literal string: they are recorded,
never handed out as proof. In remote mode NVIDIA's service (NRAS) gives the verdict, and the SDK
believes any key that the service's host publishes; that mode was tested against local servers,
not tried against NVIDIA's service.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trio
from cryptography import x509

from appliance.config import Attestation
from appliance.credentials import Secret
from appliance.endorsements import nvidia_sdk_child
from appliance.errors import EndorsementsUnavailable, Malformed, SecondOpinionFailed
from appliance.log import Log
from appliance.rats.result import AttestationResult, Tier
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.encoding import encode_base64
from appliance.wire.evidence import GpuEvidence

CHILD = Path(nvidia_sdk_child.__file__)

MAX_ANSWER_BYTES = 1 << 20
"""Of one child's answer; a real one has some 10 KiB."""

MAX_ANSWER_NESTING = 16

KILL_S = 5.0
"""From SIGKILL to the child being gone; it touches no device, so nothing holds it in the kernel."""

ARCHITECTURES = {"GH": "HOPPER", "GB": "BLACKWELL"}
"""By the first letters of the chip in the leaf's common name ("GH100 A01 GSP FMC LF")."""


@dataclass(frozen=True, slots=True, repr=False)
class SdkOpinion:
    """What NVIDIA's verifier says.

    Attributes:
        verdict: whether it accepts the evidence of every GPU.
        reason: of the first GPU that it does not accept, one line; empty when it accepts all.
        claims: per GPU, in order; its names, without any signature that we checked.
        tokens: per GPU, as the SDK returns them. Local ones prove nothing (see the module).
    """

    verdict: bool
    reason: str
    claims: tuple[JsonObject, ...] = ()
    tokens: tuple[JsonValue, ...] = ()

    def __repr__(self) -> str:
        return f"SdkOpinion(verdict={self.verdict}, {len(self.claims)} GPUs)"


async def consult(
    settings: Attestation,
    evidence: tuple[GpuEvidence, ...],
    nonce: bytes,
    ours: AttestationResult,
    *,
    log: Log,
    service_key: Secret | None = None,
) -> SdkOpinion | None:
    """Ask for the second opinion as far as `[attestation] nvidia_sdk` wants one, and compare.

    Args:
        evidence: one per GPU, collected for the 32 bytes of `nonce`.
        ours: our own result on the same GPUs.
        service_key: of NVIDIA's services; the child is told it on its standard input.

    Returns:
        The opinion; None when it is not asked for, or was asked for the record and not had.

    Raises:
        EndorsementsUnavailable, SecondOpinionFailed: with `require` only.
    """
    if settings.nvidia_sdk == "off":
        return None
    opinion = None
    try:
        opinion = await second_opinion(settings, evidence, nonce, log=log, service_key=service_key)
        agree(ours, opinion)
    except (EndorsementsUnavailable, SecondOpinionFailed) as error:
        if settings.nvidia_sdk == "require":
            raise
        log.warning("nvidia_sdk_opinion", agrees=False, code=error.code, why=error.message)
    else:
        log.info("nvidia_sdk_opinion", agrees=True, verdict=opinion.verdict)
    return opinion


def agree(ours: AttestationResult, theirs: SdkOpinion) -> None:
    """Compare two verdicts on the same evidence.

    Ours is good when it is affirming or a warning: what warns us (an answer about revocation that
    is missing) may not concern them. NONE means that there was no evidence, so it is not good.

    Raises:
        SecondOpinionFailed: they differ; the message holds both findings.
    """
    good = ours.verdict in {Tier.AFFIRMING, Tier.WARNING}
    if good is theirs.verdict:
        return
    findings = "; ".join(str(one) for one in ours.all_findings()) or "no finding"
    raise SecondOpinionFailed(
        f"ours is {ours.verdict.value} ({findings}), NVIDIA's verifier "
        f"{'accepts' if theirs.verdict else 'refuses'} ({theirs.reason or 'no finding'})"
    )


async def second_opinion(
    settings: Attestation,
    evidence: tuple[GpuEvidence, ...],
    nonce: bytes,
    *,
    log: Log,
    service_key: Secret | None = None,
) -> SdkOpinion:
    """Ask NVIDIA's verifier about every GPU.

    Args:
        settings: which interpreter, mode and endpoints; `nvidia_sdk_s` bounds the whole.
        evidence: one per GPU. nonce: the 32 bytes it was collected for.
        service_key: as for `consult`.

    Raises:
        EndorsementsUnavailable: it could not ask its endpoints. It does ask: there is no verdict
            of the SDK without its OCSP responder and its RIM service.
        SecondOpinionFailed: it cannot be started, crashed, hung or spoke nonsense, or knows no
            such GPU.
    """
    requests = [_request(settings, one, nonce, service_key) for one in evidence]
    if not requests:
        raise SecondOpinionFailed("expected evidence of a GPU, there is none")
    opinions: list[SdkOpinion] = []
    with trio.move_on_after(settings.nvidia_sdk_s) as deadline:
        # One after the other: at boot only, and the vendor's service is asked 11 times for each.
        opinions = [read_answer(await _ask(settings, one, log), nonce) for one in requests]
    if deadline.cancelled_caught:
        raise SecondOpinionFailed(
            f"NVIDIA's verifier came to no verdict within {settings.nvidia_sdk_s:g} s"
        )
    return SdkOpinion(
        verdict=all(one.verdict for one in opinions),
        reason=next((one.reason for one in opinions if not one.verdict), ""),
        claims=tuple(claims for one in opinions for claims in one.claims),
        tokens=tuple(token for one in opinions for token in one.tokens),
    )


def read_answer(data: bytes, nonce: bytes) -> SdkOpinion:
    """Read a child's answer about one GPU (nvidia_sdk_child.py says what is in it).

    Raises:
        EndorsementsUnavailable, SecondOpinionFailed: as the child says; the latter also when the
            answer is not one, or accepts evidence for another nonce.
    """
    try:
        found = parse_json_object(data, max_nesting=MAX_ANSWER_NESTING)
    except Malformed as error:
        raise _nonsense(error.message) from None
    match found:
        case {"error": {"kind": "unavailable", "message": str(message)}}:
            raise EndorsementsUnavailable(f"NVIDIA's verifier could not ask: {message}")
        case {"error": {"kind": "failed", "message": str(message)}}:
            raise SecondOpinionFailed(f"NVIDIA's verifier came to no verdict: {message}")
        case {
            "error": None,
            "verdict": bool(verdict),
            "reason": str(reason),
            "claims": dict(claims),
            "token": token,
        }:
            pass
        case _:
            raise _nonsense("not the form that its docstring gives")
    if verdict:
        _require_nonce(claims, nonce)
    return SdkOpinion(verdict, reason, (claims,), (token,))


def _require_nonce(claims: JsonObject, nonce: bytes) -> None:
    """A good verdict must be about this nonce and one GPU. The SDK does not compare the nonce in
    a token of NVIDIA's service with the one it sent."""
    overall, gpus = claims.get("overall"), claims.get("gpus")
    if not isinstance(overall, dict) or overall.get("eat_nonce") != nonce.hex():
        raise SecondOpinionFailed("NVIDIA's verifier answered about another nonce")
    if not isinstance(gpus, dict) or len(gpus) != 1:
        raise SecondOpinionFailed("NVIDIA's verifier answered about another number of GPUs")


def _request(
    settings: Attestation, evidence: GpuEvidence, nonce: bytes, service_key: Secret | None
) -> bytes:
    """One line for the child."""
    request: JsonObject = {
        "nonce": nonce.hex(),
        "mode": settings.nvidia_sdk_mode,
        "evidence": {
            "report_b64": encode_base64(evidence.report),
            "cert_chain_b64": encode_base64(evidence.certificate_chain),
            "arch": _architecture(evidence),
        },
        "endpoints": {
            "rim_url": settings.rim_url,
            "ocsp_url": settings.ocsp_url,
            "nras_url": settings.nras_url,
        },
        "service_key": None if service_key is None else service_key.reveal(),
    }
    return canonical_json(request) + b"\n"


def _architecture(evidence: GpuEvidence) -> str:
    """What the SDK wants to know before it looks at anything.

    From a certificate that nobody has verified yet: the SDK verifies it next, and what is wrong
    here fails there.
    """
    try:
        leaf = x509.load_pem_x509_certificates(evidence.certificate_chain)[0]
        names = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except ValueError:
        raise SecondOpinionFailed("expected the GPU's certificates as PEM") from None
    chip = str(names[0].value)[:2] if names else ""
    if chip not in ARCHITECTURES:
        raise SecondOpinionFailed("NVIDIA's verifier knows Hopper and Blackwell GPUs only")
    return ARCHITECTURES[chip]


async def _ask(settings: Attestation, request: bytes, log: Log) -> bytes:
    """Run one child and return what it answered, unread."""
    with _private_folder() as folder:
        process = await _start(settings, Path(folder))
        try:
            answer = await _talk(process, request, log)
        finally:
            await _end(process, log)
    if len(answer) > MAX_ANSWER_BYTES:
        raise _nonsense(f"more than {MAX_ANSWER_BYTES} bytes")
    if process.returncode != 0:
        raise SecondOpinionFailed(f"NVIDIA's verifier {_describe_exit(process.returncode)}")
    return answer


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """0700, for one child to write its logs into; removed on the way out of its block."""
    try:
        return tempfile.TemporaryDirectory(prefix="dcv-nvidia-sdk-", ignore_cleanup_errors=True)
    except OSError as error:
        raise SecondOpinionFailed(f"cannot make a temporary folder: {error.strerror}") from error


async def _start(settings: Attestation, folder: Path) -> trio.Process:
    command = [settings.nvidia_sdk_python, "-I", str(CHILD)]
    # From scratch: no proxy, key, netrc or certificate setting of ours reaches `requests` and
    # urllib. The child passes its endpoints on itself; these three are for any path in the SDK
    # that would fall back to its built-in hosts.
    environment = {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "NV_RIM_URL": settings.rim_url.rstrip("/") + "/",
        "NV_OCSP_URL": settings.ocsp_url.rstrip("/") + "/",
        "NV_NRAS_GPU_URL": settings.nras_url,
    }
    try:
        return await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,  # a process group of its own, killed as one
        )
    except OSError as error:
        raise SecondOpinionFailed(f"cannot start NVIDIA's verifier: {error.strerror}") from error


async def _talk(process: trio.Process, request: bytes, log: Log) -> bytes:
    """Ask, and read both outputs to their ends.

    Standard input stays open: the child takes its end for ours.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    answer = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_discard, process, log)
        nursery.start_soon(_send, process.stdin, request)
        await _collect(process.stdout, answer)
        if len(answer) <= MAX_ANSWER_BYTES:
            await _wait_exited(process)
        nursery.cancel_scope.cancel()  # a child that is gone says nothing more
    return bytes(answer)


async def _send(stream: trio.abc.SendStream, request: bytes) -> None:
    try:
        await stream.send_all(request)
    except trio.BrokenResourceError:
        return  # it is gone; its exit status says more


async def _collect(stream: trio.abc.ReceiveStream, answer: bytearray) -> None:
    """Take the answer to its end, or until it is over its bound."""
    while len(answer) <= MAX_ANSWER_BYTES:
        data = await stream.receive_some(1 << 16)
        if not data:
            return
        answer += data


async def _wait_exited(process: trio.Process) -> None:
    """Wait for its end without taking its status: until then its pid names its group and nothing
    else, so that `_end` can still kill what it may have left behind."""
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def _discard(process: trio.Process, log: Log) -> None:
    """Read what the SDK prints, which holds evidence and nonce, and keep its size alone."""
    assert process.stderr is not None
    size = 0
    try:
        async for data in process.stderr:
            size += len(data)
    finally:
        log.debug("nvidia_sdk_output", discarded_bytes=size)


async def _end(process: trio.Process, log: Log) -> None:
    """Make sure that nothing of the child is left. Shielded and bounded."""
    with trio.CancelScope(shield=True):
        os.killpg(process.pid, signal.SIGKILL)  # exists: its status was not taken yet
        with trio.move_on_after(KILL_S) as killing:
            await process.wait()
        if killing.cancelled_caught:
            log.error("nvidia_sdk_unkillable", after_s=KILL_S)
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            await stream.aclose()


def _describe_exit(status: int | None) -> str:
    if status is None:
        return f"was not gone {KILL_S:g} s after it was killed"
    return f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"


def _nonsense(what: str) -> SecondOpinionFailed:
    return SecondOpinionFailed(f"NVIDIA's verifier answered nonsense: {what}")


__all__ = ["SdkOpinion", "agree", "consult", "read_answer", "second_opinion"]

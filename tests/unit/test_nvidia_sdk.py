"""What is made of the answers of NVIDIA's verifier, and of processes that are not it."""

from __future__ import annotations

import contextlib
import datetime
import json
import tempfile
import types
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import Attestation
from appliance.endorsements import nvidia_sdk_child as child
from appliance.endorsements.nvidia_sdk import (
    MAX_ANSWER_BYTES,
    SdkOpinion,
    agree,
    consult,
    read_answer,
    second_opinion,
)
from appliance.errors import EndorsementsUnavailable, SecondOpinionFailed
from appliance.log import Log
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.wire.evidence import GpuEvidence

NONCE = bytes(range(32))
LOG: Log = structlog.get_logger()

AFFIRMED = AttestationResult(Tier.AFFIRMING, {})
REFUSED = conclude(
    {}, [Finding(Tier.CONTRAINDICATED, "nvidia_gpu.debug", "off", "on", "Turn debugging off.")]
)
WARNED = conclude({}, [Finding(Tier.WARNING, "nvidia_gpu.ocsp", "good", "nothing", "Ask again.")])

ACCEPTS: dict[str, Any] = {
    "error": None,
    "verdict": True,
    "reason": "",
    "claims": {"overall": {"eat_nonce": NONCE.hex()}, "gpus": {"GPU-0": {"measres": "success"}}},
    "token": [["JWT", "a.b.c"], {}],
}
REFUSES = ACCEPTS | {"verdict": False, "reason": "NonceMismatchError: not matching", "claims": {}}


def encode(answer: object) -> bytes:
    return json.dumps(answer).encode()


# ---- comparing ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "verdict"), [(AFFIRMED, True), (WARNED, True), (REFUSED, False)])
def test_equal_verdicts_agree(ours: AttestationResult, verdict: bool) -> None:
    agree(ours, SdkOpinion(verdict, ""))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (AFFIRMED, False),
        (WARNED, False),
        (REFUSED, True),
        (AttestationResult(Tier.NONE, {}), True),
    ],
)
def test_different_verdicts_do_not_agree(ours: AttestationResult, verdict: bool) -> None:
    with pytest.raises(SecondOpinionFailed):
        agree(ours, SdkOpinion(verdict, ""))


def test_a_difference_names_both_findings() -> None:
    with pytest.raises(SecondOpinionFailed, match=r"nvidia_gpu\.debug: expected off, got on"):
        agree(REFUSED, SdkOpinion(verdict=True, reason=""))
    with pytest.raises(SecondOpinionFailed, match=r"affirming \(no finding\).*refuses \(Nonce"):
        agree(AFFIRMED, SdkOpinion(verdict=False, reason="NonceMismatchError: not matching"))


# ---- reading an answer ----------------------------------------------------------------------


def test_an_answer_becomes_an_opinion() -> None:
    accepts, refuses = read_answer(encode(ACCEPTS), NONCE), read_answer(encode(REFUSES), NONCE)
    assert (accepts.verdict, accepts.reason) == (True, "")
    assert accepts.claims == (ACCEPTS["claims"],)
    assert accepts.tokens == (ACCEPTS["token"],)
    assert (refuses.verdict, refuses.reason) == (False, "NonceMismatchError: not matching")


def test_an_answer_without_verdict_is_the_error_that_it_names() -> None:
    def no_verdict(kind: str) -> bytes:
        return encode(
            {"verdict": None, "claims": {}, "error": {"kind": kind, "message": "OCSP request"}}
        )

    with pytest.raises(EndorsementsUnavailable, match="could not ask: OCSP request"):
        read_answer(no_verdict("unavailable"), NONCE)
    with pytest.raises(SecondOpinionFailed, match="no verdict: OCSP request"):
        read_answer(no_verdict("failed"), NONCE)
    with pytest.raises(SecondOpinionFailed, match="nonsense"):
        read_answer(no_verdict("fine"), NONCE)


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"overall": {}, "gpus": {"GPU-0": {}}},
        {"overall": {"eat_nonce": bytes(32).hex()}, "gpus": {"GPU-0": {}}},
        {"overall": {"eat_nonce": NONCE.hex()}, "gpus": {}},
        {"overall": {"eat_nonce": NONCE.hex()}, "gpus": {"GPU-0": {}, "GPU-1": {}}},
        {"overall": [], "gpus": {"GPU-0": {}}},
    ],
)
def test_a_good_verdict_must_be_about_this_nonce_and_one_gpu(claims: object) -> None:
    with pytest.raises(SecondOpinionFailed, match="another"):
        read_answer(encode(ACCEPTS | {"claims": claims}), NONCE)


WRONG: dict[str, tuple[object, ...]] = {
    "error": (1, "true", [True], {}),
    "verdict": (1, "true", [True], None),
    "reason": (1, [True], None),
    "claims": (1, "true", [True], None),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_an_answer_of_another_form_is_never_an_opinion(key: str, value: object) -> None:
    with pytest.raises(SecondOpinionFailed, match="nonsense"):
        read_answer(encode(ACCEPTS | {key: value}), NONCE)


@pytest.mark.parametrize("key", sorted(ACCEPTS))
def test_an_answer_with_something_missing_is_never_an_opinion(key: str) -> None:
    with pytest.raises(SecondOpinionFailed, match="nonsense"):
        read_answer(encode({name: ACCEPTS[name] for name in ACCEPTS if name != key}), NONCE)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, len(encode(ACCEPTS))))
def test_bytes_in_an_answer_raise_nothing_unexpected(junk: bytes, position: int) -> None:
    whole = encode(ACCEPTS)
    for data in (junk, whole[:position] + junk + whole[position:], whole[:position]):
        with contextlib.suppress(SecondOpinionFailed, EndorsementsUnavailable):
            read_answer(data, NONCE)


# ---- processes that are not NVIDIA's verifier ------------------------------------------------


def certificate(common_name: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


HOPPER = GpuEvidence("nvidia_gpu", b"report", certificate("GH100 A01 GSP FMC LF"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def running(
    script: str,
    tmp_path: Path,
    *,
    nvidia_sdk: Literal["off", "record", "require"] = "require",
    seconds: float = 30.0,
) -> Attestation:
    """Settings whose interpreter is this shell script."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Attestation(
        cpu="tdx", nvidia_sdk=nvidia_sdk, nvidia_sdk_python=str(program), nvidia_sdk_s=seconds
    )


async def left_behind(scratch: Path) -> list[str]:
    """Processes whose HOME was there, and what is still there.

    A process that was killed and is nobody's child of ours may take a moment to be gone.
    """
    found = _left_behind(scratch)
    with trio.move_on_after(2):
        while found:
            await trio.sleep(0.01)
            found = _left_behind(scratch)
    return found


def _left_behind(scratch: Path) -> list[str]:
    found = [str(path) for path in scratch.iterdir()]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={scratch}/".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo certainly not JSON", "nonsense"),
        ("echo '{}'", "nonsense"),
        ("echo '[true]'", "nonsense"),
        ("true", "nonsense"),
        (f"echo '{json.dumps(ACCEPTS)}'; exit 3", "status 3"),
        (f"echo '{json.dumps(ACCEPTS)}'; kill -SEGV $$", "signal 11"),
        ("while :; do echo 0123456789012345678901234567890123456789; done", "more than"),
        ("exec sleep 600", "no verdict within"),
        ("exec >&-; exec sleep 600", "no verdict within"),
        ("sleep 600 & echo '{}'", "no verdict within"),  # its child keeps the output open
        ("sleep 600 >&- 2>&- & echo '{}'", "nonsense"),
        ("exec <&-; echo '{}'", "nonsense"),
    ],
)
async def test_a_process_that_is_not_the_verifier_gives_no_opinion_and_leaves_nothing(
    tmp_path: Path, scratch: Path, script: str, why: str
) -> None:
    seconds = 1.0 if "sleep 600" in script else 30.0
    with trio.fail_after(40), pytest.raises(SecondOpinionFailed, match=why):
        await second_opinion(running(script, tmp_path, seconds=seconds), (HOPPER,), NONCE, log=LOG)
    assert await left_behind(scratch) == []


async def test_a_flood_on_standard_error_is_read_and_dropped(tmp_path: Path, scratch: Path) -> None:
    script = f"head -c 5000000 /dev/zero >&2; echo '{json.dumps(ACCEPTS)}'"
    with structlog.testing.capture_logs() as lines:
        opinion = await second_opinion(running(script, tmp_path), (HOPPER,), NONCE, log=LOG)
    assert opinion.verdict
    assert len(repr(lines)) < 500
    assert await left_behind(scratch) == []


async def test_an_answer_at_the_bound_is_read(tmp_path: Path, scratch: Path) -> None:
    answer = encode(ACCEPTS)
    spaces = MAX_ANSWER_BYTES - len(answer)
    file = tmp_path / "answer"
    file.write_bytes(answer + b" " * spaces)
    opinion = await second_opinion(running(f"cat {file}", tmp_path), (HOPPER,), NONCE, log=LOG)
    assert opinion.verdict
    file.write_bytes(answer + b" " * (spaces + 1))
    with pytest.raises(SecondOpinionFailed, match="more than"):
        await second_opinion(running(f"cat {file}", tmp_path), (HOPPER,), NONCE, log=LOG)


async def test_the_environment_is_made_from_scratch(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "NVIDIA_ATTESTATION_SERVICE_KEY", "NV_ALLOW_HOLD_CERT"):
        monkeypatch.setenv(name, "true")
    seen = tmp_path / "seen"
    with pytest.raises(SecondOpinionFailed):
        await second_opinion(
            running(f"cat /proc/$$/environ >{seen}", tmp_path), (HOPPER,), NONCE, log=LOG
        )
    found = dict(item.split("=", 1) for item in seen.read_text().rstrip("\0").split("\0"))
    assert set(found) == {"HOME", "TMPDIR", "NV_RIM_URL", "NV_OCSP_URL", "NV_NRAS_GPU_URL"}
    assert found["HOME"].startswith(str(scratch))
    assert found["NV_RIM_URL"] == "https://rim.attestation.nvidia.com/v1/rim/"


async def test_without_a_folder_of_its_own_it_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(SecondOpinionFailed, match="temporary folder"):
        await second_opinion(
            running(f"touch {tmp_path}/started", tmp_path), (HOPPER,), NONCE, log=LOG
        )
    assert not (tmp_path / "started").exists()


async def test_every_gpu_is_asked_about_and_one_refusal_is_the_verdict(
    tmp_path: Path, scratch: Path
) -> None:
    script = (
        f"read line; case \"$line\" in *HOPPER*) echo '{json.dumps(ACCEPTS)}';; "
        f"*) echo '{json.dumps(REFUSES)}';; esac"
    )
    blackwell = GpuEvidence("nvidia_gpu", b"report", certificate("GB100 A01 GSP FMC LF"))
    settings = running(script, tmp_path)
    opinion = await second_opinion(settings, (HOPPER, blackwell, HOPPER), NONCE, log=LOG)
    assert not opinion.verdict
    assert opinion.reason == "NonceMismatchError: not matching"
    assert [bool(one) for one in opinion.claims] == [True, False, True]
    assert (await second_opinion(settings, (HOPPER, HOPPER), NONCE, log=LOG)).verdict


@pytest.mark.parametrize("chain", [b"", b"no PEM", certificate("LS_10 A01 FSP FMC LF")])
async def test_a_chip_that_the_verifier_does_not_know_gives_no_opinion(
    tmp_path: Path, chain: bytes
) -> None:
    with pytest.raises(SecondOpinionFailed):
        await second_opinion(
            running("exit 9", tmp_path), (GpuEvidence("nvidia_gpu", b"", chain),), NONCE, log=LOG
        )


async def test_no_evidence_is_not_accepted(tmp_path: Path) -> None:
    with pytest.raises(SecondOpinionFailed, match="there is none"):
        await second_opinion(running("exit 9", tmp_path), (), NONCE, log=LOG)


# ---- off, record, require --------------------------------------------------------------------


async def test_off_asks_nothing(tmp_path: Path, scratch: Path) -> None:
    settings = running(f"touch {tmp_path}/asked", tmp_path, nvidia_sdk="off")
    assert await consult(settings, (HOPPER,), NONCE, AFFIRMED, log=LOG) is None
    assert not (tmp_path / "asked").exists()


async def test_record_goes_on_without_agreement_and_says_so(tmp_path: Path, scratch: Path) -> None:
    settings = running(f"echo '{json.dumps(REFUSES)}'", tmp_path, nvidia_sdk="record")
    with structlog.testing.capture_logs() as lines:
        opinion = await consult(settings, (HOPPER,), NONCE, AFFIRMED, log=LOG)
    assert opinion is not None
    assert not opinion.verdict
    [line] = [one for one in lines if one["event"] == "nvidia_sdk_opinion"]
    assert line["log_level"] == "warning"
    assert line["code"] == "second_opinion_failed"


async def test_record_goes_on_without_an_opinion(tmp_path: Path, scratch: Path) -> None:
    settings = running("exit 9", tmp_path, nvidia_sdk="record")
    assert await consult(settings, (HOPPER,), NONCE, AFFIRMED, log=LOG) is None
    settings = msgspec.structs.replace(settings, nvidia_sdk_python=str(tmp_path / "absent"))
    assert await consult(settings, (HOPPER,), NONCE, AFFIRMED, log=LOG) is None


async def test_require_needs_an_opinion_and_agreement(tmp_path: Path, scratch: Path) -> None:
    accepting = running(f"echo '{json.dumps(ACCEPTS)}'", tmp_path)
    assert await consult(accepting, (HOPPER,), NONCE, AFFIRMED, log=LOG) is not None
    with pytest.raises(SecondOpinionFailed, match="ours is contraindicated"):
        await consult(accepting, (HOPPER,), NONCE, REFUSED, log=LOG)
    with pytest.raises(SecondOpinionFailed, match="cannot start"):
        await consult(
            msgspec.structs.replace(accepting, nvidia_sdk_python=str(tmp_path / "absent")),
            (HOPPER,),
            NONCE,
            AFFIRMED,
            log=LOG,
        )
    assert await left_behind(scratch) == []


# ---- what the child makes of the SDK's exceptions --------------------------------------------


def raised(place: str, error: Exception) -> Exception:
    """The error, as caught from a function of that name."""

    def thrower() -> None:
        raise error

    named = types.FunctionType(
        thrower.__code__.replace(co_name=place), globals(), place, None, thrower.__closure__
    )
    try:
        named()
    except Exception as caught:
        return caught
    raise AssertionError


class RIMFetchError(Exception):
    """Named as the SDK's."""


@pytest.mark.parametrize(
    ("error", "unavailable"),
    [
        (raised("send_ocsp_request", Exception("OCSP request failed")), True),
        (raised("ocsp_certificate_chain_validation", ValueError("not successful")), True),
        (raised("attest", RIMFetchError("Unable to fetch")), True),
        (raised("function_wrapper_with_timeout", TimeoutError("timed out")), True),
        (raised("request", ConnectionRefusedError(111, "Connection refused")), True),
        # A revoked certificate whose answer gives no reason trips the SDK: that is no outage.
        (raised("ocsp_certificate_chain_validation", AttributeError("name")), False),
        (raised("verify_attestation_report", ValueError("bad")), False),
    ],
)
def test_only_look_ups_that_went_wrong_excuse_a_bad_verdict(
    error: Exception, unavailable: bool
) -> None:
    wrapped = RuntimeError("GPU Attestation failed")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        heard = child.Heard()
        heard.errors.append(one)
        excuse = child._excuse(heard, local=True)
        assert (excuse is not None) is unavailable
        assert excuse is None or excuse[0] == "unavailable"


def test_a_description_is_one_bounded_line_without_paths() -> None:
    text = child._describe(FileNotFoundError(2, "No such file", "/somewhere/private"))
    assert text == "FileNotFoundError: No such file"
    assert child._describe(ValueError("two\nlines")) == "ValueError: two lines"
    assert len(child._describe(ValueError("x" * 10_000))) == child.MAX_REASON

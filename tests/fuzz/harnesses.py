"""One harness for each parser: what it is given, what may come out of it, what it starts from.

Of a parser in `wire` only `Malformed` may come out, of a scheme in `rats` that or a leaf of the
`EvidenceError` tree. Anything else is a finding, and so is evidence that is affirmed although it
does not say what the genuine evidence says. There are two kinds of harness for schemes: `…_scheme`
brings a changed part under the old signature, `…_signed` signs what was changed, so that what
stands behind the signature is reached.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.config import Policy
from appliance.errors import EndorsementsUnavailable, EvidenceError, Malformed, RequestError
from appliance.rats import chain, revocation
from appliance.rats.model import Anchors
from appliance.rats.policy.nvidia_gpu import appraise_gpu
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.presented import parse_presented
from appliance.rats.reference import parse_reference_values
from appliance.rats.result import Tier
from appliance.rats.schemes import azure_vtpm, nvidia_gpu, sev_snp, tpm2
from appliance.wire import nvidia_gpu as nvidia_wire
from appliance.wire import openai as openai_wire
from appliance.wire import sev_snp as sev_snp_wire
from appliance.wire import tpm as tpm_wire
from appliance.wire.azure_hcl import parse_hcl_report
from appliance.wire.azure_json import decode_any_base64, parse_azure_json
from appliance.wire.canonical import JsonObject, canonical_json, parse_json, parse_json_object
from appliance.wire.certificate_table import parse_certificate_table
from appliance.wire.checkpoint import (
    Core,
    checkpoint_chunk,
    checkpoint_comment,
    find_checkpoints,
    parse_checkpoint,
    read_checkpoint,
    sign_checkpoint,
    verify_checkpoint,
)
from appliance.wire.commitments import Inclusion, parse_inclusion
from appliance.wire.encoding import decode_base64, decode_hex, encode_base64
from appliance.wire.epoch import EpochEvidence, parse_epoch
from appliance.wire.event_log import parse_event_log, replay
from appliance.wire.evidence import CpuEvidence, GpuEvidence, parse_cpu_evidence, parse_gpu_evidence
from appliance.wire.http1 import ResponseReader
from appliance.wire.identity import PublicKey, parse_keyset
from appliance.wire.output import (
    decode_embeddings,
    encode_answer,
    output_of_answer,
    output_of_stream,
)
from appliance.wire.pem import split_pem
from appliance.wire.receipt import (
    Ended,
    EngineUsed,
    EventLog,
    GpuAttested,
    OutputComplete,
    RequestCommitted,
    RequestForwarded,
    RequestReceived,
    ResponseReturned,
    Rewrite,
    parse_receipt,
    read_events,
    receipt_document,
    sign_receipt,
    verify_signature,
)
from appliance.wire.report import parse_report
from appliance.wire.rim import parse_rim
from appliance.wire.sealed import SealedSecret, parse_sealed
from appliance.wire.spdm import parse_transcript
from appliance.wire.sse import PING_LINE, BlockReader, encode_event
from appliance.wire.tdx import TD_REPORT_BYTES, parse_quote, parse_td_report
from tests.bench.simulated_report import simulated_report
from tests.fakes import amd_evidence as amd
from tests.fakes import nvidia_evidence as nvidia
from tests.vectors.case import Case, anchors_of, appraise, cpu_evidence, gpu_evidence, load

Seeds = Callable[[], Sequence[bytes]]
AT = amd.NOW
GENEROUS = Policy(gpu_architectures=("GH100", "GB100"))
MAX_NESTING = 16


@dataclass(frozen=True)
class Harness:
    """One of them.

    Attributes:
        run: returns, or fails: nothing else is expected of it.
        accept: what it runs; raises where the input is refused.
        seeds: inputs to start from; the first is accepted.
    """

    name: str
    run: Callable[[bytes], None]
    accept: Callable[[bytes], None]
    seeds: Seeds


HARNESSES: dict[str, Harness] = {}


def harness(
    seeds: Seeds, *errors: type[Exception]
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a function; these errors may come out of it."""
    expected = errors or (Malformed,)

    def register(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            offset: int | None = None
            try:
                function(data)
            except expected as error:
                offset = error.offset if isinstance(error, Malformed) else None
            # A scheme's harness may hand more to the parser than it was given: a signature.
            if expected == (Malformed,):
                assert offset is None or 0 <= offset <= len(data), "an offset outside of the input"

        HARNESSES[function.__name__] = Harness(function.__name__, run, function, seeds)
        return function

    return register


@cache
def case(name: str) -> Case:
    return load(name)


def part(name: str, *cases: str) -> Seeds:
    """The parts of this name in these vectors."""
    return lambda: [one for each in cases for one in case(each).all(name)]


def texts(*values: object) -> Seeds:
    """Documents; what is not text is written as JSON."""
    return lambda: [(one if isinstance(one, str) else json.dumps(one)).encode() for one in values]


def json_of(data: bytes) -> Any:
    return parse_json(data, max_nesting=MAX_NESTING)


NVIDIA = ("nvidia_gpu_good", "nvidia_gpu_good_blackwell", "nvidia_gpu_duplicate_index")
SNP = ("sev_snp_good", "sev_snp_good_turin_v5", "sev_snp_good_genoa_v2", "sev_snp_debug")
TDX = ("tdx_good", "tdx_good_v5_td10", "tdx_good_v5_td15")

# --- wire: binary formats -------------------------------------------------------------------------


@harness(part("report", *NVIDIA))
def spdm(data: bytes) -> None:
    transcript = parse_transcript(data)
    assert len(transcript.signed) + len(transcript.signature) == len(data)


@harness(part("report", *NVIDIA))
def nvidia_gpu_report(data: bytes) -> None:
    report = nvidia_wire.parse_report(data)
    assert all(0 <= index < 256 for index in report.measurements())


@harness(part("report", *NVIDIA))
def nvidia_gpu_identity(data: bytes) -> None:
    """What is read once the report is authentic."""
    report = nvidia_wire.parse_report(data)
    identity = nvidia_wire.gpu_identity(report)
    nvidia_wire.driver_rim_id("GH100", identity)
    nvidia_wire.vbios_rim_id(identity)


def _switch_report() -> bytes:
    fields = nvidia.gpu_fields(
        vbios_version=b"96.10.55.00.01\0",
        driver_version=None,
        switch_pdi=bytes(range(8)),
    )
    return nvidia.encode_report(nvidia.Report(opaque=nvidia.encode_fields(fields))) + bytes(96)


@harness(lambda: [_switch_report()])
def nvidia_switch_identity(data: bytes) -> None:
    """The same of a switch."""
    identity = nvidia_wire.switch_identity(nvidia_wire.parse_report(data))
    nvidia_wire.switch_rim_id(identity)


@harness(lambda: [nvidia.composite_device_id(), nvidia.dice_tcb_info(nvidia.FWID, bytes(48))])
def dice_fwid(data: bytes) -> None:
    nvidia_wire.parse_dice_fwid(data)


@harness(part("report", *SNP))
def sev_snp_report(data: bytes) -> None:
    assert sev_snp_wire.parse_report(data).signed == data[:0x2A0]


@harness(part("quote", *TDX))
def tdx_quote(data: bytes) -> None:
    assert data.startswith(parse_quote(data).raw)


@harness(
    lambda: [one[32 : 32 + TD_REPORT_BYTES] for one in part("hcl_report", "azure_vtpm_good_tdx")()]
)
def td_report(data: bytes) -> None:
    assert parse_td_report(data).report_data == data[128:192]


@harness(part("quote", "tpm2_good", "azure_vtpm_good"))
def tpm_quote(data: bytes) -> None:
    tpm_wire.parse_quote(data)


@harness(part("signature", "tpm2_good"))
def tpm_signature(data: bytes) -> None:
    tpm_wire.parse_signature(data)


def _sealed_lines() -> list[bytes]:
    one = SealedSecret("nvidia", bytes(78), bytes(250), bytes(70))
    return [one.to_line(), one.to_line() + SealedSecret("intel", b"a", b"b", b"c").to_line()]


@harness(_sealed_lines)
def sealed_secrets(data: bytes) -> None:
    lines = b"".join(one.to_line() for one in parse_sealed(data))
    assert parse_sealed(lines) == parse_sealed(data)


def _public_areas() -> list[bytes]:
    """TPMT_PUBLIC of restricted signing keys: RSA with SHA-256, ECC on P-256."""
    head = bytes.fromhex("000b0005007200000010")
    modulus = amd.rsa_key("fuzz AK").public_key().public_numbers().n.to_bytes(256)
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    x, y = point.x.to_bytes(32), point.y.to_bytes(32)
    return [
        b"\x00\x01" + head + bytes.fromhex("0014000b0800000000000100") + modulus,
        b"\x00\x23" + head + bytes.fromhex("0018000b000300100020") + x + b"\0\x20" + y,
    ]


@harness(_public_areas, Malformed, EvidenceError)
def tpm_public(data: bytes) -> None:
    tpm2.attestation_key(tpm_wire.parse_public(data))


@harness(
    lambda: [
        part("pcrs", "azure_vtpm_good")()[0],
        b"sha256:\n  0 : 0x" + b"00" * 32 + b"\n  11: 0x" + b"0F" * 32 + b"\n",
        json.dumps({"sha256": {"0": "00" * 32}}).encode(),
    ]
)
def tpm_pcrs(data: bytes) -> None:
    tpm_wire.parse_pcrs(data)


@harness(part("event_log", "tpm2_good", "tpm2_pcr12"))
def event_log(data: bytes) -> None:
    replay(parse_event_log(data))


@harness(part("hcl_report", "azure_vtpm_good", "azure_vtpm_good_tdx"))
def azure_hcl(data: bytes) -> None:
    parse_hcl_report(data)


def _tables() -> list[bytes]:
    """A table with a VCEK and the end of one."""
    guid = bytes.fromhex("63da758de6644564adc5f4b93be8accd")
    entry = guid + (48).to_bytes(4, "little") + (4).to_bytes(4, "little")
    return [entry + bytes(24) + b"vcek", bytes(24), b""]


@harness(_tables)
def certificate_table(data: bytes) -> None:
    parse_certificate_table(data)


# --- wire: texts ----------------------------------------------------------------------------------


@harness(part("rim", "nvidia_gpu_good", "nvidia_gpu_rim_wrapped_in_object"))
def rim(data: bytes) -> None:
    parse_rim(data)


@harness(texts({"a": [1, -0.5, "é", None]}, "[]", '{"a":1,"a":2}'))
def canonical(data: bytes) -> None:
    """What parses has one canonical form, which means the same."""
    value = parse_json(data, max_nesting=MAX_NESTING)
    assert parse_json(canonical_json(value), max_nesting=MAX_NESTING) == value


@harness(texts("AAECAw==", "00ff", "sha256:00"))
def encoding(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    decoders: tuple[Callable[[], bytes], ...] = (
        lambda: decode_base64(text, field="x", max_bytes=64),
        lambda: decode_hex(text, field="x", length=2),
        lambda: decode_any_base64(text, field="x"),
    )
    for decode in decoders:
        try:
            decode()
        except Malformed:
            continue


@harness(
    lambda: [
        canonical_json(gpu_evidence(case("nvidia_gpu_good_no_fwid")).to_json()),
        *(
            canonical_json(cpu_evidence(case(name)).to_json())
            for name in ("sev_snp_good", "tdx_good", "tpm2_good", "azure_vtpm_good")
        ),
    ]
)
def evidence(data: bytes) -> None:
    document = json_of(data)
    for parse in (parse_gpu_evidence, parse_cpu_evidence):
        try:
            read: GpuEvidence | CpuEvidence = parse(document, where="$")
        except Malformed:
            continue
        again: GpuEvidence | CpuEvidence = parse(read.to_json(), where="$")
        assert again == read


def _azure_files() -> list[bytes]:
    """The shapes of version 1 (numbers) and 2 (base64 and hex)."""
    good = case("azure_vtpm_good")
    message, signature = good.one("quote"), good.one("signature")
    pcrs = [good.one("pcrs")[start : start + 32] for start in range(0, 24 * 32, 32)]
    numbers = {
        "tpm_quote": {
            "message": [*message],
            "signature": [*signature],
            "pcrs": [[*one] for one in pcrs],
        },
        "hcl_report": [*good.one("hcl_report")],
        "vcek": encode_base64(good.one("vek")),
    }
    words = {
        "version": 2,
        "tpm_quote": {
            "message": message.hex(),
            "signature": signature.hex(),
            "pcrs": [one.hex() for one in pcrs],
        },
        "hcl_report": encode_base64(good.one("hcl_report")),
        "vcek": encode_base64(good.one("vek")),
    }
    return [json.dumps(one).encode() for one in (words, numbers)]


@harness(_azure_files)
def azure_json(data: bytes) -> None:
    parse_azure_json(data)


@harness(part("chain", "nvidia_gpu_good"))
def pem(data: bytes) -> None:
    split_pem(data, field="x")


INCLUSION = {
    "kind": "report",
    "keyset_digest": "sha256:" + "00" * 32,
    "tree_size": 2,
    "leaf_index": 1,
    "path": ["11" * 32],
    "root": "22" * 32,
}


@harness(texts(INCLUSION, INCLUSION | {"path": None, "leaf_index": None}))
def inclusion(data: bytes) -> None:
    _ = parse_inclusion(json_of(data), where="$").nonce


def _report(*path: str) -> bytes:
    """A whole report, or a member of it."""
    document = json.loads(simulated_report())
    for name in path:
        document = document[name]
    return json.dumps(document).encode()


@harness(lambda: [_report("attestation", "workload_keyset")])
def keyset(data: bytes) -> None:
    parse_keyset(json_of(data), where="$")


@harness(lambda: [_report()])
def report(data: bytes) -> None:
    parse_report(data)


@harness(
    texts(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": 1, "n": 2},
        {"model": "m", "prompt": ["a", "b"], "stream": True, "stream_options": {}},
        {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 4},
        {"model": "m", "input": [[1, 2], [3]], "tee": True, "user": None},
    ),
    Malformed,
    RequestError,
)
def openai(data: bytes) -> None:
    body = openai_wire.parse_body(data, max_nesting=MAX_NESTING)
    kind = openai_wire.Endpoint.CHAT if "messages" in body else openai_wire.Endpoint.COMPLETION
    if "input" in body:
        kind = openai_wire.Endpoint.EMBEDDINGS
    request = openai_wire.parse_request(kind, body)
    for plan in openai_wire.plan_choices(
        request, response_id="r", seed=1, cache_salt="s", max_choices=4
    ):
        parse_json(openai_wire.forwarded_body(body, plan), max_nesting=MAX_NESTING + 1)


@harness(texts('data: {"a":1}\n\ndata: [DONE]\n\n', ": x\r\n\r\n", "data: a\ndata: b\n\n"))
def sse(data: bytes) -> None:
    reader = BlockReader(max_event_bytes=256)
    for start in range(0, len(data), 7):
        reader.feed(data[start : start + 7])


@harness(
    texts(
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    )
)
def http1(data: bytes) -> None:
    reader = ResponseReader()
    for start in range(0, len(data), 11):
        reader.feed(data[start : start + 11])
        reader.take()


CHUNK = {
    "id": "x",
    "choices": [
        {"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}
    ],
}
ANSWER = {
    "id": "x",
    "choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}],
    "usage": {"total_tokens": 3},
}


@harness(texts(ANSWER))
def output_answer(data: bytes) -> None:
    output_of_answer(parse_json_object(data, max_nesting=MAX_NESTING), max_bytes=4096)


EMBEDDED = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}],
    "usage": {"total_tokens": 3},
}


@harness(
    texts(EMBEDDED, {**EMBEDDED, "data": [{"index": 0, "embedding": "AACAPwAAIMA="}]}), Malformed
)
def embeddings(data: bytes) -> None:
    if parse_json_object(data, max_nesting=MAX_NESTING).get("object") == "list":
        told = decode_embeddings(data)
        again = decode_embeddings(encode_answer(told.answer(model="m")))
        assert told.digest == again.digest


@harness(texts(f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"))
def output_stream(data: bytes) -> None:
    output_of_stream(data, max_bytes=4096)


RECEIPT_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def _receipts() -> list[bytes]:
    """A whole one, and one of a request that was refused."""
    one, place = bytes(32), Inclusion("request", bytes(32), 2, 1, (bytes(32),), bytes(32))
    refused = EventLog(
        received=RequestReceived(one),
        committed=RequestCommitted(one, one, one),
        admission=None,
        forwarded=None,
        engine=None,
        output=None,
        completion=None,
        ended=Ended("refused", "model_not_found", 7),
        returned=ResponseReturned(one),
    )
    whole = replace(
        refused,
        admission=GpuAttested("admission", one, place, "affirming", 1_750_000_000),
        forwarded=RequestForwarded(one),
        engine=EngineUsed(one, 5, deterministic=True, rewrite=(Rewrite({"seed": 5}, ("user",)),)),
        output=OutputComplete(one, ("stop", None), {"total_tokens": 3}),
        completion=GpuAttested(
            "completion", one, replace(place, kind="completion"), "warning", 1_750_000_001, one
        ),
        ended=Ended("complete", None, 7),
    )
    documents = [
        receipt_document(
            receipt_id="rcpt-" + "0" * 32,
            chat_id="chatcmpl-1",
            model="m",
            keyset_digest=one,
            endpoint="/v1/chat/completions",
            method="POST",
            served_at=1_750_000_000,
            events=events,
        )
        for events in (whole, refused)
    ]
    return [sign_receipt(one, key_id="k", sign=RECEIPT_KEY.sign) for one in documents]


@harness(_receipts)
def receipt(data: bytes) -> None:
    """What can be read is written as it was read."""
    read = parse_receipt(data)
    assert read_events(read).to_json() == read.document["event_log"]


@harness(_receipts, Malformed, EvidenceError)
def receipt_signature(data: bytes) -> None:
    """Nothing else than what was signed has the signature."""
    key = PublicKey("k", RECEIPT_KEY.public_key().public_bytes_raw())
    document = parse_receipt(data).document
    verify_signature(document, key)
    assert canonical_json(document) in _signed_receipts()


@cache
def _signed_receipts() -> list[bytes]:
    return _receipts()


def _epochs() -> list[bytes]:
    gpu = GpuEvidence("simulated", b"report", b"chain")
    return [
        canonical_json(
            EpochEvidence(bytes(32), bytes(32), 2, bytes(32), 1_750_000_000, gpus).to_json()
        )
        for gpus in ((gpu, replace(gpu, report=b"other")), ())
    ]


@harness(_epochs)
def epoch(data: bytes) -> None:
    """What can be read is written as it was read."""
    assert parse_epoch(canonical_json(parse_epoch(data).to_json())) == parse_epoch(data)


def _checkpoints() -> list[JsonObject]:
    """One on the way, one at the end of a stream, and one of a whole answer with `tee`."""
    one, place = bytes(32), Inclusion("request", bytes(32), 2, 1, (bytes(32),), bytes(32))
    whole = Core(
        seq=0,
        final=True,
        receipt_id="0" * 32,
        keyset_digest=one,
        request_body_hash=one,
        prefix_bytes=None,
        prefix_sha256=None,
        output_digest=one,
        gpu=GpuAttested("admission", one, place, "affirming", 1_750_000_000),
        key_id="k",
    )
    ended = replace(whole, seq=1, prefix_bytes=7, prefix_sha256=one)
    completion = GpuAttested(
        "completion", one, replace(place, kind="completion"), "warning", 1_750_000_001, one
    )
    return [
        sign_checkpoint(core, event, sign=RECEIPT_KEY.sign)
        for core, event in (
            (replace(ended, final=False, output_digest=None), None),
            (ended, None),
            (whole, completion),
        )
    ]


@cache
def _signed_checkpoints() -> list[JsonObject]:
    return _checkpoints()


@harness(lambda: [canonical_json(one) for one in _checkpoints()], Malformed, EvidenceError)
def checkpoint(data: bytes) -> None:
    """Nothing else than what was signed has the signature, in any form; what can be read is
    written as it was read."""
    read = parse_checkpoint(data)
    assert canonical_json(read.core.to_json()) == read.raw
    assert read_checkpoint(read.document, where="$") == read
    verify_checkpoint(read, PublicKey("k", RECEIPT_KEY.public_key().public_bytes_raw()))
    assert read.document in _signed_checkpoints()


def _streams() -> list[bytes]:
    running, ended, _ = _checkpoints()
    members: JsonObject = {"dcv": ended}
    last = checkpoint_chunk(object="o", response_id="x", created=1, model="m", members=members)
    said = f"data: {json.dumps(CHUNK)}\n\n".encode()
    return [
        said + checkpoint_comment(running) + PING_LINE + encode_event(last) + b"data: [DONE]\n\n",
        checkpoint_comment(running),
    ]


@harness(_streams)
def checkpoint_stream(data: bytes) -> None:
    """Events with checkpoints are whole, in order and apart."""
    end = 0
    for one in find_checkpoints(data):
        assert one.start is not None
        assert end <= one.start < one.end <= len(data)
        assert data[: one.end].endswith(b"\n\n")
        end = one.end


# --- rats: what endorses evidence -----------------------------------------------------------------


@harness(part("chain", "nvidia_gpu_good", "nvidia_gpu_expired"), Malformed, EvidenceError)
def certificate_chain(data: bytes) -> None:
    """A chain that leads to the root, or none."""
    root = anchors_of(case("nvidia_gpu_good")).nvidia_device
    presented = nvidia_gpu.authenticate_chain(data, root=root, at=AT)
    assert presented.path[-1] in root


@harness(part("vek", *SNP), Malformed)
def vek(data: bytes) -> None:
    sev_snp.load_vek(data)


@harness(part("crl", "sev_snp_good", "sev_snp_revoked"), Malformed, EvidenceError)
def crl(data: bytes) -> None:
    revocation.parse_crl(data)


@harness(
    part("ocsp", "nvidia_gpu_good", "nvidia_gpu_revoked"),
    Malformed,
    EvidenceError,
    EndorsementsUnavailable,
)
def ocsp(data: bytes) -> None:
    """Only the genuine answer is one."""
    good = case("nvidia_gpu_good")
    pem = chain.parse_pem_chain(good.one("chain"), field="chain")
    for certificate, issuer in itertools.pairwise(pem):
        revocation.is_about(data, certificate, issuer)
    status = revocation.check_ocsp(data, certificate=pem[1], issuer=pem[2], at=AT, nonce=None)
    assert status.status is not revocation.Revocation.UNKNOWN


@harness(
    texts(
        {
            "api_version": "dcv/1",
            "images": [{"image_digest": "sha256:" + "00" * 32, "pcrs": {"4": ["00" * 32]}}],
        }
    )
)
def reference_values(data: bytes) -> None:
    parse_reference_values(data)


@harness(texts({"evidences": [{"arch": "HOPPER", "evidence": "AAAA", "certificate": "AAAA"}]}))
def presented(data: bytes) -> None:
    document = json_of(data)
    if isinstance(document, dict):
        parse_presented(document)


@harness(part("rim", "nvidia_gpu_good"), Malformed, EvidenceError)
def rim_scheme(data: bytes) -> None:
    """No manifest is authentic but those that say what the genuine ones say."""
    root = anchors_of(case("nvidia_gpu_good")).nvidia_rim
    read = nvidia_gpu.authenticate_rim_even_if_expired(data, root=root, at=AT).rim
    assert read in [parse_rim(one).rim for one in case("nvidia_gpu_good").all("rim")]


# --- rats: changed under the old signature --------------------------------------------------------


def _says_the_same(name: str, part_name: str, data: bytes) -> None:
    """Refused, or it says nothing that the genuine evidence does not say."""
    genuine = case(name)
    changed = appraise(replace(genuine, parts={**genuine.parts, part_name: (data,)}))
    if changed.verdict is not Tier.CONTRAINDICATED:
        assert changed.claims == _claims(name), f"{name}: {part_name}"


@cache
def _claims(name: str) -> object:
    return appraise(case(name)).claims


@harness(part("report", "nvidia_gpu_good"), Malformed, EvidenceError)
def nvidia_gpu_scheme(data: bytes) -> None:
    _says_the_same("nvidia_gpu_good", "report", data)


@harness(part("report", "sev_snp_good"), Malformed, EvidenceError)
def sev_snp_scheme(data: bytes) -> None:
    _says_the_same("sev_snp_good", "report", data)


@harness(part("vek", "sev_snp_good"), Malformed, EvidenceError)
def sev_snp_vek(data: bytes) -> None:
    _says_the_same("sev_snp_good", "vek", data)


@harness(part("quote", "tdx_good"), Malformed, EvidenceError)
def tdx_scheme(data: bytes) -> None:
    _says_the_same("tdx_good", "quote", data)


@harness(part("collateral", "tdx_good", "tdx_tcb_OutOfDate"), Malformed, EvidenceError)
def tdx_collateral(data: bytes) -> None:
    _says_the_same("tdx_good", "collateral", data)


@harness(part("quote", "tpm2_good"), Malformed, EvidenceError)
def tpm2_scheme(data: bytes) -> None:
    _says_the_same("tpm2_good", "quote", data)


@harness(part("event_log", "tpm2_good"), Malformed, EvidenceError)
def tpm2_event_log(data: bytes) -> None:
    """Another log may end in the same PCRs only by saying the same of them."""
    genuine = case("tpm2_good")
    changed = replace(genuine, parts={**genuine.parts, "event_log": (data,)})
    claims = appraise(changed).claims
    good = _claims("tpm2_good")
    assert isinstance(good, dict)
    assert claims["measurements"] == good["measurements"]


@harness(part("hcl_report", "azure_vtpm_good"), Malformed, EvidenceError)
def azure_vtpm_scheme(data: bytes) -> None:
    _says_the_same("azure_vtpm_good", "hcl_report", data)


# --- rats: changed and signed ---------------------------------------------------------------------


@harness(lambda: [one[:-96] for one in part("report", *NVIDIA)()], Malformed, EvidenceError)
def nvidia_gpu_signed(data: bytes) -> None:
    """A GPU that says anything: whatever it is, there is a verdict."""
    device = nvidia.hopper()
    claims = nvidia_gpu.authenticate(
        device.evidence(device.sign(data)), root=device.roots, at=AT, nonce=None
    )
    canonical_json(appraise_gpu(claims, _rims(), GENEROUS).to_json())


@cache
def _rims() -> tuple[nvidia_gpu.AuthenticatedRim, ...]:
    good = case("nvidia_gpu_good")
    root = anchors_of(good).nvidia_rim
    return tuple(nvidia_gpu.authenticate_rim(one, root=root, at=AT) for one in good.all("rim"))


@harness(part("report", *SNP), Malformed, EvidenceError)
def sev_snp_signed(data: bytes) -> None:
    """A chip that says anything."""
    if len(data) < 0x4A0:
        return
    claims = sev_snp.authenticate_report(
        amd.sign_report(data),
        vek=_vek(),
        authorities=(),
        crl=None,
        roots=(amd.amd_roots("Milan"),),
        at=AT,
    )
    result = appraise_sev_snp(claims, Policy(), reference=None, report_data=None)
    canonical_json(result.to_json())
    assert result.verdict is not Tier.AFFIRMING


@cache
def _vek() -> x509.Certificate:
    return sev_snp.load_vek(amd.Guest().vek())


@harness(part("quote", "tpm2_good", "azure_vtpm_good"), Malformed, EvidenceError)
def tpm2_signed(data: bytes) -> None:
    """A TPM that says anything."""
    key = amd.rsa_key("fuzz AK")
    signature = key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    parts = {"quote": data, "signature": signature, "pcrs": case("tpm2_good").one("pcrs")}
    canonical_json(tpm2.authenticate_parts(parts, key.public_key()).to_json())


@harness(part("hcl_report", "azure_vtpm_good"), Malformed, EvidenceError)
def azure_vtpm_unrooted(data: bytes) -> None:
    """Without a pinned root nothing is authentic."""
    good = cpu_evidence(case("azure_vtpm_good"))
    changed = replace(good, parts={**good.parts, "hcl_report": data})
    azure_vtpm.authenticate(changed, anchors=Anchors(), at=AT)
    raise AssertionError("authentic without a root")

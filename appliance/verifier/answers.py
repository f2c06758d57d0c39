"""What proves an answer: its receipt, the epochs that the receipt cites, its keyset's report.

    X-Receipt-Id ── receipt ── dcv.gpu.attested ── epochs
                       └── workload_keyset_digest ── the report at hand, or that keyset's own

Nothing fetched here is believed; `check.check` holds all of it together (step 10).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import httpx2

from appliance.errors import Malformed, VerificationIncomplete
from appliance.rats.exchange import Exchange
from appliance.verifier.bundle import Bundle
from appliance.verifier.fetching import Fetching, Get, fetch
from appliance.wire import epoch as epoch_format
from appliance.wire import report as report_format
from appliance.wire.canonical import parse_json_object
from appliance.wire.commitments import NO_GPU_EVIDENCE
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import parse_epoch
from appliance.wire.receipt import MAX_NESTING, MAX_RECEIPT_BYTES, parse_receipt, read_events
from appliance.wire.report import Report, parse_report

RECEIPT_S = 10.0
"""How long a receipt may take once the answer has ended: one that broke off has its receipt when
the appliance has noticed."""

RETRY_S = 0.2
LOST = "receipt_lost"


@dataclass(frozen=True, slots=True, repr=False)
class Answered:
    """What came back: every content byte, and by which id its receipt is found.

    Attributes:
        receipt_id: as `X-Receipt-Id` has it; empty without one.
        client_nonce: the 32 bytes that were sent as `X-DCV-Nonce`.
    """

    receipt_id: str
    client_nonce: bytes | None
    content: bytes


def exchange_of(answered: Answered, request: bytes | None) -> Fetching[Exchange]:
    """The receipt with everything that it cites, beside what was sent and what came.

    Args:
        request: the body's bytes.

    Raises:
        Malformed: what came is none. VerificationIncomplete: it cannot be had.
    """
    receipt = parse_receipt((yield from _receipt(answered.receipt_id)))
    log = read_events(receipt)
    cited = {one.evidence_digest for one in (log.admission, log.completion) if one is not None}
    epochs = []
    for digest in sorted(cited - {NO_GPU_EVIDENCE}):
        path = f"/v1/dcv/epochs/{format_sha256(digest)}"
        epochs.append(parse_epoch((yield from _document(path, epoch_format.MAX_BYTES))))
    return Exchange(receipt, tuple(epochs), request, answered.content, answered.client_nonce)


def report_of(keyset_digest: bytes) -> Fetching[Report]:
    """The report of a keyset that was served once, in its null form.

    Raises:
        Malformed: what came is none. VerificationIncomplete: it cannot be had.
    """
    path = f"/v1/dcv/reports/{format_sha256(keyset_digest)}"
    return parse_report((yield from _document(path, report_format.MAX_BYTES)))


def bundled(bundle: Bundle, exchange: Exchange) -> Fetching[Bundle]:
    """The bundle with an exchange in it, and with the report of the exchange's keyset.

    Raises:
        Malformed: what came is no report. VerificationIncomplete: it cannot be had.
    """
    wanted = exchange.receipt.keyset_digest
    if wanted != bundle.report.keyset_digest:
        # The keyset was renewed in between; the receipt's own has its null form.
        bundle = replace(bundle, report=(yield from report_of(wanted)), nonce=None)
    return replace(bundle, exchange=exchange)


async def collect_exchange(
    client: httpx2.AsyncClient, bundle: Bundle, answered: Answered, request: bytes
) -> Bundle:
    """Fetch what proves an answer, over a pinned client, and put it into the bundle.

    Raises:
        Malformed: what came is none. VerificationIncomplete: it cannot be had. Unbound: the
            connection ends at another TLS key.
    """

    def collecting() -> Fetching[Bundle]:
        return (yield from bundled(bundle, (yield from exchange_of(answered, request))))

    return await fetch(client, collecting())


def is_receipt_id(text: str) -> bool:
    """It goes into a path."""
    return 0 < len(text) <= 64 and text.isascii() and text.isalnum()


def _receipt(receipt_id: str) -> Fetching[bytes]:
    if not is_receipt_id(receipt_id):
        raise VerificationIncomplete("expected an answer with a receipt (X-Receipt-Id)")
    path = f"/v1/aci/receipts/{receipt_id}"
    wait_s = 0.0
    for _ in range(round(RECEIPT_S / RETRY_S)):
        got = yield Get(path, MAX_RECEIPT_BYTES, after_s=wait_s)
        if got.status == httpx2.codes.OK:
            return got.body
        if got.status != httpx2.codes.NOT_FOUND:
            raise VerificationIncomplete(f"{path}: got HTTP {got.status}")
        if _code(got.body) == LOST:
            raise VerificationIncomplete("the receipt is lost: the service was killed meanwhile")
        wait_s = RETRY_S
    raise VerificationIncomplete(f"expected the answer's receipt within {RECEIPT_S:g} s")


def _document(path: str, max_bytes: int) -> Fetching[bytes]:
    got = yield Get(path, max_bytes)
    if got.status == httpx2.codes.NOT_FOUND:
        raise VerificationIncomplete(f"{path}: the appliance does not have it")
    if got.status != httpx2.codes.OK:
        raise VerificationIncomplete(f"{path}: got HTTP {got.status}")
    return got.body


def _code(body: bytes) -> str | None:
    """Of an error object."""
    try:
        error = parse_json_object(body, max_nesting=MAX_NESTING).get("error")
    except Malformed:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None

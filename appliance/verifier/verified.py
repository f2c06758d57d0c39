"""Using an appliance under verification: the numbered steps of protocol.md section 9, apart from I/O.

    before the first request     1 to 9   a report with a fresh nonce, the pins, until when
    before each request                   is the verification still in its time
    on each response's head               is its keyset the one that was verified; if not, 1 to 9
    after each answer's last byte   10    the receipt, and what it cites

`transport` drives this for threads, Trio and asyncio. A step that does not hold raises, and what
was not proven is not handed on; of a stream that is its end, as it was shown while it came.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import httpx2

from appliance.errors import Contraindicated, Malformed, Unbound, VerificationIncomplete
from appliance.rats.result import Tier
from appliance.verifier.answers import Answered, bundled, exchange_of, is_receipt_id
from appliance.verifier.bundle import MAX_CONTENT_BYTES, Bundle
from appliance.verifier.check import Rules, as_bundle
from appliance.verifier.fetching import Fetching
from appliance.verifier.session import base_url, report_with
from appliance.verifier.verdict import Outcome
from appliance.verifier.verify_command import NONCE_BYTES, outcome_of
from appliance.wire.encoding import format_sha256, parse_sha256

Accept: TypeAlias = Literal["affirming", "unsafe_warning"]
"""Which verdicts are good enough. The second takes evidence that is authentic and has reservations,
whatever they are: name in the policy what may be missing rather than this."""

Notice: TypeAlias = Callable[[Outcome], None]

OPENAI_HOST = "api.openai.com"
"""Where the openai package sends what it was given no `base_url` for. Nothing is ever sent there."""

UNPROVEN_POSTS = ("/tokenize", "/detokenize", "/attestation/generate", "/attestation/verify")
"""Answers without a receipt; every other POST that succeeds must have one."""

REPLACED = frozenset(
    {"host", "content-length", "transfer-encoding", "accept-encoding", "x-dcv-nonce"}
)

MAX_REFUSAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """An appliance on which steps 1 to 9 were taken."""

    bundle: Bundle

    @property
    def pins(self) -> frozenset[bytes]:
        """SHA-256 of the TLS keys that its evidence names, 32 bytes each."""
        return frozenset(self.bundle.report.keyset.tls)

    @property
    def keyset_digest(self) -> bytes:
        """32 bytes."""
        return self.bundle.report.keyset_digest

    def holds(self, at: datetime.datetime) -> bool:
        """Whether the keyset is still in its time (step 7)."""
        return at.timestamp() < self.bundle.report.keyset.not_after


@dataclass(frozen=True, slots=True, repr=False)
class Outgoing:
    """A request as it is sent.

    Attributes:
        at: when; as of then its answer is judged, whatever is renewed before its end.
        nonce: 32 bytes, of a POST.
        needs_receipt: an answer to it is nothing without one.
    """

    request: httpx2.Request
    body: bytes
    at: datetime.datetime
    nonce: bytes | None
    needs_receipt: bool

    @property
    def credential(self) -> dict[str, str]:
        """For what belongs to its answer."""
        value = self.request.headers.get("Authorization")
        return {} if value is None else {"Authorization": value}


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """Who verifies, by which rules, and what is good enough.

    Attributes:
        url: of the appliance, scheme, host and port.
        notice: told the outcome of every verification that was good enough, of the appliance and
            of each answer; in the thread or task that asked.
        clock: timezone-aware; this machine's.
    """

    url: str
    rules: Rules
    accept: Accept
    notice: Notice
    clock: Callable[[], datetime.datetime]

    # ------------------------------------------------------------------- the appliance: 1 to 9

    def verification(self) -> Fetching[Verified]:
        """Steps 1 to 9.

        Raises:
            VerificationIncomplete: nothing was learnt.
            Malformed, Unauthentic, Revoked, Stale, Unbound, Contraindicated: do not send anything.
        """
        # 1. A report with a fresh nonce, over TLS with whoever answers.
        nonce, now = secrets.token_bytes(NONCE_BYTES), self.clock()
        fetched = yield from report_with(nonce)
        bundle = as_bundle(fetched, self.url, nonce, now=now)
        # 2 to 9. `rats.appraise` has them by number. Step 8 holds the key that was at the other
        #    end to the keyset; from here on every connection is pinned to the keyset's keys.
        outcome = outcome_of(bundle, self.rules, at=now, source="clock")
        self._require(outcome)
        self.notice(outcome)
        return Verified(bundle)

    def is_news(self, head: httpx2.Response, verified: Verified) -> bool:
        """Whether a response names another keyset than the one that was verified: then steps 1 to
        9 again, before anything of the response is handed on.

        Raises:
            Unbound: it names none, or no digest. Only refusals by a server that did not get to
            reading the request may.
        """
        named = head.headers.get("X-ACI-Keyset-Digest", "")
        if not named and head.is_error:
            return False
        try:
            digest = parse_sha256(named, field="X-ACI-Keyset-Digest")
        except Malformed as error:
            raise Unbound(f"X-ACI-Keyset-Digest: {error.message}") from None
        return digest != verified.keyset_digest

    def require_keyset(self, head: httpx2.Response, verified: Verified) -> None:
        """Hold a response to the keyset that was verified upon it.

        Raises:
            Unbound: it names another.
        """
        if self.is_news(head, verified):
            expected = format_sha256(verified.keyset_digest)
            got = head.headers["X-ACI-Keyset-Digest"]
            raise Unbound(f"X-ACI-Keyset-Digest: expected {expected}, got {got[:80]}")

    # ---------------------------------------------------------------------------- each request

    def outgoing(self, request: httpx2.Request, body: bytes) -> Outgoing:
        """A request to the appliance as it is sent: with a nonce of ours, and for an answer that
        comes as it was written.

        Raises:
            VerificationIncomplete: it is for somebody else, or too large to keep.
        """
        here = httpx2.URL(self.url)
        # An OpenAI client that was given no `base_url` means us: we know of nobody else.
        unaddressed = request.url.scheme == "https" and request.url.host == OPENAI_HOST
        if not unaddressed and _origin(request.url) != _origin(here):
            raise VerificationIncomplete(
                f"expected a request to {self.url}, which was verified, "
                f"got {request.url.scheme}://{request.url.host}"
            )
        if len(body) > MAX_CONTENT_BYTES:
            raise VerificationIncomplete(
                f"expected a request of at most {MAX_CONTENT_BYTES} bytes, got {len(body)}"
            )
        posted = request.method == "POST"
        nonce = secrets.token_bytes(NONCE_BYTES) if posted else None
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.lower().decode("latin-1") not in REPLACED
        ]
        headers.append((b"Accept-Encoding", b"identity"))
        if nonce is not None:
            headers.append((b"X-DCV-Nonce", nonce.hex().encode()))
        sent = httpx2.Request(
            request.method,
            here.copy_with(raw_path=request.url.raw_path),
            headers=headers,
            content=body if body or posted else None,
            extensions=request.extensions,
        )
        proves = posted and not request.url.path.endswith(UNPROVEN_POSTS)
        return Outgoing(sent, body, self.clock(), nonce, proves)

    # ------------------------------------------------------------------------- each answer: 10

    def check_head(self, head: httpx2.Response, sent: Outgoing) -> None:
        """What cannot be an answer is refused before a byte of it is handed on.

        Raises:
            VerificationIncomplete: it has no receipt, is compressed, or is neither an answer nor a
                refusal, such as what sends us elsewhere or to another protocol.
        """
        if head.headers.get("Content-Encoding", "identity") != "identity":
            raise VerificationIncomplete("expected an answer as it was written, got a coded one")
        answers = head.status_code == httpx2.codes.OK if sent.needs_receipt else head.is_success
        if not (answers or head.is_error):
            raise VerificationIncomplete(f"expected an answer, got HTTP {head.status_code}")
        if sent.needs_receipt and head.is_success and not is_receipt_id(receipt_id_of(head)):
            raise VerificationIncomplete("expected an answer with a receipt (X-Receipt-Id)")

    def has_proof(self, head: httpx2.Response, sent: Outgoing) -> bool:
        """Whether there is a receipt to be verified. A refusal may have none (401, 413, 429, or
        nobody read it); whoever gets one is told that nothing was answered, which is all it
        says."""
        return sent.nonce is not None and bool(receipt_id_of(head))

    def proof(
        self, verified: Verified, sent: Outgoing, head: httpx2.Response, content: bytes
    ) -> Fetching[Outcome]:
        """Step 10, once the last byte has come, and 2 to 9 on the keyset that the receipt names.

        Raises:
            VerificationIncomplete: the proof cannot be had.
            Malformed, Unauthentic, Revoked, Stale, Unbound, Contraindicated: it does not hold, or
            this is not a whole answer.
        """
        answered = Answered(receipt_id_of(head), sent.nonce, content)
        exchange = yield from exchange_of(answered, sent.body)
        if exchange.receipt.receipt_id != answered.receipt_id:
            raise Unbound(
                f"receipt_id: expected {answered.receipt_id}, got {exchange.receipt.receipt_id}"
            )
        endpoint = sent.request.url.path
        if exchange.receipt.endpoint != endpoint:
            raise Unbound(f"receipt.endpoint: expected {endpoint}, got {exchange.receipt.endpoint}")
        bundle = yield from bundled(verified.bundle, exchange)
        # As of when it was asked: an answer may outlast the keyset that it was admitted under.
        outcome = outcome_of(bundle, self.rules, at=sent.at, source="clock")
        self._require_answer(outcome, answered=head.is_success)
        self.notice(outcome)
        return outcome

    # ------------------------------------------------------------------------- what is accepted

    def _require(self, outcome: Outcome) -> None:
        if outcome.verdict is Tier.AFFIRMING:
            return
        if outcome.verdict is Tier.WARNING and self.accept == "unsafe_warning":
            return
        checks = dict.fromkeys(str(one.finding) for one in outcome.findings)
        verdict = "none" if outcome.verdict is None else outcome.verdict.value
        raise Contraindicated(f"verdict: expected affirming, got {verdict}: {'; '.join(checks)}")

    def _require_answer(self, outcome: Outcome, *, answered: bool) -> None:
        """The status is not in a receipt, but how it ended is, and the two must agree."""
        complete = _told(outcome, "outcome") == "complete"
        if answered:
            if not complete:
                raise Contraindicated(
                    f"dcv.ended.outcome: expected complete, got {_told(outcome, 'outcome')}"
                )
            self._require(outcome)
        elif complete:
            raise Unbound("dcv.ended.outcome: expected a refusal's, got complete")
        elif outcome.verdict is Tier.CONTRAINDICATED:
            self._require(outcome)


class HeldBack:
    """The part of a stream that waits for its proof: its end.

    Clients stop reading at `data: [DONE]` and take what they have for the answer, so that line and
    what follows it is not handed on before. Nothing else is delayed: an event ends with its line.
    No more is held before that line than the last line, which is unfinished.

    What ends a line differs between clients. Some go beyond server-sent events (section 9.2.5: LF,
    CR) and end one at all that Python or Unicode call a line's end, and strip a byte order mark. So
    what any of them would read as the end is held; inside a line the same words are text.
    """

    DONE = re.compile(
        rb"(?:\A|[\n\r\v\f\x1c-\x1e]|\xc2\x85|\xe2\x80[\xa8\xa9])"
        rb"(?P<end>(?:\xef\xbb\xbf)?data:[ \t]*\[DONE\])"
    )

    def __init__(self) -> None:
        self._line = bytearray()
        self._done = False

    def feed(self, part: bytes) -> bytes:
        """What of it, and of what was held before, may be handed on."""
        self._line += part
        if self._done or b"\n" not in part:
            return b""
        whole = self._line.rfind(b"\n") + 1
        found = self.DONE.search(self._line, 0, whole)
        if found is not None:
            self._done = True
            whole = self._line.rfind(b"\n", 0, found.start("end")) + 1
        ready = bytes(self._line[:whole])
        del self._line[:whole]
        return ready

    def rest(self) -> bytes:
        """What is left once there is proof."""
        return bytes(self._line)


class Content:
    """Every byte of an answer, as it comes; a receipt's hashes are over all of them."""

    def __init__(self, *, max_bytes: int = MAX_CONTENT_BYTES) -> None:
        self._bytes = bytearray()
        self._max_bytes = max_bytes

    def add(self, part: bytes) -> None:
        """Raises: VerificationIncomplete: there is more than one would keep."""
        self._bytes += part
        if len(self._bytes) > self._max_bytes:
            raise VerificationIncomplete(f"expected an answer of at most {self._max_bytes} bytes")

    def all(self) -> bytes:
        """In their order."""
        return bytes(self._bytes)


def relying_party(
    url: str,
    rules: Rules,
    *,
    accept: Accept,
    notice: Notice | None,
    clock: Callable[[], datetime.datetime] | None = None,
) -> RelyingParty:
    """Raises: VerificationIncomplete: not an https URL, or no such acceptance."""
    if accept not in ("affirming", "unsafe_warning"):
        raise VerificationIncomplete("accept: expected affirming or unsafe_warning")
    return RelyingParty(base_url(url), rules, accept, notice or _ignore, clock or _now)


def receipt_id_of(head: httpx2.Response) -> str:
    """Empty without one."""
    value: str = head.headers.get("X-Receipt-Id", "")
    return value


def streams(head: httpx2.Response) -> bool:
    """Whether the answer comes as events."""
    kind: str = head.headers.get("Content-Type", "")
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def _told(outcome: Outcome, claim: str) -> object:
    parts = outcome.claims.get("submods")
    receipt = parts.get("receipt") if isinstance(parts, dict) else None
    return receipt.get(claim) if isinstance(receipt, dict) else None


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or 443


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _ignore(outcome: Outcome) -> None:
    pass

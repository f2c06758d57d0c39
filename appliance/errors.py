"""Every error this project raises on purpose, in one tree.

Whose fault it is comes first, because that decides what happens next:

    ApplianceError                 code, HTTP status, exit status and advice on every leaf
    ├── InternalError              ours, at any time: a defect
    ├── ConfigError                ours, before boot: the configuration is wrong
    ├── BootError                  a numbered boot stage failed; carries the leaf that says why
    ├── ListenError                the public port cannot be opened
    ├── CertificateRefused         the operator's certificates are not ones we would use
    ├── ModelError                 the weights on disk are not the ones the configuration names
    ├── Malformed                  bytes that do not parse (`appliance.wire` raises nothing else)
    ├── RequestError               the client's: 4xx, never retried as it stands
    │   ├── Unauthorized
    │   ├── InvalidRequest  InvalidSeed  UnknownParameter  UnsupportedFeature
    │   ├── BodyTooLarge  BodyTooSlow
    │   ├── ModelNotFound  RouteNotFound  MethodNotAllowed
    │   ├── ReceiptLost                           its exchange was cut off by a restart
    │   └── SessionNotAccepted
    ├── CapacityError              nobody's: try again later
    │   ├── RateLimited                           the API key's own limit
    │   ├── Overloaded                            everybody's
    │   └── NotServing
    ├── EvidenceError              the evidence does not hold: nothing it says may be believed
    │   ├── Unauthentic                           signature, chain to the pinned root, form
    │   ├── Revoked                               an issuer took a certificate back
    │   ├── Stale                                 not the nonce asked for, or outside its time
    │   ├── Unbound                               it is about something else
    │   └── Contraindicated                       authentic, and not what the policy wants
    ├── AttesterError              this machine's evidence could not be had
    │   ├── ProviderAbsent                        what the configuration requires is not there
    │   ├── DeviceFault                           the device did not answer, or answered nonsense
    │   ├── SealRefused                           the TPM does not give a sealed secret out
    │   ├── AttesterUnavailable                   the collector is gone, hangs or speaks nonsense
    │   └── AttestationFailed                     what a client is told of any of these
    ├── EndorsementsUnavailable    what others vouch for could not be had
    ├── SecondOpinionFailed        the vendor's own verifier came to no verdict, or to another
    ├── VerificationIncomplete     the relying party could not check: nothing is known
    ├── NotComparable              a replay would compare what need not be equal
    └── EngineError                the engine's
        ├── EngineStartFailed  EngineExposed          it never became usable
        ├── EngineNotDeterministic                    it answers one request in two ways
        ├── EngineDied  EngineHung                    it stopped being usable
        ├── EngineUnavailable                         it did not accept this request
        ├── EngineProtocolError  EngineStreamFailed   it broke off, or did not speak its dialect
        └── EngineRefused                             it judged the request itself: its 4xx is kept

Rules: a message never holds a prompt, a completion, a key or a path of the machine it came
from. `web.problem` turns an error into an HTTP answer, `run` turns one into an exit status, and
neither looks at anything but the attributes declared here.
"""

from __future__ import annotations

from typing import ClassVar

# Exit statuses follow sysexits(3), so that systemd and shell scripts can tell them apart.
EX_USAGE = 64
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_OSERR = 71
EX_NOPERM = 77
EX_CONFIG = 78


class ApplianceError(Exception):
    """The root of the tree; only its leaves are raised.

    Attributes:
        code: stable machine-readable name, the `code` of an OpenAI error object.
        type: the `type` of an OpenAI error object.
        http_status: status of the HTTP answer when a request meets this error.
        exit_status: status of the process when this error ends it.
        advice: what the operator does about it, one sentence.
        client: what the client does about it, one sentence.
    """

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    client: ClassVar[str] = "Try again later; if it lasts, tell the operator."
    http_status: int = 500
    exit_status: int = EX_SOFTWARE
    advice: str = "This is a defect: report it with the log lines around it."

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InternalError(ApplianceError):
    """A defect of ours; its text would be the defect's own, so there is none."""


class ConfigError(ApplianceError):
    code = "config_error"
    exit_status = EX_CONFIG
    advice = "Correct the configuration file; `dcv serve --config FILE --check` tells when it is."


class ListenError(ApplianceError):
    code = "listen_failed"
    exit_status = EX_OSERR
    advice = "Free the port, or choose another [listen] host and port."


class CertificateRefused(ApplianceError):
    code = "certificate_refused"
    exit_status = EX_CONFIG
    advice = (
        "Have the request that `dcv csr` prints now signed, and put the certificate and its issuers, "
        "in this order and nothing else, into [tls] chain_file."
    )


class ModelError(ApplianceError):
    code = "model_mismatch"
    exit_status = EX_CONFIG
    advice = "Restore the model files that the configuration names, or correct [model] files."


class BootError(ApplianceError):
    """A numbered stage of the boot failed.

    The exit status and the advice are those of the error behind it.
    """

    code = "boot_failed"
    http_status = 503

    def __init__(self, stage: int, name: str, cause: ApplianceError) -> None:
        super().__init__(f"stage {stage} ({name}): {cause.message}")
        self.stage = stage
        self.name = name
        self.cause = cause
        self.exit_status = cause.exit_status
        self.advice = cause.advice


class Malformed(ApplianceError):
    """Bytes that do not parse.

    Attributes:
        field: what was being read, as a path such as `$.messages[0].role`.
        offset: where, in bytes from the start of the input; None where a parser cannot tell.
    """

    code = "malformed"
    type = "invalid_request_error"
    http_status = 400
    advice = "Nothing to do here: what was received is not what its format says."
    client = "Change the request: sent again as it stands, it fails again."

    def __init__(self, message: str, *, field: str = "$", offset: int | None = None) -> None:
        super().__init__(message, param=None if field == "$" else field.removeprefix("$."))
        self.field = field
        self.offset = offset


class RequestError(ApplianceError):
    type = "invalid_request_error"
    http_status = 400
    advice = "Nothing to do on the appliance: the client must change its request."
    client = "Change the request: sent again as it stands, it fails again."


class Unauthorized(RequestError):
    code = "unauthorized"
    type = "authentication_error"
    http_status = 401
    advice = "If the client should have access, make it a key with `dcv keys new NAME`."
    client = "Send a valid API key as `Authorization: Bearer KEY`."


class InvalidRequest(RequestError):
    code = "invalid_request"


class InvalidSeed(RequestError):
    code = "invalid_seed"


class UnknownParameter(RequestError):
    code = "unknown_parameter"


class UnsupportedFeature(RequestError):
    code = "unsupported_feature"


class BodyTooLarge(RequestError):
    code = "request_too_large"
    http_status = 413


class BodyTooSlow(RequestError):
    code = "request_timeout"
    http_status = 408


class ModelNotFound(RequestError):
    code = "model_not_found"
    http_status = 404


class RouteNotFound(RequestError):
    code = "not_found"
    http_status = 404


class ReceiptLost(RequestError):
    """The exchange was open when the service was killed: the keys that would have signed its
    receipt are gone, so there will never be one."""

    code = "receipt_lost"
    http_status = 404
    advice = "Nothing to do here: the service was killed while it answered; its log says why."
    client = "Do not wait for this receipt; what was received of the answer is not provable."


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    http_status = 405


class SessionNotAccepted(RequestError):
    code = "session_not_accepted"
    http_status = 412


class CapacityError(ApplianceError):
    http_status = 503
    client = "Try again after the seconds in `Retry-After`."


class RateLimited(CapacityError):
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    http_status = 429
    advice = "If the client should have more, raise the limits of its key in [auth] keys."


class Overloaded(CapacityError):
    code = "overloaded"
    advice = (
        "Add capacity, or raise what the message names in [limits] if the engine or the memory has "
        "room."
    )


class NotServing(CapacityError):
    code = "not_serving"
    advice = "Read `dcv status`: the appliance is booting, draining or withdrawn."


class EvidenceError(ApplianceError):
    """Evidence that does not hold. `authenticate` raises the first one: after a bad signature
    nothing that follows means anything."""

    http_status = 503
    exit_status = EX_NOPERM
    client = "Do not send anything; tell the operator what the message says."


class Unauthentic(EvidenceError):
    code = "unauthentic"
    advice = (
        "The evidence was altered, or comes from no device of the vendor's: use other hardware."
    )


class Revoked(EvidenceError):
    code = "revoked"
    advice = "The vendor took this certificate back: update the firmware or replace the device."


class Stale(EvidenceError):
    code = "stale"
    advice = "Ask for evidence again, with a new nonce; check the machine's clock."


class Unbound(EvidenceError):
    code = "unbound"
    advice = "The evidence is about another machine, key or exchange: collect all of it anew."


class Contraindicated(EvidenceError):
    """Authentic evidence that the policy refuses; the message names every finding."""

    code = "contraindicated"
    advice = "Bring the machine to what the policy expects; each finding says what that is."


class AttesterError(ApplianceError):
    http_status = 503
    exit_status = EX_UNAVAILABLE
    client = "Try again later: the appliance could not prove itself, so nothing was sent on."


class ProviderAbsent(AttesterError):
    code = "provider_absent"
    exit_status = EX_CONFIG
    advice = "Run on a machine that has what [attestation] requires, or change what it requires."


class DeviceFault(AttesterError):
    code = "device_fault"
    advice = "Read the attester's log; a device that keeps failing needs a reset or a replacement."


class SealRefused(AttesterError):
    code = "seal_refused"
    exit_status = EX_NOPERM
    advice = "Seal the secret anew, for this image and for the storage key of this machine's TPM."


class AttesterUnavailable(AttesterError):
    code = "attester_unavailable"
    advice = "Read the attester's log and `systemctl status dcv-attester`."


class AttestationFailed(AttesterError):
    """There is no evidence for this request, so nothing of it was passed on."""

    code = "attestation_failed"
    advice = "Read the log line `evidence_not_collected` or `withdrawn` of that moment."


class EndorsementsUnavailable(ApplianceError):
    code = "endorsements_unavailable"
    http_status = 503
    exit_status = EX_UNAVAILABLE
    client = "Try again later: revocation or reference values could not be had."
    advice = "Check the endpoints in [attestation] and the network, or put the files in its store."


class SecondOpinionFailed(ApplianceError):
    code = "second_opinion_failed"
    http_status = 503
    exit_status = EX_NOPERM
    advice = "Compare both findings; [attestation] nvidia_sdk = `record` boots without agreement."


class VerificationIncomplete(ApplianceError):
    """Nothing was learnt about the appliance, neither good nor bad."""

    code = "could_not_verify"
    exit_status = EX_UNAVAILABLE
    client = "Check the address and the files; nothing was verified."
    advice = "Check the address, the files and the network."


class NotComparable(ApplianceError):
    """An answer and its replay were promised to nobody to be equal."""

    code = "not_comparable"
    exit_status = EX_UNAVAILABLE
    client = "Replay it against an appliance with the same weights and engine settings."
    advice = "Replay it against an appliance with the same weights and engine settings."


class EngineError(ApplianceError):
    http_status = 503
    client = "Try again; of a stream that broke off, keep nothing that needs its end."


class EngineStartFailed(EngineError):
    code = "engine_start_failed"
    exit_status = EX_UNAVAILABLE
    advice = "Read the engine's log lines above; [engine] ready_deadline_s bounds the start."


class EngineExposed(EngineError):
    code = "engine_exposed"
    exit_status = EX_UNAVAILABLE
    advice = "Remove what makes the engine listen beyond loopback from [engine] extra_args."


class EngineNotDeterministic(EngineError):
    """It cannot keep what its receipts would say."""

    code = "engine_not_deterministic"
    exit_status = EX_UNAVAILABLE
    advice = (
        "Check that the engine's version, kernels and [engine] settings are the locked ones; "
        "[engine] deterministic = false serves without the claim, and receipts say so."
    )


class EngineDied(EngineError):
    code = "engine_died"
    exit_status = EX_SOFTWARE
    advice = "Read the engine's last log lines; systemd starts the appliance again."


class EngineHung(EngineError):
    code = "engine_hung"
    exit_status = EX_SOFTWARE
    advice = "Read the engine's last log lines; systemd starts the appliance again."


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
    advice = "If it lasts, read the engine's log lines and `dcv status`."


class EngineProtocolError(EngineError):
    code = "engine_protocol_error"
    http_status = 502
    advice = "The engine did not speak its own dialect: check that its version is the locked one."


class EngineStreamFailed(EngineError):
    code = "engine_failed"
    http_status = 502
    advice = "Read the engine's log lines of that moment."


class EngineRefused(EngineError):
    """The engine judged the request; its 4xx is kept, its message is not (it echoes input)."""

    code = "engine_refused"
    type = "invalid_request_error"
    advice = "Nothing to do on the appliance: the client must change its request."
    client = "Change the request: sent again as it stands, it fails again."

    def __init__(self, message: str, *, http_status: int) -> None:
        super().__init__(message)
        self.http_status = http_status


def leaves(error: BaseException | None) -> list[BaseException]:
    """The exceptions that a group, however nested, consists of; of any other, itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [] if error is None else [error]

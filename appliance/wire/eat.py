"""Entity Attestation Tokens (RFC 9711) as JWTs (RFC 7519), signed with EdDSA (RFC 8037).

What the appliance says about an appraisal it made, for software that reads tokens. It is the
appliance's own word: whoever can verify the evidence beside it does that instead. The signing
input begins with `eyJ`, a receipt's or a checkpoint's with `{`, so that one key can never be
made to sign the one for the other.
"""

from __future__ import annotations

import base64
from collections.abc import Callable

from appliance.wire.canonical import JsonObject, JsonValue, canonical_json

PROFILE = "tag:dcv,2026:dcv/1"
"""`eat_profile` (RFC 9711 section 6): docs/protocol.md defines it."""


def eat_claims(
    *, nonce: bytes, issued_at: int, verdict: str, gpus: list[JsonObject], subject: str
) -> JsonObject:
    """The claims set.

    Args:
        nonce: 32 bytes, the epoch's.
        issued_at: Unix seconds.
        gpus: claims of each, in the order of the instance document; one submodule each
            (RFC 9711 section 4.2.18).
        subject: the keyset's.
    """
    submods: dict[str, JsonValue] = {f"GPU-{index}": gpu for index, gpu in enumerate(gpus)}
    return {
        "eat_profile": PROFILE,
        "eat_nonce": nonce.hex(),
        "iat": issued_at,
        "sub": subject,
        "dcv_verdict": verdict,
        "submods": submods,
    }


def sign_eat(claims: JsonObject, *, key_id: str, sign: Callable[[bytes], bytes]) -> str:
    """The JWT in its compact form.

    Args:
        sign: Ed25519 over the signing input, 64 bytes.
    """
    header: JsonObject = {"alg": "EdDSA", "kid": key_id, "typ": "eat+jwt"}
    signing_input = b".".join(_base64url(canonical_json(part)) for part in (header, claims))
    return (signing_input + b"." + _base64url(sign(signing_input))).decode("ascii")


def _base64url(data: bytes) -> bytes:
    """Without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")

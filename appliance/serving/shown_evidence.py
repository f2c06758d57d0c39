"""An epoch's evidence as a client is shown it: the original DCV shape, with NVIDIA's members.

`generate` answers with it, and so does an answer that was asked for with `tee` (protocol.md
sections 6 and 7). Claims and token are the appliance's own reading of the evidence beside them.
"""

from __future__ import annotations

from appliance.rats.presented import present
from appliance.rats.result import Tier
from appliance.serving.epochs import Attested
from appliance.serving.identity import Identity
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.eat import eat_claims, sign_eat


def shown_evidence(attested: Attested, identity: Identity, *, issued_at: int) -> JsonObject:
    """`verified`, `evidences`, `claims`, `eat`, `nonce` and `inclusion`.

    Args:
        issued_at: Unix seconds.
    """
    epoch, nonce = attested.epoch, attested.inclusion.nonce
    claims = [part.claims for part in epoch.result.submods.values()]
    evidences: list[JsonValue] = [
        present(gpu, chip=str(claim.get("chip", "")), nonce=nonce)
        for gpu, claim in zip(epoch.gpus, claims, strict=True)
    ]
    told: list[JsonValue] = list(claims)
    token = eat_claims(
        nonce=nonce,
        issued_at=issued_at,
        verdict=epoch.result.verdict.value,
        gpus=claims,
        subject=identity.subject,
    )
    key = identity.checkpoint_key
    return {
        "verified": epoch.result.verdict in (Tier.AFFIRMING, Tier.WARNING),
        "evidences": evidences,
        "claims": told,
        "eat": sign_eat(token, key_id=key.public.key_id, sign=key.sign),
        "nonce": nonce.hex(),
        "inclusion": attested.inclusion.to_json(),
    }

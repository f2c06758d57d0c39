"""rats.revocation: who may say that a certificate is good, and when."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import (
    ApplianceError,
    EndorsementsUnavailable,
    EvidenceError,
    Malformed,
    Stale,
    Unauthentic,
    Unbound,
)
from appliance.rats.result import Finding, Tier
from appliance.rats.revocation import (
    OcspStatus,
    Revocation,
    check_crl,
    check_ocsp,
    device_part,
    revocation_findings,
    signer_part,
)
from tests.fakes.vendors import (
    DAY,
    HOUR,
    Issuer,
    OcspResponder,
    key_usage,
    make_crl,
    root,
)

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
NONCE = bytes(range(32))


@dataclass
class Pki:
    """A path such as a device's: root, two CAs, leaf; and another root of the same names."""

    root: Issuer
    upper: Issuer
    lower: Issuer
    leaf: Issuer
    stranger: Issuer

    @property
    def path(self) -> tuple[x509.Certificate, ...]:
        return tuple(one.certificate for one in (self.leaf, self.lower, self.upper, self.root))


@pytest.fixture(scope="module")
def pki() -> Pki:
    top = root("Device CA", now=NOW)
    upper = top.issue("Identity", now=NOW, ca=True)
    lower = upper.issue("Provisioner", now=NOW, ca=True)
    leaf = lower.issue("GSP", now=NOW)
    return Pki(top, upper, lower, leaf, root("Device CA", now=NOW))


def responder(pki: Pki) -> OcspResponder:
    return OcspResponder([pki.root, pki.upper, pki.lower], now=lambda: NOW)


def ask(
    by: OcspResponder,
    certificate: Issuer,
    issuer: Issuer,
    nonce: bytes | None = NONCE,
    algorithm: hashes.HashAlgorithm | None = None,
) -> bytes:
    builder = ocsp.OCSPRequestBuilder().add_certificate(
        certificate.certificate,
        issuer.certificate,
        algorithm or hashes.SHA384(),
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return by.respond(builder.build().public_bytes(Encoding.DER))


def check(
    response: bytes,
    certificate: Issuer,
    issuer: Issuer,
    *,
    at: datetime.datetime = NOW,
    nonce: bytes | None = NONCE,
    max_age: datetime.timedelta = 7 * DAY,
) -> OcspStatus:
    return check_ocsp(
        response,
        certificate=certificate.certificate,
        issuer=issuer.certificate,
        at=at,
        nonce=nonce,
        max_age=max_age,
    )


# --- what an answer says --------------------------------------------------------------------------


def test_a_delegate_of_the_issuer_says_good(pki: Pki) -> None:
    status = check(ask(responder(pki), pki.lower, pki.upper), pki.lower, pki.upper)
    assert status == OcspStatus(Revocation.GOOD, None, NOW, NOW + DAY)


def test_the_issuer_itself_may_answer(pki: Pki) -> None:
    by = responder(pki)
    by.direct = True
    status = check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)
    assert status.status is Revocation.GOOD


@pytest.mark.parametrize("direct", [False, True])
def test_who_answers_may_be_named_by_its_key(pki: Pki, direct: bool) -> None:
    by = responder(pki)
    by.encoding, by.direct = ocsp.OCSPResponderEncoding.HASH, direct
    response = ask(by, pki.lower, pki.upper)
    assert check(response, pki.lower, pki.upper).status is Revocation.GOOD


@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.SHA256(), hashes.SHA384()])
def test_every_hash_that_names_an_issuer_in_nvidias_tools_is_understood(
    pki: Pki, algorithm: hashes.HashAlgorithm
) -> None:
    response = ask(responder(pki), pki.lower, pki.upper, algorithm=algorithm)
    assert check(response, pki.lower, pki.upper).status is Revocation.GOOD


@pytest.mark.parametrize(
    ("reason", "spelt"),
    [
        (None, "revoked"),
        (x509.ReasonFlags.key_compromise, "revoked (keyCompromise)"),
        (x509.ReasonFlags.certificate_hold, "revoked (certificateHold)"),
    ],
)
def test_a_revocation_comes_with_its_reason(
    pki: Pki, reason: x509.ReasonFlags | None, spelt: str
) -> None:
    by = responder(pki)
    by.revoked[pki.lower.certificate.serial_number] = reason
    status = check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)
    assert status.status is Revocation.REVOKED
    assert str(status) == spelt


def test_an_unknown_certificate_is_neither_good_nor_revoked(pki: Pki) -> None:
    by = responder(pki)
    by.unknown.add(pki.lower.certificate.serial_number)
    status = check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)
    assert status.status is Revocation.UNKNOWN


# --- who may say it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "purposes",
    [(), (ExtendedKeyUsageOID.SERVER_AUTH,), (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)],
)
def test_a_certificate_for_anything_else_may_not_answer(
    pki: Pki, purposes: tuple[x509.ObjectIdentifier, ...]
) -> None:
    by = responder(pki)
    by.purposes = purposes
    with pytest.raises(Unauthentic, match=r"for OCSP signing|expected extended key usage"):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_a_key_that_may_not_sign_may_not_answer(pki: Pki) -> None:
    by = responder(pki)
    by.delegates[pki.upper.certificate.subject.public_bytes()] = pki.upper.issue(
        "OCSP responder",
        now=NOW,
        purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,),
        usage=key_usage(key_agreement=True),
    )
    with pytest.raises(Unauthentic, match="may sign"):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_a_delegate_of_another_ca_of_the_same_root_may_not_answer(pki: Pki) -> None:
    """OCSP for what `upper` issued is `upper`'s: not even its own issuer's delegate may."""
    by = responder(pki)
    name = pki.upper.certificate.subject.public_bytes()
    for foreign in (pki.root, pki.lower):
        by.delegates[name] = foreign.issue(
            "OCSP responder", now=NOW, purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,)
        )
        with pytest.raises(Unauthentic):
            check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_the_certificate_asked_about_may_not_answer_for_itself(pki: Pki) -> None:
    """NVIDIA's own verifier 2.7.3 would let it: it puts the subject among the trusted issuers."""
    by = responder(pki)
    by.delegates[pki.upper.certificate.subject.public_bytes()] = pki.lower.issue(
        "OCSP responder", now=NOW, purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,)
    )
    with pytest.raises(Unauthentic, match="expected an issuer that is pinned"):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_a_forged_issuer_of_the_same_name_may_not_answer(pki: Pki) -> None:
    forged = Issuer(
        x509.CertificateBuilder()
        .subject_name(pki.upper.certificate.subject)
        .issuer_name(pki.upper.certificate.subject)
        .public_key(pki.stranger.key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(pki.stranger.key, hashes.SHA384()),
        pki.stranger.key,
    )
    by = responder(pki)
    by.delegates[pki.upper.certificate.subject.public_bytes()] = forged.issue(
        "OCSP responder", now=NOW, purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,)
    )
    with pytest.raises(Unauthentic, match="expected the signature"):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_an_expired_delegate_may_not_answer(pki: Pki) -> None:
    by = responder(pki)
    by.delegates[pki.upper.certificate.subject.public_bytes()] = pki.upper.issue(
        "OCSP responder",
        now=NOW,
        purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,),
        lifetime=-HOUR,
    )
    with pytest.raises(Stale, match="OCSP responder"):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_another_key_than_the_delegates_signs_nothing(pki: Pki) -> None:
    by = responder(pki)
    by.forger = pki.stranger
    for by.direct in (False, True):
        with pytest.raises(Unauthentic, match="signature of its responder"):
            check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper)


def test_an_rsa_responder_may_answer() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ca = root("RSA CA", now=NOW, key=ec.generate_private_key(ec.SECP256R1()))
    subject = ca.issue("subject", now=NOW)
    by = OcspResponder([ca], now=lambda: NOW)
    by.delegates[ca.certificate.subject.public_bytes()] = ca.issue(
        "OCSP responder", now=NOW, key=key, purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,)
    )
    assert check(ask(by, subject, ca), subject, ca).status is Revocation.GOOD


# --- about what, and when -------------------------------------------------------------------------


def test_an_answer_about_another_certificate_is_unbound(pki: Pki) -> None:
    response = ask(responder(pki), pki.leaf, pki.lower)
    with pytest.raises(Unauthentic):
        check(response, pki.lower, pki.upper)  # not even from the right CA
    sibling = pki.upper.issue("sibling", now=NOW, ca=True)
    with pytest.raises(Unbound, match="about the certificate that was asked about"):
        check(ask(responder(pki), sibling, pki.upper), pki.lower, pki.upper)


def test_the_same_serial_number_under_another_issuer_is_another_certificate(pki: Pki) -> None:
    serial = pki.lower.certificate.serial_number
    twin = pki.root.issue("twin", now=NOW, serial=serial)
    # A statement about the root's certificate, signed by `upper`'s delegate.
    by = responder(pki)
    by.delegates[pki.root.certificate.subject.public_bytes()] = by.delegate_of(pki.upper)
    response = ask(by, twin, pki.root)
    with pytest.raises(Unbound):
        check(response, pki.lower, pki.upper)


@pytest.mark.parametrize("echoed", [None, bytes(32), NONCE[:31], NONCE + b"\0"])
def test_another_nonce_or_none_is_an_answer_to_another_question(
    pki: Pki, echoed: bytes | None
) -> None:
    by = responder(pki)
    by.echo = lambda _: echoed
    response = ask(by, pki.lower, pki.upper)
    with pytest.raises(Stale, match="nonce"):
        check(response, pki.lower, pki.upper)
    # Kept from an earlier exchange, its own times bound it.
    assert check(response, pki.lower, pki.upper, nonce=None).status is Revocation.GOOD


@pytest.mark.parametrize(
    ("at", "fits"),
    [
        (NOW - datetime.timedelta(minutes=6), False),
        (NOW - datetime.timedelta(minutes=4), True),
        (NOW + DAY - datetime.timedelta(seconds=1), True),
        (NOW + DAY, False),
        (NOW + 400 * DAY, False),
    ],
)
def test_an_answer_holds_from_this_update_to_next_update(
    pki: Pki, at: datetime.datetime, fits: bool
) -> None:
    response = ask(responder(pki), pki.lower, pki.upper)
    if fits:
        assert check(response, pki.lower, pki.upper, at=at).status is Revocation.GOOD
    else:
        with pytest.raises(Stale):
            check(response, pki.lower, pki.upper, at=at)


def test_an_answer_without_an_end_or_with_a_far_one_ends_at_the_greatest_age(pki: Pki) -> None:
    by = responder(pki)
    for by.lifetime in (None, 365 * DAY):
        response = ask(by, pki.lower, pki.upper)
        status = check(response, pki.lower, pki.upper, max_age=HOUR)
        assert status.expires == NOW + HOUR
        with pytest.raises(Stale, match="usable until"):
            check(response, pki.lower, pki.upper, at=NOW + HOUR, max_age=HOUR)


def test_a_revocation_does_not_lapse_but_a_hold_may_be_lifted(pki: Pki) -> None:
    by = responder(pki)
    serial = pki.lower.certificate.serial_number
    by.revoked[serial] = x509.ReasonFlags.key_compromise
    late = NOW + 30 * DAY
    status = check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper, at=late)
    assert status.status is Revocation.REVOKED
    by.revoked[serial] = x509.ReasonFlags.certificate_hold
    with pytest.raises(Stale):
        check(ask(by, pki.lower, pki.upper), pki.lower, pki.upper, at=late)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", list(ocsp.OCSPResponseStatus)[1:])
def test_an_unsigned_refusal_says_nothing(pki: Pki, status: ocsp.OCSPResponseStatus) -> None:
    refusal = ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER)
    with pytest.raises(EndorsementsUnavailable, match=status.name):
        check(refusal, pki.lower, pki.upper)


def test_garbage_is_malformed(pki: Pki) -> None:
    for junk in (b"", b"\x30", b"<html>", bytes(1000), bytes(65 << 10)):
        with pytest.raises(Malformed):
            check(junk, pki.lower, pki.upper)
    with pytest.raises(Malformed):
        check(ask(responder(pki), pki.lower, pki.upper) + b"\0", pki.lower, pki.upper)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_never_makes_an_answer_better(data: st.DataObject) -> None:
    pki, response = _fixed()
    bit = data.draw(st.integers(0, len(response) * 8 - 1))
    flipped = bytearray(response)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        status = check(bytes(flipped), pki.lower, pki.upper)
    except (Malformed, EvidenceError, EndorsementsUnavailable):
        return
    assert status.status is Revocation.REVOKED


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=300), where=st.integers(0, 5000))
def test_any_bytes_are_an_error_of_ours_or_an_answer(junk: bytes, where: int) -> None:
    pki, response = _fixed()
    for mixed in (junk, response[:where] + junk + response[where + len(junk) :]):
        try:
            assert check(mixed, pki.lower, pki.upper).status is Revocation.REVOKED
        except ApplianceError:
            continue


_FIXED: list[tuple[Pki, bytes]] = []


def _fixed() -> tuple[Pki, bytes]:
    """A hold, so that the flips above have something to improve; made once."""
    if not _FIXED:
        top = root("Device CA", now=NOW)
        upper = top.issue("Identity", now=NOW, ca=True)
        lower = upper.issue("Provisioner", now=NOW, ca=True)
        made = Pki(top, upper, lower, lower.issue("GSP", now=NOW), top)
        by = responder(made)
        by.revoked[lower.certificate.serial_number] = x509.ReasonFlags.key_compromise
        _FIXED.append((made, ask(by, lower, upper)))
    return _FIXED[0]


# --- findings -------------------------------------------------------------------------------------


def device_answers(pki: Pki, by: OcspResponder) -> list[bytes]:
    return [
        ask(by, pki.lower, pki.upper),
        ask(by, pki.upper, pki.root),
    ]


def findings(
    pki: Pki, answers: Sequence[bytes], policy: Literal["required", "warn"] = "warn"
) -> tuple[Finding, ...]:
    certificates, issuers = device_part(pki.path)
    return revocation_findings(certificates, answers, issuers, policy, NOW)


def test_a_devices_leaf_and_the_root_are_not_asked_about(pki: Pki) -> None:
    certificates, issuers = device_part(pki.path)
    assert certificates == (pki.lower.certificate, pki.upper.certificate)
    assert issuers == (pki.upper.certificate, pki.root.certificate)


def test_a_manifests_signer_is_asked_about(pki: Pki) -> None:
    certificates, issuers = signer_part(pki.path)
    assert certificates == pki.path[:3]
    assert issuers == pki.path[1:]


@pytest.mark.parametrize("policy", ["required", "warn"])
def test_good_answers_in_any_order_and_company_are_no_finding(
    pki: Pki, policy: Literal["required", "warn"]
) -> None:
    answers = device_answers(pki, responder(pki))
    company = [b"junk", *reversed(answers), ask(responder(pki), pki.leaf, pki.lower), *answers]
    assert findings(pki, company, policy) == ()


@pytest.mark.parametrize(
    ("policy", "tier"), [("required", Tier.CONTRAINDICATED), ("warn", Tier.WARNING)]
)
def test_a_missing_answer_is_what_the_policy_says(
    pki: Pki, policy: Literal["required", "warn"], tier: Tier
) -> None:
    first, _ = device_answers(pki, responder(pki))
    (finding,) = findings(pki, [first], policy)
    assert (finding.tier, finding.check, finding.got) == (
        tier,
        "nvidia_gpu.revocation",
        "no answer",
    )
    assert finding.expected == "good for CN=Identity"


@pytest.mark.parametrize(
    ("policy", "tier"), [("required", Tier.CONTRAINDICATED), ("warn", Tier.WARNING)]
)
def test_an_unknown_certificate_and_a_lapsed_answer_are_missing_answers(
    pki: Pki, policy: Literal["required", "warn"], tier: Tier
) -> None:
    by = responder(pki)
    by.unknown.add(pki.lower.certificate.serial_number)
    (unknown,) = findings(pki, device_answers(pki, by), policy)
    assert (unknown.tier, unknown.got) == (tier, "unknown")
    by = responder(pki)
    by.age = 2 * DAY
    lapsed = findings(pki, device_answers(pki, by), policy)
    assert [one.tier for one in lapsed] == [tier, tier]
    assert "usable until" in lapsed[0].got


@pytest.mark.parametrize("policy", ["required", "warn"])
@pytest.mark.parametrize(
    "reason", [x509.ReasonFlags.ca_compromise, x509.ReasonFlags.certificate_hold]
)
def test_a_revoked_certificate_is_contraindicated_under_every_policy(
    pki: Pki, policy: Literal["required", "warn"], reason: x509.ReasonFlags
) -> None:
    by = responder(pki)
    by.revoked[pki.upper.certificate.serial_number] = reason
    (finding,) = findings(pki, device_answers(pki, by), policy)
    assert finding.tier is Tier.CONTRAINDICATED
    assert reason.value in finding.got


def test_a_good_answer_does_not_outweigh_a_revocation(pki: Pki) -> None:
    by = responder(pki)
    good = device_answers(pki, by)
    by.revoked[pki.upper.certificate.serial_number] = x509.ReasonFlags.key_compromise
    bad = device_answers(pki, by)
    for answers in (good + bad, bad + good):
        assert [one.tier for one in findings(pki, answers)] == [Tier.CONTRAINDICATED]


def test_a_forged_good_answer_is_named_in_the_finding(pki: Pki) -> None:
    by = responder(pki)
    by.forger = pki.stranger
    for finding in findings(pki, device_answers(pki, by), "required"):
        assert finding.tier is Tier.CONTRAINDICATED
        assert "signature of its responder" in finding.got


def test_a_chain_and_issuers_of_different_lengths_are_a_defect(pki: Pki) -> None:
    with pytest.raises(ValueError, match="zip"):
        revocation_findings(pki.path, [], pki.path[1:], "warn", NOW)


# --- revocation lists -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ecdsa", "rsa-pss"])
def ark(request: pytest.FixtureRequest) -> Issuer:
    if request.param == "ecdsa":
        return root("ARK", now=NOW)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return root("ARK", now=NOW, key=key)


def test_a_list_that_does_not_name_a_certificate_says_good(ark: Issuer) -> None:
    ask_ = ark.issue("ASK", now=NOW, ca=True)
    crl = make_crl(ark, now=NOW, revoked={1: None})
    status = check_crl(crl, certificate=ask_.certificate, issuer=ark.certificate, at=NOW)
    assert status.status is Revocation.GOOD
    assert status.expires == NOW + 30 * DAY


@pytest.mark.parametrize("reason", [None, x509.ReasonFlags.ca_compromise])
def test_a_list_that_names_a_certificate_revokes_it(
    ark: Issuer, reason: x509.ReasonFlags | None
) -> None:
    ask_ = ark.issue("ASK", now=NOW, ca=True)
    crl = make_crl(ark, now=NOW, revoked={ask_.certificate.serial_number: reason})
    status = check_crl(crl, certificate=ask_.certificate, issuer=ark.certificate, at=NOW)
    assert status.status is Revocation.REVOKED
    assert status.reason == (None if reason is None else reason.value)


def test_a_list_by_another_or_out_of_its_time_says_nothing(ark: Issuer) -> None:
    ask_ = ark.issue("ASK", now=NOW, ca=True).certificate
    forger = root("ARK", now=NOW)
    with pytest.raises(Unauthentic):
        check_crl(make_crl(forger, now=NOW), certificate=ask_, issuer=ark.certificate, at=NOW)
    for at in (NOW - 2 * HOUR, NOW + 30 * DAY):
        with pytest.raises(Stale):
            check_crl(make_crl(ark, now=NOW), certificate=ask_, issuer=ark.certificate, at=at)
    # A revocation does not lapse, unless it may be lifted.
    for reason, status in ((None, Revocation.REVOKED), (x509.ReasonFlags.certificate_hold, None)):
        crl = make_crl(ark, now=NOW, revoked={ask_.serial_number: reason})
        later = NOW + 30 * DAY
        if status is None:
            with pytest.raises(Stale):
                check_crl(crl, certificate=ask_, issuer=ark.certificate, at=later)
        else:
            said = check_crl(crl, certificate=ask_, issuer=ark.certificate, at=later)
            assert said.status is status
    for junk in (b"", bytes(100), b"-----BEGIN X509 CRL-----"):
        with pytest.raises(Malformed):
            check_crl(junk, certificate=ask_, issuer=ark.certificate, at=NOW)


def test_a_partial_list_says_nothing(ark: Issuer) -> None:
    ask_ = ark.issue("ASK", now=NOW, ca=True).certificate
    partial = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    crl = make_crl(ark, now=NOW, extensions=(partial,))
    with pytest.raises(Unauthentic, match="complete list"):
        check_crl(crl, certificate=ask_, issuer=ark.certificate, at=NOW)


def test_a_key_that_may_not_sign_lists_says_nothing() -> None:
    ca = root("CA", now=NOW).issue("below", now=NOW, ca=True, usage=key_usage(key_cert_sign=True))
    subject = ca.issue("subject", now=NOW).certificate
    with pytest.raises(Unauthentic):
        check_crl(make_crl(ca, now=NOW), certificate=subject, issuer=ca.certificate, at=NOW)

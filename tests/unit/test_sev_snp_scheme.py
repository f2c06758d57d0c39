"""SEV-SNP evidence from AMD's root to the verdict.

The chains made here are shaped as AMD's are (tests/fakes/amd_evidence.py). Vendor-signed reports
exist for Milan and Genoa; no published one is from a Turin, so what is asserted about Turin's
reports rests on the specification and on one Turin certificate.
"""

from __future__ import annotations

import base64
import datetime
import json
import random
import re
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from appliance.config import Policy, TcbFloor
from appliance.endorsements.anchors import load_amd
from appliance.errors import ApplianceError, Malformed, Revoked, Stale, Unauthentic
from appliance.rats.model import AmdRoots, CpuClaims
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes.sev_snp import (
    SERIAL_WARNING,
    SevSnpClaims,
    authenticate,
    authenticate_report,
    load_vek,
    split_vek_pem,
)
from appliance.wire.evidence import CpuEvidence
from appliance.wire.sev_snp import GuestPolicy, SigningKey, Tcb
from tests.fakes.amd_evidence import (
    CHIP,
    END,
    NOW,
    START,
    TURIN_CHIP,
    Guest,
    amd_roots,
    authority,
    chip_key,
    der_integer,
    revocation_list,
    rsa_key,
    sign_report,
)
from tests.vectors_dir import VECTORS, needs_vectors

SNP = VECTORS / "snp"
DAY = datetime.timedelta(days=1)
ALL_ROOTS = tuple(amd_roots(product) for product in ("Milan", "Genoa", "Turin"))

EVERY_KIND = [
    Guest(product, version, vlek=vlek)
    for product in ("Milan", "Genoa", "Turin")
    for version in (2, 3, 4, 5)
    for vlek in (False, True)
]


def claims_of(guest: Guest, **endorsements: bytes) -> SevSnpClaims:
    return authenticate(guest.evidence(**endorsements), roots=ALL_ROOTS, at=NOW)


def pem_of(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


# What is authentic.


@pytest.mark.parametrize(
    "guest", EVERY_KIND, ids=lambda guest: f"{guest.product}-v{guest.version}-{guest.vlek}"
)
def test_a_report_under_the_root_of_its_product_is_authentic(guest: Guest) -> None:
    claims: CpuClaims = claims_of(guest)
    assert isinstance(claims, SevSnpClaims)
    assert claims.scheme == "sev_snp"
    assert claims.product == guest.product
    assert claims.report_data == b"d" * 64
    assert claims.measurements == {"measurement": (b"m" * 48).hex()}
    fmc = 2 if guest.product == "Turin" else None
    expected = Tcb(bootloader=4, tee=1, snp=24, microcode=219, fmc=fmc)
    assert claims.current_tcb == claims.reported_tcb == expected
    assert claims.committed_tcb == claims.launch_tcb == expected
    assert claims.csp_id == ("cloud.tests" if guest.vlek else None)
    assert not claims.revocation_checked


@pytest.mark.parametrize("guest", EVERY_KIND[::3], ids=lambda guest: guest.product)
def test_claims_are_json_with_every_number_in_its_range(guest: Guest) -> None:
    document = json.loads(json.dumps(claims_of(guest).to_json()))
    assert document["report_data"] == (b"d" * 64).hex()
    assert document["policy"]["value"] == "0x000000000003001f"
    assert document["policy"]["debug"] is False
    assert document["policy"]["abi_minor"] == 31
    assert document["platform_info"]["alias_check_complete"] is True
    assert document["reported_tcb"]["microcode"] == 219
    assert ("fmc" in document["reported_tcb"]) == (guest.product == "Turin")
    assert (document["cpuid"] is None) == (guest.version == 2)


def test_the_issuers_that_came_along_may_be_the_pinned_ones() -> None:
    roots = amd_roots("Milan")
    claims_of(Guest(), authorities=pem_of(roots.ask, roots.ark))
    claims_of(Guest(vlek=True), authorities=pem_of(roots.asvk))


def test_an_issuer_that_is_new_must_be_under_the_pinned_root() -> None:
    roots = amd_roots("Milan")
    reissued = authority(
        "SEV-Milan", "test SEV-Milan 2", 0x10002, issuer=roots.ark, issuer_key="test ARK-Milan"
    )
    guest = Guest()
    vek = reissue(guest, "test SEV-Milan 2")
    authenticate_report(
        guest.raw_report(), vek=vek, authorities=[reissued], crl=None, roots=ALL_ROOTS, at=NOW
    )
    with pytest.raises(Unauthentic, match="signature"):
        authenticate_report(
            guest.raw_report(), vek=vek, authorities=(), crl=None, roots=ALL_ROOTS, at=NOW
        )


def reissue(guest: Guest, issuer_key: str) -> x509.Certificate:
    """The guest's certificate, signed by another key of the same name."""
    from cryptography.hazmat.primitives import hashes

    from tests.fakes.amd_evidence import PSS, rsa_key

    vek = load_vek(guest.vek())
    builder = (
        x509.CertificateBuilder()
        .subject_name(vek.subject)
        .issuer_name(vek.issuer)
        .public_key(vek.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(END)
    )
    for extension in vek.extensions:
        builder = builder.add_extension(extension.value, critical=False)
    return builder.sign(rsa_key(issuer_key), hashes.SHA384(), rsa_padding=PSS)


@pytest.mark.parametrize("mask", [0, 0b10], ids=["mask_chip_key 0", "mask_chip_key 1"])
def test_a_masked_chip_is_not_compared(mask: int) -> None:
    guest = Guest(report={0x1A0: bytes(64), 0x048: bytes([mask])})
    assert claims_of(guest).report.chip_id == bytes(64)


def test_a_chip_identifier_may_be_wrapped_as_an_octet_string() -> None:
    claims_of(Guest(extensions={"4": b"\x04\x40" + CHIP}))
    claims_of(Guest("Turin", extensions={"4": b"\x04\x08" + TURIN_CHIP}))


# What is not, and why.

REFUSED: dict[str, tuple[Guest, str]] = {
    "bootloader": (Guest(extensions={"3.1": der_integer(5)}), "REPORTED_TCB"),
    "tee": (Guest(extensions={"3.2": der_integer(0)}), "REPORTED_TCB"),
    "snp": (Guest(extensions={"3.3": der_integer(23)}), "REPORTED_TCB"),
    "microcode": (Guest(extensions={"3.8": der_integer(220)}), "REPORTED_TCB"),
    "fmc": (Guest("Turin", extensions={"3.9": der_integer(3)}), "REPORTED_TCB"),
    "reported_tcb": (Guest(report={0x180: b"\x03"}), "REPORTED_TCB"),
    "no bootloader": (Guest(extensions={"3.1": None}), "3704.1.3.1"),
    "no tee": (Guest(extensions={"3.2": None}), "3704.1.3.2"),
    "no snp": (Guest(extensions={"3.3": None}), "3704.1.3.3"),
    "no microcode": (Guest(extensions={"3.8": None}), "3704.1.3.8"),
    "no fmc": (Guest("Turin", extensions={"3.9": None}), "3704.1.3.9"),
    "no product": (Guest(extensions={"2": None}), "3704.1.2"),
    "product is no text": (Guest(extensions={"2": b"\x0c\x05Milan"}), "3704.1.2"),
    "an svn of 256": (Guest(extensions={"3.1": der_integer(256)}), "3704.1.3.1"),
    "an svn below 0": (Guest(extensions={"3.1": b"\x02\x01\x84"}), "3704.1.3.1"),
    "an svn with more": (Guest(extensions={"3.1": b"\x02\x01\x04\x00"}), "3704.1.3.1"),
    "another product's name": (Guest(extensions={"2": b"\x16\x08Genoa-B1"}), "for Milan"),
    "another product's CPU": (Guest(report={0x188: bytes([0x19, 0x11, 1])}), "CPU of Milan"),
    "a CPU that is not known": (Guest(report={0x188: bytes([0x1B, 0, 0])}), "CPU of Milan"),
    "another chip": (Guest(report={0x1A0: b"\xff"}), "CHIP_ID"),
    "another Turin": (Guest("Turin", report={0x1A0: b"\xff"}), "CHIP_ID"),
    "a Turin with more": (Guest("Turin", report={0x1A8: b"\xff"}), "CHIP_ID"),
    "a chip of 8 bytes": (Guest(extensions={"4": TURIN_CHIP}), "chip of 64 bytes"),
    "a Turin of 64 bytes": (Guest("Turin", extensions={"4": CHIP}), "chip of 8 bytes"),
    "neither chip nor cloud": (Guest(extensions={"4": None}), "either a chip or a cloud"),
    "chip and cloud": (Guest(extensions={"5": b"\x16\x01x"}), "either a chip or a cloud"),
    "no cloud": (Guest(vlek=True, extensions={"5": None}), "either a chip or a cloud"),
    "says VLEK": (Guest(report={0x048: bytes([1 << 2])}), "certificate of a VLEK"),
    "says VCEK": (Guest(vlek=True, report={0x048: b"\0"}), "certificate of a VCEK"),
    "says unsigned": (Guest(report={0x048: bytes([7 << 2])}), "SIGNING_KEY"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_certificate_about_something_else_is_refused(name: str) -> None:
    guest, message = REFUSED[name]
    with pytest.raises(Unauthentic, match=re.escape(message)):
        claims_of(guest)


def test_the_root_of_another_product_line_is_not_enough() -> None:
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate(Guest("Milan").evidence(), roots=(amd_roots("Genoa"),), at=NOW)
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate(Guest("Milan").evidence(), roots=(), at=NOW)


def test_another_root_of_the_same_name_is_not_enough() -> None:
    guest = Guest(realm="somebody else's")
    with pytest.raises(Unauthentic, match="signature"):
        claims_of(guest)
    with pytest.raises(Unauthentic, match="authorities"):
        claims_of(guest, authorities=pem_of(guest.roots.ask, guest.roots.ark))


def test_a_foreign_issuer_in_the_evidence_is_refused_even_where_it_is_not_needed() -> None:
    foreign = amd_roots("Milan", "somebody else's").ask
    with pytest.raises(Unauthentic, match="authorities"):
        claims_of(Guest(), authorities=pem_of(foreign))


def test_a_chip_cannot_issue() -> None:
    """A VEK's certificate in the place of an issuer: under the root, and no CA."""
    guest = Guest()
    with pytest.raises(Unauthentic, match="authorities"):
        authenticate_report(
            guest.raw_report(),
            vek=load_vek(guest.vek()),
            authorities=[load_vek(guest.vek())],
            crl=None,
            roots=ALL_ROOTS,
            at=NOW,
        )


def test_a_signature_by_another_chip_is_refused() -> None:
    guest = Guest()
    report = sign_report(guest.raw_report(), chip_key("another chip"))
    with pytest.raises(Unauthentic, match="signature by its VEK"):
        authenticate_report(
            report, vek=load_vek(guest.vek()), authorities=(), crl=None, roots=ALL_ROOTS, at=NOW
        )


@pytest.mark.parametrize("component", [0, 2**384 - 1])
def test_a_signature_outside_the_curve_is_refused(component: int) -> None:
    report = bytearray(Guest().raw_report())
    report[0x2A0 : 0x2A0 + 72] = component.to_bytes(72, "little")
    with pytest.raises(Unauthentic, match="signature by its VEK"):
        authenticate_report(
            bytes(report),
            vek=load_vek(Guest().vek()),
            authorities=(),
            crl=None,
            roots=ALL_ROOTS,
            at=NOW,
        )


def test_a_key_on_another_curve_is_refused() -> None:
    roots = amd_roots("Milan")
    from cryptography.hazmat.primitives import hashes

    from tests.fakes.amd_evidence import PSS, rsa_key

    small = ec.generate_private_key(ec.SECP256R1())
    vek = (
        x509.CertificateBuilder()
        .subject_name(roots.ask.subject)
        .issuer_name(roots.ask.subject)
        .public_key(small.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(END)
        .sign(rsa_key("test SEV-Milan"), hashes.SHA384(), rsa_padding=PSS)
    )
    with pytest.raises(Unauthentic, match="P-384"):
        authenticate_report(
            Guest().raw_report(), vek=vek, authorities=(), crl=None, roots=ALL_ROOTS, at=NOW
        )


def test_evidence_without_the_certificate_of_its_key_is_refused() -> None:
    evidence = Guest().evidence()
    del evidence.endorsements["vek"]  # type: ignore[attr-defined]
    with pytest.raises(Unauthentic, match="vek"):
        authenticate(evidence, roots=ALL_ROOTS, at=NOW)


def test_a_certificate_that_does_not_parse_is_malformed() -> None:
    with pytest.raises(Malformed, match="vek"):
        authenticate(Guest().evidence(vek=b"0"), roots=ALL_ROOTS, at=NOW)
    with pytest.raises(Malformed, match="authorities"):
        claims_of(Guest(), authorities=b"-----BEGIN CERTIFICATE-----\n")


@pytest.mark.parametrize("at", [START - DAY, END + DAY])
def test_outside_the_validity_of_its_certificates_evidence_is_stale(at: datetime.datetime) -> None:
    with pytest.raises(Stale):
        authenticate(Guest().evidence(), roots=ALL_ROOTS, at=at)


def test_an_expired_vlek_is_stale() -> None:
    guest = Guest(vlek=True, start=NOW - 400 * DAY, end=NOW - DAY)
    with pytest.raises(Stale, match="SEV-VLEK"):
        claims_of(guest)


# Revocation.


@pytest.mark.parametrize("vlek", [False, True])
def test_a_list_that_does_not_name_the_issuer_is_remembered(vlek: bool) -> None:
    guest = Guest(vlek=vlek)
    crl = revocation_list(guest.roots, [0x777])
    assert claims_of(guest, crl=crl).revocation_checked


@pytest.mark.parametrize(("vlek", "serial"), [(False, 0x10001), (True, 0x10101)])
def test_an_issuer_that_amd_took_back_is_revoked(vlek: bool, serial: int) -> None:
    guest = Guest(vlek=vlek)
    with pytest.raises(Revoked, match="SEV-"):
        claims_of(guest, crl=revocation_list(guest.roots, [serial]))


def test_the_serial_number_of_all_chips_revokes_none() -> None:
    """Every VEK has serial number 0: a list that names it would name every chip of AMD's."""
    guest = Guest()
    assert load_serial(guest.vek()) == 0
    assert claims_of(guest, crl=revocation_list(guest.roots, [1])).revocation_checked


def load_serial(der: bytes) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_vek(der).serial_number


def test_a_list_out_of_its_time_does_not_count_and_takes_nothing_away() -> None:
    """As an OCSP answer: who could hand out an old one could as well hand out none."""
    roots = amd_roots("Milan")
    lapsed, early = (
        revocation_list(roots, end=NOW - DAY),
        revocation_list(roots, start=NOW + DAY),
    )
    rules = {Tier.WARNING: Policy(), Tier.CONTRAINDICATED: Policy(revocation="required")}
    for crl in (lapsed, early):
        claims = claims_of(Guest(), crl=crl)
        assert not claims.revocation_checked
        for tier, policy in rules.items():
            result = appraise_sev_snp(claims, policy, reference=None, report_data=None)
            (found,) = [one for one in result.findings if one.check == "sev_snp.revocation"]
            assert found.tier is tier
            assert found.got.startswith("CRL: valid from")


def test_an_old_list_still_revokes() -> None:
    roots = amd_roots("Milan")
    with pytest.raises(Revoked):
        claims_of(Guest(), crl=revocation_list(roots, [0x10001], end=NOW - DAY))


def test_a_list_is_amds_own_and_well_formed() -> None:
    roots = amd_roots("Milan")
    with pytest.raises(Unauthentic, match="CRL"):
        claims_of(Guest(), crl=revocation_list(roots, realm="test SEV-Milan"))
    with pytest.raises(Unauthentic, match="CRL"):
        claims_of(Guest(), crl=revocation_list(amd_roots("Genoa")))
    with pytest.raises(Unauthentic, match="CRL"):
        claims_of(Guest(), crl=revocation_list(roots, name=roots.ask.subject))
    for junk in (b"", b"0", b"\0" * ((1 << 20) + 1)):
        with pytest.raises(Malformed, match="CRL"):
            claims_of(Guest(), crl=junk)


@pytest.mark.parametrize("version", [0, 2, 3, 0x7F, 0x80, 0xFF])
def test_a_revocation_list_of_another_version_is_malformed(version: int) -> None:
    """`cryptography` says so with `InvalidVersion`, which is no ValueError."""
    guest = Guest()
    whole = bytearray(revocation_list(guest.roots))
    place = whole.index(b"\x02\x01\x01")  # TBSCertList begins with its version, v2
    whole[place + 2] = version
    with pytest.raises(Malformed, match="CRL"):
        claims_of(guest, crl=bytes(whole))


@pytest.mark.parametrize("seed", range(4))
def test_an_altered_revocation_list_is_refused_and_never_a_defect(seed: int) -> None:
    source, guest = random.Random(seed), Guest()
    vek, whole = load_vek(guest.vek()), revocation_list(guest.roots, [0x777])
    for _ in range(200):
        altered = bytearray(whole)
        place = source.randrange(len(altered))
        altered[place] ^= 1 << source.randrange(8)
        with pytest.raises((Malformed, Unauthentic)):
            authenticate_report(
                guest.raw_report(),
                vek=vek,
                authorities=(),
                crl=bytes(altered),
                roots=ALL_ROOTS,
                at=NOW,
            )


@pytest.mark.parametrize(
    ("algorithm", "extension"),
    [
        (hashes.SHA384(), x509.DeltaCRLIndicator(1)),
        (hashes.SHA224(), None),
    ],
)
def test_a_partial_or_weakly_signed_revocation_list_is_refused(
    algorithm: hashes.SHA224 | hashes.SHA384, extension: x509.ExtensionType | None
) -> None:
    guest = Guest()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(guest.roots.ark.subject)
        .last_update(START)
        .next_update(END)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    signed = builder.sign(rsa_key(f"{guest.realm} ARK-{guest.product}"), algorithm)
    with pytest.raises(Unauthentic, match="CRL"):
        claims_of(guest, crl=signed.public_bytes(Encoding.DER))


# The serial number 0.


def test_a_certificate_with_serial_number_0_loads_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_vek(Guest().vek()).subject.rfc4514_string().startswith("CN=SEV-VCEK")


def test_the_warning_is_silenced_for_one_certificate_only() -> None:
    before = list(warnings.filters)
    load_vek(Guest().vek())
    assert warnings.filters == before


def test_cryptography_still_loads_serial_number_0_and_only_warns() -> None:
    """When this fails, `cryptography` has changed its mind: before its upper bound is raised,
    load_vek needs a way around `x509.load_der_x509_certificate`."""
    with pytest.warns(CryptographyDeprecationWarning, match=SERIAL_WARNING):
        x509.load_der_x509_certificate(Guest().vek())


def test_a_pem_bundle_is_split_into_key_and_issuers() -> None:
    roots, der = amd_roots("Milan"), Guest().vek()
    vek, rest = split_vek_pem(pem_of(load_vek(der), roots.ask, roots.ark))
    assert vek == der
    assert rest == pem_of(roots.ask, roots.ark)
    assert split_vek_pem(pem_of(load_vek(der))) == (der, b"")
    with pytest.raises(Malformed):
        split_vek_pem(b"")


# No byte counts for nothing.


def test_a_flipped_bit_is_never_authentic() -> None:
    guest = Guest(version=5)
    report, vek, roots = guest.raw_report(), load_vek(guest.vek()), (guest.roots,)
    source = random.Random(1184)
    for bit in source.sample(range(len(report) * 8), 400):
        changed = bytearray(report)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Malformed, Unauthentic)):
            authenticate_report(
                bytes(changed), vek=vek, authorities=(), crl=None, roots=roots, at=NOW
            )


def test_a_flipped_bit_in_the_certificate_is_never_authentic() -> None:
    guest = Guest()
    der, report = guest.vek(), guest.raw_report()
    source = random.Random(1360)
    for bit in source.sample(range(len(der) * 8), 300):
        changed = bytearray(der)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ApplianceError):
            authenticate_report(
                report,
                vek=load_vek(bytes(changed)),
                authorities=(),
                crl=None,
                roots=ALL_ROOTS,
                at=NOW,
            )


# Policy.

STRICT = Policy(minimum_tcb=TcbFloor(bootloader=4, tee=1, snp=24, microcode=219))
MEASUREMENT = (b"m" * 48).hex()


def appraised(guest: Guest, policy: Policy = STRICT) -> AttestationResult:
    claims = claims_of(guest, crl=revocation_list(guest.roots))
    return appraise_sev_snp(
        claims, policy, reference=frozenset({MEASUREMENT}), report_data=b"d" * 64
    )


@pytest.mark.parametrize("guest", EVERY_KIND[::5], ids=lambda guest: guest.product)
def test_what_the_policy_asks_for_is_affirmed(guest: Guest) -> None:
    result = appraised(guest)
    assert result.verdict is Tier.AFFIRMING, result.findings
    assert result.claims["scheme"] == "sev_snp"


def policy_bit(bit: GuestPolicy | int) -> dict[int, bytes]:
    return {0x008: (0x3001F | bit).to_bytes(8, "little")}


FINDINGS: dict[str, tuple[Guest, Policy, Tier]] = {
    "sev_snp.debug": (Guest(report=policy_bit(GuestPolicy.DEBUG)), STRICT, Tier.CONTRAINDICATED),
    "sev_snp.migrate_ma": (
        Guest(report=policy_bit(GuestPolicy.MIGRATE_MA)),
        STRICT,
        Tier.CONTRAINDICATED,
    ),
    "sev_snp.policy": (Guest(report=policy_bit(1 << 26)), STRICT, Tier.CONTRAINDICATED),
    "sev_snp.vmpl": (Guest(report={0x030: b"\1"}), STRICT, Tier.CONTRAINDICATED),
    "sev_snp.reported_tcb": (
        Guest(
            svns=(4, 1, 23, 219),
            report={o: bytes([4, 1, 0, 0, 0, 0, 24, 219]) for o in (0x1E0, 0x1F0)},
        ),
        STRICT,
        Tier.CONTRAINDICATED,
    ),
    "sev_snp.committed_tcb": (Guest(report={0x1E6: b"\x17"}), STRICT, Tier.WARNING),
    "sev_snp.launch_tcb": (Guest(report={0x1F7: b"\1"}), STRICT, Tier.WARNING),
    "sev_snp.report_data": (Guest(report={0x08F: b"x"}), STRICT, Tier.CONTRAINDICATED),
    "sev_snp.measurement": (Guest(report={0x090: b"x"}), STRICT, Tier.CONTRAINDICATED),
}


@pytest.mark.parametrize("check", FINDINGS)
def test_one_thing_wrong_is_one_finding(check: str) -> None:
    guest, policy, tier = FINDINGS[check]
    result = appraised(guest, policy)
    assert [one.check for one in result.findings] == [check]
    assert result.verdict is tier
    assert result.findings[0].advice


def test_the_floor_of_fmc_is_for_turin_only() -> None:
    policy = Policy(minimum_tcb=TcbFloor(fmc=3))
    assert appraised(Guest("Milan"), policy).verdict is Tier.AFFIRMING
    turin = appraised(Guest("Turin"), policy)
    assert "fmc >= 3" in turin.findings[0].expected
    assert turin.verdict is Tier.CONTRAINDICATED


@pytest.mark.parametrize("host_asked", [b"\1\0\0\0", b"\xff\xff\xff\xff"])
def test_levels_are_those_that_the_policy_lists(host_asked: bytes) -> None:
    guest = Guest(report={0x030: host_asked})
    assert appraised(guest, Policy(vmpl=(0, 1))).verdict is (
        Tier.AFFIRMING if host_asked[1] == 0 else Tier.CONTRAINDICATED
    )


@pytest.mark.parametrize(
    ("rule", "tier"), [("warn", Tier.WARNING), ("required", Tier.CONTRAINDICATED)]
)
def test_a_missing_revocation_list_is_what_the_policy_makes_it(rule: str, tier: Tier) -> None:
    policy = Policy(revocation="required" if rule == "required" else "warn")
    result = appraise_sev_snp(
        claims_of(Guest()), policy, reference=frozenset({MEASUREMENT}), report_data=None
    )
    assert [one.check for one in result.findings] == ["sev_snp.revocation"]
    assert result.verdict is tier


def test_without_reference_values_the_best_verdict_is_a_warning() -> None:
    claims = claims_of(Guest(), crl=revocation_list(Guest().roots))
    result = appraise_sev_snp(claims, STRICT, reference=None, report_data=None)
    assert result.verdict is Tier.WARNING
    assert [one.got for one in result.findings] == ["authentic, not compared"]
    nothing = appraise_sev_snp(claims, STRICT, reference=frozenset(), report_data=None)
    assert nothing.verdict is Tier.CONTRAINDICATED


def test_a_short_binding_stands_for_itself_and_zeros() -> None:
    guest = Guest(report={0x050: b"d" * 32 + bytes(32)})
    claims = claims_of(guest, crl=revocation_list(guest.roots))
    reference = frozenset({MEASUREMENT})

    def verdict(expected: bytes) -> Tier:
        return appraise_sev_snp(claims, STRICT, reference=reference, report_data=expected).verdict

    assert verdict(b"d" * 32) is verdict(b"d" * 32 + bytes(32)) is Tier.AFFIRMING
    assert verdict(b"d" * 31) is verdict(b"d" * 64) is Tier.CONTRAINDICATED
    assert verdict(b"d" * 32 + bytes(33)) is Tier.CONTRAINDICATED
    assert verdict(b"") is Tier.CONTRAINDICATED


# What AMD signed.

THEN = datetime.datetime(2025, 11, 1, tzinfo=datetime.UTC)
TODAY = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


def real(report: str, vek: str, at: datetime.datetime = TODAY) -> SevSnpClaims:
    return authenticate_report(
        (SNP / report).read_bytes(),
        vek=load_vek((SNP / vek).read_bytes()),
        authorities=(),
        crl=None,
        roots=load_amd(),
        at=at,
    )


@needs_vectors
def test_real_milan_reports_are_authentic() -> None:
    plain = real("ars_test-report.bin", "ars_test-vcek.der")
    assert (plain.product, plain.report.version) == ("Milan", 2)
    assert plain.reported_tcb == Tcb(bootloader=3, tee=0, snp=8, microcode=115)
    result = appraise_sev_snp(plain, Policy(), reference=None, report_data=None)
    assert result.verdict is Tier.WARNING


@needs_vectors
def test_a_real_report_of_a_debuggable_guest_is_authentic_and_contraindicated() -> None:
    claims = real("google_milan_report.bin", "google_milan_vcek.der")
    reference = frozenset({claims.measurements["measurement"]})
    result = appraise_sev_snp(claims, Policy(), reference=reference, report_data=claims.report_data)
    assert "sev_snp.debug" in [one.check for one in result.findings]
    assert result.verdict is Tier.CONTRAINDICATED


def azure(name: str) -> tuple[bytes, bytes, bytes]:
    """Report, VEK (DER) and issuers (PEM) of one machine of Azure's; the report begins 32 bytes
    into what the hypervisor stored."""
    if name == "hcl-report":
        stored = (VECTORS / "azure" / "trustee_snp_hcl-report.bin").read_bytes()
        vek, authorities = split_vek_pem((VECTORS / "azure" / "trustee_snp_vcek.pem").read_bytes())
        return stored[32:1216], vek, authorities
    document = json.loads((VECTORS / "azure" / name).read_bytes())
    document = document.get("evidence", document)
    if "report" in document:
        return bytes(document["report"])[32:1216], *split_vek_pem(document["vcek"].encode())
    stored, vek = (_unpadded(document[key]) for key in ("hcl_report", "vcek"))
    return stored[32:1216], vek, b""


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@needs_vectors
@pytest.mark.parametrize(
    ("name", "product", "version", "snp"),
    [
        ("trustee_snp_evidence-genoa.json", "Genoa", 3, 23),
        ("trustee_snp_evidence-v1.json", "Milan", 3, 24),
        ("trustee_snp_evidence-v2.json", "Milan", 3, 24),
        ("ars_snp_milan-v3-attestation.json", "Milan", 3, 24),
        ("hcl-report", "Milan", 2, 8),
    ],
)
def test_real_reports_of_azure_are_authentic(
    name: str, product: str, version: int, snp: int
) -> None:
    report, vek, authorities = azure(name)
    evidence = CpuEvidence(
        "sev_snp",
        {"report": report},
        {"vek": vek} | ({"authorities": authorities} if authorities else {}),
    )
    claims = authenticate(evidence, roots=load_amd(), at=TODAY)
    assert (claims.product, claims.report.version) == (product, version)
    assert claims.reported_tcb.snp == snp
    result = appraise_sev_snp(claims, Policy(), reference=None, report_data=claims.report_data)
    assert result.verdict is Tier.WARNING
    others = tuple(one for one in load_amd() if one.product != product)
    with pytest.raises(Unauthentic):
        authenticate(evidence, roots=others, at=TODAY)


@needs_vectors
def test_a_real_vlek_holds_while_it_is_valid() -> None:
    claims = real("ars_test-vlek-report.bin", "ars_test-vlek.der", THEN)
    assert claims.csp_id == "CN=cc-us-east-2.amazonaws.com"
    assert claims.report.signing_key is SigningKey.VLEK
    assert claims.report.cpuid == (0x19, 0x01, 0x01)
    with pytest.raises(Stale, match="SEV-VLEK"):
        real("ars_test-vlek-report.bin", "ars_test-vlek.der", TODAY)


@needs_vectors
@pytest.mark.parametrize(
    ("report", "vek"),
    [
        ("ars_test-report.bin", "ars_test-vcek-invalid-new.der"),
        ("ars_test-report.bin", "google_milan_vcek.der"),
        ("ars_test-report.bin", "virtee_vcek_turin.der"),
        ("google_milan_report.bin", "ars_test-vcek.der"),
        ("ars_test-vlek-report.bin", "ars_test-vcek.der"),
    ],
)
def test_a_real_report_under_another_certificate_is_refused(report: str, vek: str) -> None:
    with pytest.raises(Unauthentic):
        real(report, vek, THEN)


@needs_vectors
@pytest.mark.parametrize(
    ("report", "vek"),
    [
        ("ars_test-report.bin", "ars_test-vcek.der"),
        ("ars_test-vlek-report.bin", "ars_test-vlek.der"),
    ],
)
def test_the_same_report_under_the_roots_of_other_products_is_refused(
    report: str, vek: str
) -> None:
    others = tuple(one for one in load_amd() if one.product != "Milan")
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate_report(
            (SNP / report).read_bytes(),
            vek=load_vek((SNP / vek).read_bytes()),
            authorities=(),
            crl=None,
            roots=others,
            at=THEN,
        )


@needs_vectors
@pytest.mark.parametrize("bundle", sorted(SNP.glob("*ask_ark*.pem")), ids=lambda path: path.name)
def test_what_amd_hands_out_as_issuers_is_accepted_along_with_evidence(bundle: Path) -> None:
    claims = authenticate_report(
        (SNP / "ars_test-report.bin").read_bytes(),
        vek=load_vek((SNP / "ars_test-vcek.der").read_bytes()),
        authorities=x509.load_pem_x509_certificates(bundle.read_bytes()),
        crl=None,
        roots=load_amd(),
        at=TODAY,
    )
    assert claims.product == "Milan"


@needs_vectors
def test_the_one_real_turin_certificate_is_amds_and_names_its_firmware() -> None:
    vek = load_vek((SNP / "virtee_vcek_turin.der").read_bytes())
    turin = next(one for one in load_amd() if one.product == "Turin")
    report = Guest("Turin", 5, svns=(0, 0, 0, 9), fmc=0).raw_report()
    with pytest.raises(Unauthentic, match="signature by its VEK"):  # its path and key are good
        authenticate_report(report, vek=vek, authorities=(), crl=None, roots=(turin,), at=TODAY)


@needs_vectors
def test_a_flipped_bit_in_a_real_report_is_never_authentic() -> None:
    report = (SNP / "ars_test-report.bin").read_bytes()
    vek = load_vek((SNP / "ars_test-vcek.der").read_bytes())
    source = random.Random(2)
    for bit in source.sample(range(len(report) * 8), 300):
        changed = bytearray(report)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Malformed, Unauthentic)):
            authenticate_report(
                bytes(changed), vek=vek, authorities=(), crl=None, roots=load_milan(), at=TODAY
            )


def load_milan() -> tuple[AmdRoots, ...]:
    return load_amd()[:1]

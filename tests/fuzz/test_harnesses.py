"""The harnesses work: their seeds are accepted, and some thousand mutations find nothing.

This needs no atheris, so that a harness which no longer fits what it tests fails here.
"""

from __future__ import annotations

import random
import time
import warnings
import zlib

import pytest

from appliance.errors import EvidenceError, Malformed
from tests.fuzz.harnesses import HARNESSES, Harness

ONE_S = 0.05
MOST = 200
NEVER_ACCEPTED = {"azure_vtpm_unrooted"}
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x5B, 0x7B)

BLOBS = 10_000
WHOLE_SCHEMES = ("_scheme", "_signed", "_unrooted", "tpm2_event_log")
"""Ends of the names of those that ask more than one parser; each of these has one of its own."""

all_harnesses = pytest.mark.parametrize(
    "harness", HARNESSES.values(), ids=lambda harness: harness.name
)


def mutated(source: random.Random, seed: bytes, other: bytes) -> bytes:
    """A seed with one to four things done to it."""
    data = bytearray(seed)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        match source.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << source.randrange(8)
            case 1 if data:
                data[at % len(data)] = source.choice(INTERESTING)
            case 2:
                del data[at : at + source.randint(1, 64)]
            case 3:
                data[at:at] = source.randbytes(source.randint(1, 16))
            case 4:
                data[at:at] = data[at : at + source.randint(1, 256)]
            case _:
                data = data[:at] + bytearray(other[at:])
    return bytes(data)


@all_harnesses
def test_mutations_find_nothing(harness: Harness) -> None:
    source = random.Random(zlib.crc32(harness.name.encode()))
    seeds = harness.seeds()
    end = time.monotonic() + ONE_S
    for _ in range(MOST):
        harness.run(mutated(source, source.choice(seeds), source.choice(seeds)))
        if time.monotonic() > end:
            break


@pytest.mark.parametrize(
    "harness",
    [one for one in HARNESSES.values() if not one.name.endswith(WHOLE_SCHEMES)],
    ids=lambda harness: harness.name,
)
def test_ten_thousand_random_blobs_raise_nothing_that_is_not_said(harness: Harness) -> None:
    """Half of them begin as something genuine does, and so come further than its first bytes."""
    source = random.Random(zlib.crc32(harness.name.encode()))
    seeds = harness.seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(BLOBS):
            begin = source.choice(seeds)[: source.randrange(48)] if number % 2 else b""
            harness.run(begin + source.randbytes(source.randrange(256)))


@all_harnesses
def test_the_first_seed_is_accepted(harness: Harness) -> None:
    """A harness whose every input is refused at the first byte would find nothing ever."""
    seeds = harness.seeds()
    if harness.name in NEVER_ACCEPTED:
        with pytest.raises(EvidenceError):
            harness.accept(seeds[0])
    else:
        harness.accept(seeds[0])
    for seed in seeds:
        harness.run(seed)


def test_a_harness_lets_nothing_else_through() -> None:
    """The check itself: what is not expected of a parser comes out of its harness."""
    spdm = HARNESSES["spdm"]
    with pytest.raises(Malformed):
        spdm.accept(b"")
    spdm.run(b"")
    with pytest.raises(TypeError):
        spdm.run(None)  # type: ignore[arg-type]


def test_no_harness_warns() -> None:
    """AMD's serial number 0 makes `cryptography` warn unless `load_vek` reads the certificate."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HARNESSES["sev_snp_vek"].run(HARNESSES["sev_snp_vek"].seeds()[0])

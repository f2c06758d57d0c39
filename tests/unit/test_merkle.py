"""The Merkle tree of an epoch: RFC 9162's definition, and paths that cannot lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.commitments import (
    Inclusion,
    completion_commitment,
    epoch_nonce,
    generate_commitment,
    gpu_evidence_digest,
    labelled_hash,
    parse_inclusion,
    report_commitment,
    request_commitment,
)
from appliance.wire.evidence import GpuEvidence
from appliance.wire.merkle import MAX_LEAVES, MerkleTree, leaf_hash, node_hash, path_length, root_of

SIZES = st.integers(min_value=1, max_value=200)


def leaves(size: int) -> list[bytes]:
    return [f"leaf {number}".encode() for number in range(size)]


def defined_root(items: list[bytes]) -> bytes:
    """MTH of RFC 9162 section 2.1.1, as it is written there."""
    if len(items) == 1:
        return leaf_hash(items[0])
    split = 1 << (len(items) - 1).bit_length() - 1
    return node_hash(defined_root(items[:split]), defined_root(items[split:]))


def defined_path(index: int, items: list[bytes]) -> list[bytes]:
    """PATH of RFC 9162 section 2.1.3.1, as it is written there."""
    if len(items) == 1:
        return []
    split = 1 << (len(items) - 1).bit_length() - 1
    if index < split:
        return [*defined_path(index, items[:split]), defined_root(items[split:])]
    return [*defined_path(index - split, items[split:]), defined_root(items[:split])]


@given(SIZES, st.data())
def test_root_and_paths_are_those_of_the_definition(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    items = leaves(size)
    tree = MerkleTree.over(items)
    assert tree.root == defined_root(items)
    assert list(tree.path(index)) == defined_path(index, items)
    assert len(tree.path(index)) == path_length(index, size)
    assert root_of(items[index], index, size, tree.path(index)) == tree.root


@given(SIZES, st.data())
def test_no_other_leaf_index_size_or_path_leads_to_the_root(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    items = leaves(size)
    tree = MerkleTree.over(items)
    path = tree.path(index)
    assert root_of(b"another", index, size, path) != tree.root
    other = data.draw(st.integers(0, size))
    if other != index:
        assert root_of(items[index], other, size, path) != tree.root
    assert root_of(items[index], index, size, (*path, bytes(32))) is None
    if path:
        assert root_of(items[index], index, size, path[:-1]) is None
        cut = data.draw(st.integers(0, len(path) - 1))
        swapped = [bytes(32) if i == cut else item for i, item in enumerate(path)]
        assert root_of(items[index], index, size, swapped) != tree.root
        short = [item[:-1] if i == cut else item for i, item in enumerate(path)]
        assert root_of(items[index], index, size, short) is None


def test_a_tree_is_bounded() -> None:
    assert MerkleTree.over([b""] * MAX_LEAVES).size == MAX_LEAVES
    for size in (0, MAX_LEAVES + 1):
        with pytest.raises(ValueError, match="expected 1 to 4096"):
            MerkleTree.over([b""] * size)
    with pytest.raises(IndexError):
        MerkleTree.over([b""]).path(1)
    assert root_of(b"", 0, MAX_LEAVES + 1, [bytes(32)] * 13) is None
    assert root_of(b"", -1, 1, []) is None


def test_a_tree_of_one_has_the_leaf_as_root() -> None:
    assert MerkleTree.over([b"x"]).root == leaf_hash(b"x")
    assert MerkleTree.over([b"x"]).path(0) == ()


DIGEST = bytes(range(32))


def test_every_commitment_has_its_own_label() -> None:
    request = request_commitment(
        "id", "/v1/chat/completions", client_nonce=None, body_sha256=DIGEST, blind=DIGEST
    )
    nonced = request_commitment(
        "id", "/v1/chat/completions", client_nonce=DIGEST, body_sha256=DIGEST, blind=DIGEST
    )
    found = {
        request,
        nonced,
        report_commitment(None),
        report_commitment(DIGEST),
        generate_commitment(DIGEST),
        completion_commitment({}),
        epoch_nonce(DIGEST, 1, DIGEST),
        gpu_evidence_digest([]),
    }
    assert len(found) == 8
    assert {len(one) for one in found} == {32}


def test_labelled_hashes_are_worked_out_by_hand() -> None:
    import hashlib

    assert labelled_hash("l", b"a", b"b") == hashlib.sha256(b"l\x00ab").digest()
    assert generate_commitment(DIGEST) == hashlib.sha256(b"dcv/1 generate\x00" + DIGEST).digest()
    assert report_commitment(None) == hashlib.sha256(b"dcv/1 report\x00\x00").digest()
    assert request_commitment(
        "r1", "/e", client_nonce=DIGEST, body_sha256=bytes(32), blind=DIGEST
    ) == (
        hashlib.sha256(
            b"dcv/1 request\x00\x00\x02r1\x00\x02/e\x01" + DIGEST + bytes(32) + DIGEST
        ).digest()
    )
    gpu = GpuEvidence("nvidia_gpu", b"rep", b"chain")
    assert (
        gpu_evidence_digest([gpu])
        == hashlib.sha256(
            b"dcv/1 gpu evidence\x00\x00\x00\x00\x01\x00\x00\x00\x03rep\x00\x00\x00\x05chain"
        ).digest()
    )


def test_a_hash_takes_no_digest_of_another_length() -> None:
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="expected 32 bytes"):
            generate_commitment(wrong)
        with pytest.raises(ValueError, match="expected 32 bytes"):
            report_commitment(wrong)


def an_inclusion(**changed: object) -> dict[str, object]:
    tree = MerkleTree.over(leaves(5))
    inclusion = Inclusion("request", DIGEST, 5, 3, tree.path(3), tree.root)
    return {**inclusion.to_json(), **changed}


def test_an_inclusion_reads_back_as_it_was_written() -> None:
    document = an_inclusion()
    assert parse_inclusion(document, where="i").to_json() == document  # type: ignore[arg-type]
    reused = an_inclusion(leaf_index=None, path=None)
    assert parse_inclusion(reused, where="i").path is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"tree_size": 0},
        {"tree_size": 4097},
        {"tree_size": True},
        {"tree_size": 1.0},
        {"leaf_index": -1},
        {"leaf_index": None},
        {"path": None},
        {"path": ["00"]},
        {"path": ["0" * 64] * 13},
        {"root": "00"},
        {"root": "A" * 64},
        {"keyset_digest": "0" * 64},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_inclusion_out_of_form_is_malformed(change: dict[str, object]) -> None:
    with pytest.raises(Malformed):
        parse_inclusion(an_inclusion(**change), where="i")  # type: ignore[arg-type]

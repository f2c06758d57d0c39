"""The Merkle tree of an epoch: RFC 9162 section 2.1, SHA-256.

A GPU makes one report for everybody who waits at the same moment; its nonce commits to the root
over all of them, and each takes the path from its own leaf along. The hash of a leaf and of a
node begin with different bytes, so that no node can be passed off as a leaf.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LEAVES = 4096
"""Of one epoch (protocol.md section 2); a path has at most 12 items."""

HASH_BYTES = 32


def leaf_hash(commitment: bytes) -> bytes:
    """`sha256(0x00 || commitment)`, 32 bytes (RFC 9162 section 2.1.1)."""
    return hashlib.sha256(b"\x00" + commitment).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """`sha256(0x01 || left || right)`, 32 bytes (RFC 9162 section 2.1.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class MerkleTree:
    """A tree over commitments, in their order.

    Attributes:
        levels: the leaf hashes first, the root's level last. A level's odd last node goes up
            unchanged, which gives the same tree as the recursive definition.
    """

    levels: tuple[tuple[bytes, ...], ...]

    @classmethod
    def over(cls, commitments: Sequence[bytes]) -> MerkleTree:
        """Build the tree over 1 to `MAX_LEAVES` commitments."""
        if not 0 < len(commitments) <= MAX_LEAVES:
            raise ValueError(f"expected 1 to {MAX_LEAVES} leaves, got {len(commitments)}")
        level = tuple(leaf_hash(one) for one in commitments)
        levels = [level]
        while len(level) > 1:
            paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            level = (*paired, *level[len(level) & ~1 :])
            levels.append(level)
        return cls(tuple(levels))

    @property
    def size(self) -> int:
        """The number of leaves."""
        return len(self.levels[0])

    @property
    def root(self) -> bytes:
        """32 bytes."""
        return self.levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """The inclusion path of leaf `index`, from the bottom up (RFC 9162 section 2.1.3)."""
        if not 0 <= index < self.size:
            raise IndexError(f"expected a leaf below {self.size}, got {index}")
        path = []
        for level in self.levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index >>= 1
        return tuple(path)


def path_length(index: int, size: int) -> int:
    """How many items the path of leaf `index` has in a tree of `size` leaves."""
    length, last = 0, size - 1
    while last:
        if index & 1 or index < last:
            length += 1
        index >>= 1
        last >>= 1
    return length


def root_of(commitment: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a path leads to, or None when it cannot be a path of that leaf.

    RFC 9162 section 2.1.3.2. The caller compares the root; index, size and path may come from
    anywhere.
    """
    if not 0 <= index < size <= MAX_LEAVES or len(path) != path_length(index, size):
        return None
    if any(len(item) != HASH_BYTES for item in path):
        return None
    current, last = leaf_hash(commitment), size - 1
    for item in path:
        # A node without a sibling on this level went up unchanged; skip those levels.
        while not index & 1 and index == last:
            index >>= 1
            last >>= 1
        current = node_hash(item, current) if index & 1 else node_hash(current, item)
        index >>= 1
        last >>= 1
    return current

"""What can go wrong in setup. Each message is one line: what is wrong and what to do about it."""

from __future__ import annotations


class SetupError(Exception):
    """Setup cannot go on. Running it again after following the message's advice continues it."""


class NoMatchingDistributionError(SetupError):
    """The index has no file for a pinned requirement (and there was an index to ask)."""

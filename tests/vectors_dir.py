"""Where the vendor-signed vectors lie: beside the project, never in it."""

from __future__ import annotations

from pathlib import Path

import pytest

VECTORS = Path(__file__).resolve().parent.parent.parent / "shared" / "vectors"

needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="vendor-signed vectors are not here: ../shared/vectors"
)

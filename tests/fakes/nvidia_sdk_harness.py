"""The production child with NVIDIA's OCSP responder answered for it, inside the SDK's environment.

Run as `python -I nvidia_sdk_harness.py CHILD`. Nobody but NVIDIA can sign an OCSP answer about its
certificates, so this one look-up is replaced by what the SDK's own returns for good certificates;
everything else, the fetching of RIMs over HTTP included, is the SDK's code.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from typing import Any


def every_certificate_is_good(
    chain: list[Any], settings: object, mode: object
) -> tuple[bool, str, str, None]:
    # The SDK's callers rely on its converting the list in place.
    chain[:] = [certificate.to_cryptography() for certificate in chain]
    return True, "", "good", None


def main(child_path: str) -> int:
    spec = importlib.util.spec_from_file_location("nvidia_sdk_child", child_path)
    assert spec is not None
    assert spec.loader is not None
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    utils = import_module("verifier.cc_admin_utils").CcAdminUtils
    utils.ocsp_certificate_chain_validation = staticmethod(every_certificate_is_good)
    status: int = child.main()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

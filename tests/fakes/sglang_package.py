"""The stand-in engine as an installed SGLang: `python -m sglang.launch_server` starts it.

For what an appliance claims only of SGLang: with `[engine] unsafe_command` it claims nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

ENGINE = Path(__file__).with_name("sglang_engine.py")
CHECKOUT = Path(__file__).parents[2]


def sglang_section(folder: Path, *modes: str) -> dict[str, object]:
    """Write the package below `folder`; the keys of `[engine]` that have it started.

    Args:
        modes: as after `--fake-mode`.
    """
    package = folder / "site" / "sglang"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    arguments = [part for mode in modes for part in ("--fake-mode", mode)]
    (package / "launch_server.py").write_text(
        f"import runpy, sys\nsys.argv += {arguments!r}\n"
        f"runpy.run_path({str(ENGINE)!r}, run_name='__main__')\n"
    )
    return {
        "unsafe_command": [],
        "python": sys.executable,
        # The stand-in is read from this checkout: wherever that lies, a confined engine may.
        "python_path": [str(package.parent), str(CHECKOUT)],
    }

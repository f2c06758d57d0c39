"""Looking at processes through proc(5), while threads and processes come and go."""

from __future__ import annotations

import os
from pathlib import Path


def children_of(parent: int) -> set[int]:
    """The process ids whose parent is `parent`, whichever of its threads started them.

    Read from each process's own `stat`. `/proc/PID/task/TID/children` would be shorter, but proc(5)
    calls it reliable only while nothing exits, and the thread may be gone before it is opened.
    """
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (
                (entry / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name.split()[1]) == parent:
            found.add(int(entry.name))
    return found


def command_line(pid: int) -> str:
    """Its words, joined by blanks; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def collectors() -> set[int]:
    """This process's children that are evidence collectors."""
    ours = children_of(os.getpid())
    return {pid for pid in ours if "appliance.attester.main" in command_line(pid)}

"""configfs-tsm as the kernel has it (drivers/virt/coco/tsm.c), behind the methods of a Path.

A plain folder cannot imitate it: in configfs a folder is born with its files, and reading one
runs the firmware. So this stands in for `pathlib.Path` itself, at the edge.

Imitated: entries and their attributes; `inblob` of 1 to 64 bytes, taken at close, where an error
is lost; `generation`, counted up by writes; -EINVAL for an `outblob` before any `inblob`; -EBUSY,
-EFBIG and the like where a test asks for them; removal with the attributes.
Not imitated: permissions, privlevel, service attributes, the limit on entries, and the firmware's
own rate limit. Nor does anything here show that a real kernel behaves as its documentation says.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class FakeTsm:
    """One guest's configfs-tsm.

    Attributes:
        provider: `sev_guest` or `tdx_guest`.
        report: makes the outblob from the 64 bytes of the inblob.
        auxblob: the certificate table; None where the attribute does not exist (TDX).
        read_errors: errno for the next reads of outblob, first one first.
        intruder: called after each write to inblob; may write again.
        refuse_inblob: the kernel does not take it, and nobody is told.
        forgiving: an outblob comes before any inblob, as no kernel does it.
        entries: what there is now; empty when everything was cleaned up.
        made: names of all entries that ever were.
    """

    provider: str = "sev_guest"
    report: Callable[[bytes], bytes] = lambda inblob: inblob
    auxblob: bytes | None = b""
    read_errors: list[int] = field(default_factory=list)
    intruder: Callable[[Entry], None] = lambda entry: None
    refuse_inblob: bool = False
    forgiving: bool = False
    hang: threading.Event | None = None
    reading: threading.Event = field(default_factory=threading.Event)
    entries: dict[str, Entry] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def __truediv__(self, name: str) -> FakeFolder:
        return FakeFolder(self, name)

    def mkdir(self) -> None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def rmdir(self) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def read_bytes(self) -> bytes:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    def write_bytes(self, data: bytes) -> int:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


@dataclass
class Entry:
    """The kernel's side of one report."""

    inblob: bytes = b""
    generation: int = 0

    def write(self, data: bytes) -> None:
        self.inblob = data
        self.generation += 1


class FakeFolder(FakeTsm):
    """An entry, by its path."""

    def __init__(self, tsm: FakeTsm, name: str) -> None:
        self.tsm, self.name = tsm, name

    def __truediv__(self, name: str) -> FakeFolder:
        return FakeAttribute(self.tsm, self.name, name)

    def mkdir(self) -> None:
        if self.name in self.tsm.entries:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.tsm.entries[self.name] = Entry()
        self.tsm.made.append(self.name)

    def rmdir(self) -> None:
        if self.name not in self.tsm.entries:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        del self.tsm.entries[self.name]


class FakeAttribute(FakeFolder):
    """A file in an entry, by its path."""

    def __init__(self, tsm: FakeTsm, entry: str, attribute: str) -> None:
        super().__init__(tsm, entry)
        self.attribute = attribute

    @property
    def entry(self) -> Entry:
        if self.name not in self.tsm.entries:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self.tsm.entries[self.name]

    def read_bytes(self) -> bytes:
        tsm, entry = self.tsm, self.entry
        match self.attribute:
            case "provider":
                return f"{tsm.provider}\n".encode()
            case "generation":
                return f"{entry.generation}\n".encode()
            case "outblob":
                tsm.reading.set()
                if tsm.hang is not None:
                    tsm.hang.wait()
                if tsm.read_errors:
                    raise _error(tsm.read_errors.pop(0))
                if not entry.inblob and not tsm.forgiving:
                    raise _error(errno.EINVAL)
                return tsm.report(entry.inblob)
            case "auxblob" if tsm.auxblob is not None:
                return tsm.auxblob
            case _:
                raise _error(errno.ENOENT)

    def write_bytes(self, data: bytes) -> int:
        entry = self.entry
        if self.attribute != "inblob":
            raise _error(errno.EACCES)
        # configfs calls the attribute at close(2) and drops what it says.
        if 0 < len(data) <= 64 and not self.tsm.refuse_inblob:
            entry.write(data)
            self.tsm.intruder(entry)
        return len(data)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))

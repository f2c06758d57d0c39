"""What vendors vouch for, on disk: files an operator put there, and a cache of what was fetched.

    DIR/rim/<RIM id>.xml                          reference values, as the vendor signed them
    DIR/ocsp/<SHA-256 of the certificate>.der     an OCSP response about that certificate
    DIR/amd/<product>/<chip id>-<TCB>.der         a chip's VCEK, one certificate
    DIR/amd/<product>/vcek-crl.der                AMD's revocation list, or vlek-crl.der
    DIR/amd/<product>/vcek-issuer.der             an intermediate newer than the pinned one
    DIR/intel/<FMSPC>-<CA>.json                   collateral as Intel's tools exchange it
    DIR/cache/<kind>/…                            ours: a line of JSON about the value, the value

Names are lowercase, but for RIM ids and the product (`Milan`); a TCB is the four numbers of the
certificate in decimal, `blSPL-teeSPL-snpSPL-ucodeSPL`, before them fmcSPL for Turin, whose chip
ids have 16 digits instead of 128; CA is `platform` or `processor`. Files outside of `cache/`
are the operator's: never written, moved or deleted here. An entry of the cache says what it is,
its SHA-256 and until when it may be used; one that does not add up is set aside under
`cache/corrupt/`, named in the log, and as good as absent.

Nothing found here is trustworthy: who reads it authenticates it, every time, as if a vendor's
server had just sent it. That is why a cache on a disk that others can write is no danger, and why
no function here returns more than bytes.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import stat
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import trio

from appliance.errors import Malformed
from appliance.log import Log

Kind: TypeAlias = Literal["rim", "ocsp", "amd", "intel"]

SUFFIXES: dict[Kind, str] = {"rim": ".xml", "ocsp": ".der", "amd": ".der", "intel": ".json"}

MAX_VALUE_BYTES = 1 << 20
"""Of one value: what one part of evidence may have (`wire.evidence`)."""

_MAX_HEAD_BYTES = 4096

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
"""Names come out of evidence: none of them is a way to another folder."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cache may take; the operator's own files do not count.

    A machine needs some twenty entries of a few KiB; the bounds keep a disk from filling over
    years of driver versions.
    """

    entries: int = 512
    total_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, repr=False)
class Stored:
    """Bytes that were on disk.

    Attributes:
        origin: who put them there.
        expires: no use after this; None where only the value itself knows.
    """

    value: bytes
    origin: Literal["operator", "cache"]
    expires: datetime.datetime | None

    def __repr__(self) -> str:
        return f"Stored({len(self.value)} bytes, {self.origin})"


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of an entry. `expires` is RFC 3339, or null."""

    kind: str
    name: str
    sha256: str
    length: int
    expires: datetime.datetime | None


class EndorsementStore:
    """One folder, used by one process.

    A disk that fails is no reason to stop: reading then finds nothing, writing keeps nothing, and
    both say so in the log. Files are read and written in threads.
    """

    def __init__(self, folder: Path, *, log: Log, limits: Limits | None = None) -> None:
        self._folder = folder
        self._cache = folder / "cache"
        self._log = log
        self._limits = limits or Limits()
        # One write at a time: eviction looks at all entries. Reads need no lock, a file is
        # replaced in one step.
        self._writing = trio.CapacityLimiter(1)

    async def find(self, kind: Kind, name: str, *, at: datetime.datetime) -> tuple[Stored, ...]:
        """What there is under this name: the operator's file first, then ours unless it expired.

        Args:
            kind: of endorsement.
            name: its identity; `/` separates folders.
            at: timezone-aware.

        Raises:
            Malformed: a name that no vendor gives.
        """
        segments = _segments(name)
        return await trio.to_thread.run_sync(self._find, kind, segments, at)

    async def put(
        self, kind: Kind, name: str, value: bytes, *, expires: datetime.datetime | None
    ) -> None:
        """Keep a value that the caller has authenticated, in place of what the cache had.

        Raises:
            Malformed: a name that no vendor gives, or a value over the bound.
        """
        segments = _segments(name)
        if len(value) > MAX_VALUE_BYTES:
            raise Malformed(f"{kind}: expected at most {MAX_VALUE_BYTES} bytes", field=kind)
        head = _Head(kind, name, hashlib.sha256(value).hexdigest(), len(value), expires)
        await trio.to_thread.run_sync(self._put, segments, head, value, limiter=self._writing)

    def _find(
        self, kind: Kind, segments: tuple[str, ...], at: datetime.datetime
    ) -> tuple[Stored, ...]:
        found = []
        if (theirs := self._operators(kind, segments)) is not None:
            found.append(Stored(theirs, "operator", None))
        ours = self._cached(kind, segments)
        if ours is not None and (ours.expires is None or at < ours.expires):
            found.append(ours)
        return tuple(found)

    def _operators(self, kind: Kind, segments: tuple[str, ...]) -> bytes | None:
        path = _file(self._folder / kind, segments, SUFFIXES[kind])
        try:
            return _read(path, MAX_VALUE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, _Unusable) as error:
            self._log.warning("endorsement_unreadable", name=_shown(kind, segments), why=str(error))
            return None

    def _cached(self, kind: Kind, segments: tuple[str, ...]) -> Stored | None:
        path = _file(self._cache / kind, segments, ".entry")
        try:
            return _decode(_read(path, MAX_VALUE_BYTES + _MAX_HEAD_BYTES), kind, segments)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._log.warning("endorsement_unreadable", name=_shown(kind, segments), why=str(error))
            return None
        except _Unusable as error:
            self._set_aside(path, kind, segments, str(error))
            return None

    def _set_aside(self, path: Path, kind: Kind, segments: tuple[str, ...], why: str) -> None:
        aside = self._cache / "corrupt" / "-".join((kind, *segments))
        try:
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            path.replace(aside)  # of one name only the last is kept
        except OSError as error:
            why = f"{why}; it cannot be moved: {error.strerror}"
        self._log.warning("endorsement_set_aside", name=_shown(kind, segments), why=why)

    def _put(self, segments: tuple[str, ...], head: _Head, value: bytes) -> None:
        path = _file(self._cache / head.kind, segments, ".entry")
        try:
            _make_private(path.parent, self._folder)
            _write(path, msgspec.json.encode(head) + b"\n" + value)
            self._evict(keep=path)
        except OSError as error:
            self._log.warning(
                "endorsement_not_kept", name=f"{head.kind}/{head.name}", why=error.strerror
            )

    def _evict(self, *, keep: Path) -> None:
        """Delete the entries written longest ago until the rest is within the bounds."""
        entries = []
        for path in self._cache.rglob("*"):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # set aside just now
            if stat.S_ISREG(status.st_mode):
                entries.append((path != keep, -status.st_mtime_ns, status.st_size, path))
        total = 0
        for count, (_, _, size, path) in enumerate(sorted(entries), start=1):
            total += size
            if count > self._limits.entries or total > self._limits.total_bytes:
                path.unlink(missing_ok=True)


class _Unusable(Exception):  # noqa: N818 - it never leaves this module
    """A file that is there and not what it should be; its text says why."""


def _segments(name: str) -> tuple[str, ...]:
    segments = tuple(name.split("/"))
    if len(segments) > 3 or not all(_SEGMENT.match(one) for one in segments):
        raise Malformed("name of an endorsement: expected letters, digits, `.`, `_`, `-`")
    return segments


def _file(folder: Path, segments: tuple[str, ...], suffix: str) -> Path:
    return folder.joinpath(*segments[:-1], segments[-1] + suffix)


def _shown(kind: Kind, segments: tuple[str, ...]) -> str:
    return "/".join((kind, *segments))


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; never of a pipe or a device, which could hold the thread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Unusable("expected a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _Unusable(f"expected at most {limit} bytes")
    return data


def _decode(entry: bytes, kind: Kind, segments: tuple[str, ...]) -> Stored:
    line, newline, value = entry.partition(b"\n")
    try:
        head = msgspec.json.decode(line, type=_Head)
    except (msgspec.DecodeError, ValueError):
        raise _Unusable("its first line is not one of ours") from None
    if not newline or (head.kind, head.name) != (kind, "/".join(segments)):
        raise _Unusable("it is another entry")
    if head.length != len(value) or head.sha256 != hashlib.sha256(value).hexdigest():
        raise _Unusable("its value does not have the digest that was written")
    if head.expires is not None and head.expires.tzinfo is None:
        raise _Unusable("its time has no zone")
    return Stored(value, "cache", head.expires)


def _make_private(folder: Path, top: Path) -> None:
    """Create `folder`, and what is missing above it up to `top`, for this user alone."""
    if folder != top:
        _make_private(folder.parent, top)
        folder.mkdir(mode=0o700, exist_ok=True)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step: whoever reads sees the old bytes or the new ones.

    Not synced: what a power failure leaves half-written has another digest, and is fetched anew.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
    with ExitStack() as unless_replaced:
        unless_replaced.callback(Path(name).unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).replace(path)
        unless_replaced.pop_all()

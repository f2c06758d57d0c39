"""The tables behind `serving.receipts`: all SQL, and what passes between the two.

Everything here blocks and runs in a thread, one call at a time. Rows are what was served or will
be: nothing is computed from them but what may be deleted.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from appliance.log import Log
from appliance.serving.epochs import Epoch
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.encoding import encode_base64, format_sha256
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import API_VERSION

FILE = "receipts.sqlite3"
SCHEMA_VERSION = 1

PRUNE_ROWS = 256
"""Receipts that one batch may delete beyond twice what it adds: it catches up, never takes long."""

EVIDENCE_GRACE_S = 3600.0
"""Evidence that no receipt cites may be that of an exchange that still runs."""

_SCHEMA = f"""
BEGIN;
-- body is null while the exchange is open; after a restart that means: lost.
CREATE TABLE receipt (
    id INTEGER PRIMARY KEY, receipt_id TEXT NOT NULL UNIQUE, chat_id TEXT, tenant TEXT NOT NULL,
    at REAL NOT NULL, keyset BLOB, body BLOB
);
CREATE INDEX receipt_chat ON receipt (chat_id);
CREATE INDEX receipt_tenant ON receipt (tenant, id);
CREATE INDEX receipt_keyset ON receipt (keyset);
CREATE TABLE citation (
    evidence BLOB NOT NULL, receipt INTEGER NOT NULL, PRIMARY KEY (evidence, receipt)
) WITHOUT ROWID;
CREATE INDEX citation_receipt ON citation (receipt);
-- An epoch's JSON; what repeats from epoch to epoch, such as chains, is named in it by digest.
CREATE TABLE evidence (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, at REAL NOT NULL, size INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX evidence_size ON evidence (size);
CREATE TABLE part (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE INDEX part_size ON part (size);
CREATE TABLE part_of (
    evidence INTEGER NOT NULL, part INTEGER NOT NULL, PRIMARY KEY (evidence, part)
) WITHOUT ROWID;
CREATE INDEX part_of_part ON part_of (part);
CREATE TABLE report (digest BLOB PRIMARY KEY, body BLOB NOT NULL);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ReceiptLimits:
    """How much is kept, and for how long.

    Attributes:
        max_age_s: of a receipt.
        max_count: receipts in all. max_per_tenant: of one API key. The oldest go first.
        max_bytes: the database; its log adds a few MiB.
        max_evidence_bytes: evidence of epochs in it.
        max_memory_bytes: what waits to be written; it grows only while the disk fails.
    """

    max_age_s: float = 30 * 86_400.0
    max_count: int = 1_000_000
    max_per_tenant: int = 250_000
    max_bytes: int = 4 << 30
    max_evidence_bytes: int = 512 << 20
    max_memory_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A finished receipt and what it is found by.

    Attributes:
        chat_id: the answer's `id`, if it got one.
        tenant: `Tenant.id`; nobody else finds it.
        keyset_digest: 32 bytes.
        evidence: the `evidence_digest` of each epoch that it cites, 32 bytes each.
        data: its bytes, as they are served.
    """

    receipt_id: str
    chat_id: str | None
    tenant: str
    keyset_digest: bytes
    evidence: tuple[bytes, ...]
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Begun:
    """An exchange that has no receipt yet; `at` is Unix seconds."""

    receipt_id: str
    chat_id: str | None
    tenant: str
    at: float


@dataclass(slots=True)
class Batch:
    """What waits to be written. Written twice, it leaves the same rows as written once."""

    begun: dict[str, Begun] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    finished: dict[str, tuple[SignedReceipt, float]] = field(default_factory=dict)
    epochs: dict[bytes, Epoch] = field(default_factory=dict)
    reports: dict[bytes, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.begun or self.forgotten or self.finished or self.epochs or self.reports)

    @property
    def size(self) -> int:
        """Bytes of what waits, as far as it counts."""
        return (
            sum(len(receipt.data) for receipt, _ in self.finished.values())
            + sum(map(epoch_bytes, self.epochs.values()))
            + sum(map(len, self.reports.values()))
        )

    def with_later(self, later: Batch) -> Batch:
        """Both as one."""
        over = later.finished.keys() | later.forgotten
        begun = {key: one for key, one in self.begun.items() if key not in over}
        return Batch(
            begun=begun | later.begun,
            forgotten=self.forgotten | later.forgotten,
            finished=self.finished | later.finished,
            epochs=self.epochs | later.epochs,
            reports=self.reports | later.reports,
        )


class DiskFails(Exception):  # noqa: N818 - it never leaves `serving.receipts`
    """The database cannot be used for now; the log says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """A row; no body means an exchange that has not ended."""

    receipt_id: str
    body: bytes | None


class ReceiptDatabase:
    """All SQL; blocking. One call at a time, from whichever thread.

    Every call opens the database if it is not open, and every failure closes it: so what is
    known about it here never differs from what is in it.
    """

    def __init__(
        self, folder: Path, limits: ReceiptLimits, now: Callable[[], float], log: Log
    ) -> None:
        self._path = folder / FILE
        self._limits = limits
        self._now = now
        self._log = log
        self._connection: sqlite3.Connection | None = None
        self._counts: Counter[str] = Counter()  # receipts by tenant
        self._evidence_bytes = 0
        self._reports: set[bytes] = set()  # of this run's keysets: receipts to come will cite them
        self._swept = False
        self._failing = False

    def write(self, batch: Batch) -> None:
        """One transaction.

        Raises:
            DiskFails
        """
        self._reports.update(batch.reports)
        self._attempt(partial(self._write, batch))
        if self._failing:  # reading may have worked all the while
            self._failing = False
            self._log.info("receipts_written_again")

    def find(self, identifier: str, tenant: str) -> Found | None:
        """A row by either id, of this tenant.

        Raises:
            DiskFails
        """
        return self._attempt(partial(_find, identifier, tenant))

    def find_epoch(self, digest: bytes, tenant: str | None) -> bytes | None:
        """Evidence that a receipt of the tenant cites; of None: whoever cites it.

        Raises:
            DiskFails
        """
        return self._attempt(partial(_find_epoch, digest, tenant))

    def find_report(self, digest: bytes) -> bytes | None:
        """A keyset's null-form report.

        Raises:
            DiskFails
        """
        return self._attempt(partial(_find_report, digest))

    def close(self) -> None:
        """Close it, if it is open; SQLite then folds its log into it."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                connection.close()
            except sqlite3.Error as error:
                self._log.warning("receipts_not_closed", why=str(error))

    def _attempt(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it; after damage once more, in a new database."""
        try:
            try:
                return self._once(work)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self.close()
                self._set_aside(str(error))
                return self._once(work)
        except sqlite3.ProgrammingError:
            raise  # a defect of ours, not of the disk
        except (sqlite3.Error, OSError) as error:
            self.close()
            # Without the path that the text of an OSError names.
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise self._fails(why or type(error).__name__) from error

    def _once(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._connection is None:
            self._connection = self._open()
            self._count(self._connection)
        return work(self._connection)

    def _fails(self, why: str) -> DiskFails:
        if not self._failing:
            self._failing = True
            self._log.error("receipts_disk_fails", why=why, file=self._path.name)
        return DiskFails(why)

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its log the mode of the database.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            self._path, timeout=1.0, isolation_level=None, check_same_thread=False
        )
        with ExitStack() as unless_prepared:
            unless_prepared.callback(connection.close)
            _prepare(connection)
            unless_prepared.pop_all()
        return connection

    def _count(self, connection: sqlite3.Connection) -> None:
        if not self._swept:
            # No exchange runs yet: what nobody cites now, nobody will.
            with _transaction(connection):
                connection.execute(
                    "DELETE FROM evidence WHERE NOT EXISTS "
                    "(SELECT 1 FROM citation WHERE citation.evidence = evidence.digest)"
                )
                connection.execute(
                    "DELETE FROM part_of WHERE evidence NOT IN (SELECT id FROM evidence)"
                )
                connection.execute("DELETE FROM part WHERE id NOT IN (SELECT part FROM part_of)")
                connection.execute(
                    "DELETE FROM report WHERE NOT EXISTS "
                    "(SELECT 1 FROM receipt WHERE receipt.keyset = report.digest)"
                )
            self._swept = True
        rows = connection.execute("SELECT tenant, count(*) FROM receipt GROUP BY tenant")
        self._counts = Counter(dict(rows))
        (self._evidence_bytes,) = connection.execute(
            "SELECT (SELECT ifnull(sum(size), 0) FROM evidence)"
            " + (SELECT ifnull(sum(size), 0) FROM part)"
        ).fetchone()

    def _set_aside(self, why: str) -> None:
        aside = self._path.with_name(FILE + ".damaged")  # only the last one is kept
        # The log goes first: beside a new database it would be taken for its own.
        for suffix in ("-wal", "-shm"):
            beside = self._path.with_name(FILE + suffix)
            if beside.exists():
                beside.replace(aside.with_name(aside.name + suffix))
        self._path.replace(aside)
        self._swept = False
        self._log.error("receipts_set_aside", why=why, file=aside.name)

    def _write(self, batch: Batch, connection: sqlite3.Connection) -> None:
        with _transaction(connection):
            for receipt_id in batch.forgotten:
                self._delete(connection, "receipt_id = ? AND body IS NULL", (receipt_id,))
            for begun in batch.begun.values():
                self._begin(connection, begun)
            for digest, epoch in batch.epochs.items():
                self._add_epoch(connection, digest, epoch)
            connection.executemany(
                "INSERT OR REPLACE INTO report (digest, body) VALUES (?, ?)",
                batch.reports.items(),
            )
            for receipt, at in batch.finished.values():
                self._add(connection, receipt, at)
            self._prune(connection, batch)

    def _begin(self, connection: sqlite3.Connection, begun: Begun) -> None:
        added = connection.execute(
            "INSERT OR IGNORE INTO receipt (receipt_id, chat_id, tenant, at) VALUES (?, ?, ?, ?)",
            (begun.receipt_id, begun.chat_id, begun.tenant, begun.at),
        )
        self._counts[begun.tenant] += added.rowcount

    def _add(self, connection: sqlite3.Connection, receipt: SignedReceipt, at: float) -> None:
        self._begin(connection, Begun(receipt.receipt_id, receipt.chat_id, receipt.tenant, at))
        ((row,),) = connection.execute(
            "UPDATE receipt SET chat_id = ?, keyset = ?, body = ? WHERE receipt_id = ? RETURNING id",
            (receipt.chat_id, receipt.keyset_digest, receipt.data, receipt.receipt_id),
        ).fetchall()
        connection.executemany(
            "INSERT OR IGNORE INTO citation (evidence, receipt) VALUES (?, ?)",
            [(digest, row) for digest in receipt.evidence],
        )

    def _add_epoch(self, connection: sqlite3.Connection, digest: bytes, epoch: Epoch) -> None:
        known = connection.execute("SELECT 1 FROM evidence WHERE digest = ?", (digest,)).fetchone()
        if known is not None:  # members of one epoch may each bring it
            return
        parts: dict[bytes, bytes] = {}

        def by_digest(data: bytes) -> str:
            parts[hashlib.sha256(data).digest()] = data
            return hashlib.sha256(data).hexdigest()

        body = canonical_json(epoch_json(epoch, by_digest))
        ((row,),) = connection.execute(
            "INSERT INTO evidence (digest, at, size, body) VALUES (?, ?, ?, ?) RETURNING id",
            (digest, self._now(), len(body), body),
        ).fetchall()
        self._evidence_bytes += len(body)
        for part_digest, data in parts.items():
            new = connection.execute(
                "INSERT OR IGNORE INTO part (digest, size, body) VALUES (?, ?, ?)",
                (part_digest, len(data), data),
            )
            self._evidence_bytes += len(data) * new.rowcount
            connection.execute(
                "INSERT INTO part_of SELECT ?, id FROM part WHERE digest = ?",
                (row, part_digest),
            )

    def _prune(self, connection: sqlite3.Connection, batch: Batch) -> None:
        """Delete what is over a bound, the oldest first, a few at a time."""
        limits = self._limits
        budget = PRUNE_ROWS + 2 * (len(batch.begun) + len(batch.finished))
        # 1. A tenant's own quota, before others suffer.
        for tenant in {one.tenant for one, _ in batch.finished.values()}:
            excess = self._counts[tenant] - limits.max_per_tenant
            if excess > 0 and budget > 0:
                oldest = "id IN (SELECT id FROM receipt WHERE tenant = ? ORDER BY id LIMIT ?)"
                budget -= self._delete(connection, oldest, (tenant, min(excess, budget)))
        # 2. Count. 3. Size. 4. Age; rows are nearly in the order of their time.
        excess = self._counts.total() - limits.max_count
        used = _used_bytes(connection)
        if used > limits.max_bytes:
            share = (used - limits.max_bytes) / used
            excess = max(excess, math.ceil(share * self._counts.total()))
        oldest = "id IN (SELECT id FROM receipt ORDER BY id LIMIT ?)"
        if excess > 0 and budget > 0:
            budget -= self._delete(connection, oldest, (min(excess, budget),))
        expired = self._now() - limits.max_age_s
        first = connection.execute("SELECT at FROM receipt ORDER BY id LIMIT 1").fetchone()
        if first is not None and first[0] < expired and budget > 0:
            self._delete(connection, f"at < ? AND {oldest}", (expired, budget))
        # 5. Evidence over its bound, cited or not.
        while self._evidence_bytes > limits.max_evidence_bytes:
            (row,) = connection.execute("SELECT min(id) FROM evidence").fetchone()
            if row is None:
                break
            self._delete_evidence(connection, row)

    def _delete(
        self, connection: sqlite3.Connection, which: str, values: tuple[object, ...]
    ) -> int:
        """Delete receipts, and what only they cited; how many."""
        gone = connection.execute(
            f"DELETE FROM receipt WHERE {which} RETURNING id, tenant, keyset",  # noqa: S608 - ours
            values,
        ).fetchall()
        cited: set[bytes] = set()
        for row, tenant, _ in gone:
            self._counts[tenant] -= 1
            cited.update(
                digest
                for (digest,) in connection.execute(
                    "DELETE FROM citation WHERE receipt = ? RETURNING evidence", (row,)
                ).fetchall()
            )
        for digest in cited:
            orphan = connection.execute(
                "SELECT id FROM evidence WHERE digest = ?1 AND at < ?2"
                " AND NOT EXISTS (SELECT 1 FROM citation WHERE evidence = ?1)",
                (digest, self._now() - EVIDENCE_GRACE_S),
            ).fetchone()
            if orphan is not None:
                self._delete_evidence(connection, orphan[0])
        for keyset in {keyset for _, _, keyset in gone if keyset is not None} - self._reports:
            connection.execute(
                "DELETE FROM report WHERE digest = ?1"
                " AND NOT EXISTS (SELECT 1 FROM receipt WHERE keyset = ?1)",
                (keyset,),
            )
        return len(gone)

    def _delete_evidence(self, connection: sqlite3.Connection, row: int) -> None:
        """Delete an epoch's evidence, and the parts that only it had."""
        ((size,),) = connection.execute(
            "DELETE FROM evidence WHERE id = ? RETURNING size", (row,)
        ).fetchall()
        self._evidence_bytes -= size
        parts = connection.execute(
            "DELETE FROM part_of WHERE evidence = ? RETURNING part", (row,)
        ).fetchall()
        for (part,) in parts:
            unused = connection.execute(
                "DELETE FROM part WHERE id = ?1"
                " AND NOT EXISTS (SELECT 1 FROM part_of WHERE part = ?1) RETURNING size",
                (part,),
            ).fetchall()
            self._evidence_bytes -= sum(size for (size,) in unused)


def _prepare(connection: sqlite3.Connection) -> None:
    """Our settings, and our tables where there are none yet."""
    # A receipt takes some 2.6 KB: of the default 4 KiB a third would stay empty.
    connection.execute("PRAGMA page_size = 8192")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA journal_size_limit = 16777216")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        connection.executescript(_SCHEMA)
    elif version != SCHEMA_VERSION:
        raise _OtherSchema(f"expected schema {SCHEMA_VERSION}, got {version}")


def _find(identifier: str, tenant: str, connection: sqlite3.Connection) -> Found | None:
    for column in ("receipt_id", "chat_id"):
        row = connection.execute(
            f"SELECT receipt_id, body FROM receipt WHERE {column} = ? AND tenant = ?",  # noqa: S608 - ours
            (identifier, tenant),
        ).fetchone()
        if row is not None:
            return Found(*row)
    return None


def _find_epoch(digest: bytes, tenant: str | None, connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute(
        "SELECT id, body FROM evidence WHERE digest = ?1 AND (?2 IS NULL OR EXISTS ("
        "SELECT 1 FROM citation JOIN receipt ON receipt.id = citation.receipt"
        " WHERE citation.evidence = ?1 AND receipt.tenant = ?2))",
        (digest, tenant),
    ).fetchone()
    if row is None:
        return None
    parts: dict[str, str] = {
        digest.hex(): encode_base64(body)
        for digest, body in connection.execute(
            "SELECT part.digest, part.body FROM part JOIN part_of ON part_of.part = part.id"
            " WHERE part_of.evidence = ?",
            (row[0],),
        )
    }
    return _with_parts(row[1], parts)


def _find_report(digest: bytes, connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT body FROM report WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else bytes(row[0])


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:  # whatever it is goes on; half a transaction does not
        if connection.in_transaction:  # SQLite has rolled back by itself where the disk is full
            connection.execute("ROLLBACK")
        raise


def _used_bytes(connection: sqlite3.Connection) -> int:
    """Of the database, without pages that are free for what comes next."""
    names = ("page_count", "freelist_count", "page_size")
    pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


class _OtherSchema(sqlite3.DatabaseError):
    """Tables of another version, or of another program."""


def _is_damage(error: sqlite3.Error) -> bool:
    """What is in the file is not what we wrote; otherwise the disk does not do what it is asked."""
    if isinstance(error, (_OtherSchema, sqlite3.IntegrityError)):
        return True
    # SQLITE_ERROR: a table or column of ours is missing.
    codes = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF in codes


# ------------------------------------------------------------------------------------- evidence


def epoch_json(epoch: Epoch, encode: Callable[[bytes], str]) -> JsonObject:
    """An epoch as it is served, without the tree's leaves.

    Args:
        encode: of what repeats from epoch to epoch: base64, or a name for it.
    """
    gpus: list[JsonValue] = [_gpu_json(gpu, encode) for gpu in epoch.gpus]
    return {
        "api_version": API_VERSION,
        "evidence_digest": format_sha256(epoch.evidence_digest),
        "keyset_digest": format_sha256(epoch.keyset_digest),
        "tree_size": epoch.tree.size,
        "root": epoch.tree.root.hex(),
        "collected_at": int(epoch.collected_at),
        "gpus": gpus,
    }


def _gpu_json(gpu: GpuEvidence, encode: Callable[[bytes], str]) -> JsonObject:
    """As `GpuEvidence.to_json`, with the report always in full: no two are the same."""
    rims: list[JsonValue] = [encode(one) for one in gpu.rims]
    ocsp: list[JsonValue] = [encode(one) for one in gpu.ocsp]
    return {
        "scheme": gpu.scheme,
        "report_b64": encode_base64(gpu.report),
        "cert_chain_b64": encode(gpu.certificate_chain),
        "rims_b64": rims,
        "ocsp_b64": ocsp,
    }


def _with_parts(body: bytes, parts: Mapping[str, str]) -> bytes:
    """A stored epoch as it is served: every name replaced by what it stands for."""
    document = msgspec.json.decode(body, type=_StoredEpoch)
    for gpu in document.gpus:
        gpu.cert_chain_b64 = parts[gpu.cert_chain_b64]
        gpu.rims_b64 = [parts[one] for one in gpu.rims_b64]
        gpu.ocsp_b64 = [parts[one] for one in gpu.ocsp_b64]
    return canonical_json(msgspec.to_builtins(document))


class _StoredGpu(Struct):
    scheme: str
    report_b64: str
    cert_chain_b64: str
    rims_b64: list[str]
    ocsp_b64: list[str]


class _StoredEpoch(Struct):
    api_version: str
    evidence_digest: str
    keyset_digest: str
    tree_size: int
    root: str
    collected_at: int
    gpus: list[_StoredGpu]


def epoch_bytes(epoch: Epoch) -> int:
    """What an epoch takes in memory, about."""
    return sum(len(gpu.report) + len(gpu.certificate_chain) for gpu in epoch.gpus)

"""The receipt store: found at once, found after a kill, bounded, and never in the way."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs

from appliance.errors import Overloaded, ReceiptLost, RouteNotFound
from appliance.log import Log
from appliance.rats.result import AttestationResult, Tier
from appliance.serving.epochs import Epoch
from appliance.serving.receipt_database import EVIDENCE_GRACE_S, FILE, PRUNE_ROWS
from appliance.serving.receipts import (
    BATCH_S,
    RETRY_S,
    ReceiptLimits,
    ReceiptStore,
    SignedReceipt,
)
from appliance.wire.canonical import canonical_json
from appliance.wire.commitments import gpu_evidence_digest
from appliance.wire.evidence import GpuEvidence, parse_gpu_evidence
from appliance.wire.merkle import MerkleTree

KEYSET = hashlib.sha256(b"keyset").digest()
DEADLINE_S = 400.0
RATE = 20.0
"""Of the clock where a test waits for retries; threads are at work, so it must not jump."""


class Clock:
    """Unix seconds that a test sets."""

    def __init__(self) -> None:
        self.at = 1_750_000_000.0

    def __call__(self) -> float:
        return self.at


def a_log() -> Log:
    log: Log = structlog.get_logger()
    return log


def receipt(number: int, *, tenant: str = "a", evidence: tuple[bytes, ...] = ()) -> SignedReceipt:
    return SignedReceipt(
        receipt_id=f"rcpt-{number:032x}",
        chat_id=f"chatcmpl-{number:032x}",
        tenant=tenant,
        keyset_digest=KEYSET,
        evidence=evidence,
        data=canonical_json({"receipt_id": f"rcpt-{number:032x}", "signature": "0" * 2000}),
    )


def epoch(number: int, *, chain: bytes = b"chain" * 1000, rims: tuple[bytes, ...] = ()) -> Epoch:
    gpus = tuple(
        GpuEvidence("simulated", b"report %d %d" % (number, gpu), chain, rims) for gpu in range(2)
    )
    return Epoch(
        keyset_digest=KEYSET,
        tree=MerkleTree.over([bytes(32), bytes([number % 256]) * 32]),
        gpus=gpus,
        result=AttestationResult(Tier.AFFIRMING, {}),
        evidence_digest=gpu_evidence_digest(gpus),
        collected_at=1_750_000_000.9,
    )


@asynccontextmanager
async def running(
    folder: Path, limits: ReceiptLimits | None = None, *, now: Callable[[], float] | None = None
) -> AsyncIterator[ReceiptStore]:
    """A store whose task runs; it flushes and ends with the block."""
    store = ReceiptStore(folder, now=now or Clock(), log=a_log(), limits=limits)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()


async def absent(store: ReceiptStore, identifier: str, tenant: str = "a") -> bool:
    try:
        await store.find(identifier, tenant)
    except RouteNotFound:
        return True
    return False


async def kept(store: ReceiptStore, numbers: range, tenant: str = "a") -> list[int]:
    return [
        number
        for number in numbers
        if not await absent(store, receipt(number, tenant=tenant).receipt_id, tenant)
    ]


def rows(folder: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(folder / FILE)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# ------------------------------------------------------------------------------------- finding


async def test_a_receipt_is_found_at_once_by_both_ids_and_still_after_a_restart(
    tmp_path: Path,
) -> None:
    one = receipt(1)
    async with running(tmp_path) as store:
        store.begin(one.receipt_id, chat_id=one.chat_id, tenant="a")
        store.add(one)
        assert one.chat_id is not None
        for identifier in (one.receipt_id, one.chat_id):
            assert await store.find(identifier, "a") == one.data
        await store.written()
        assert await store.find(one.chat_id, "a") == one.data
    async with running(tmp_path) as store:
        for identifier in (one.receipt_id, one.chat_id):
            assert await store.find(identifier, "a") == one.data


async def test_before_it_runs_it_serves_from_memory(tmp_path: Path) -> None:
    store = ReceiptStore(tmp_path, now=Clock(), log=a_log())
    store.add(receipt(1))
    assert await store.find(receipt(1).receipt_id, "a") == receipt(1).data


async def test_another_keys_receipt_is_not_found_wherever_it_is(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.begin(receipt(2).receipt_id, chat_id=receipt(2).chat_id, tenant="a")
        store.add(receipt(1))
        for _ in ("in memory", "on disk"):
            for number in (1, 2, 3):
                assert await absent(store, receipt(number).receipt_id, "b")
                assert await absent(store, str(receipt(number).chat_id), "b")
            await store.written()
    async with running(tmp_path) as store:  # 2 is lost now, and that, too, is its tenant's alone
        for number in (1, 2, 3):
            assert await absent(store, receipt(number).receipt_id, "b")


async def test_without_keys_everybody_is_one_tenant(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.add(receipt(1, tenant=""))
        await store.written()
        assert await store.find(receipt(1).receipt_id, "") == receipt(1).data
        assert await absent(store, receipt(1).receipt_id, "a")


async def test_an_open_exchange_is_not_found_and_lost_after_a_restart(tmp_path: Path) -> None:
    one = receipt(1)
    async with running(tmp_path) as store:
        store.begin(one.receipt_id, chat_id=one.chat_id, tenant="a")
        assert await absent(store, one.receipt_id)
        await store.written()
        assert await absent(store, one.receipt_id)
        assert await absent(store, str(one.chat_id))
    async with running(tmp_path) as store:
        for identifier in (one.receipt_id, str(one.chat_id)):
            with pytest.raises(ReceiptLost) as caught:
                await store.find(identifier, "a")
            assert (caught.value.http_status, caught.value.code) == (404, "receipt_lost")


async def test_an_exchange_that_leaves_no_receipt_is_forgotten(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        for number in (1, 2):
            one = receipt(number)
            store.begin(one.receipt_id, chat_id=one.chat_id, tenant="a")
            if number == 1:
                await store.written()
            store.forget(one.receipt_id)
            assert await absent(store, one.receipt_id)
        store.forget("rcpt-never-begun")
    async with running(tmp_path) as store:
        assert await absent(store, receipt(1).receipt_id)
        assert await absent(store, receipt(2).receipt_id)
    assert rows(tmp_path, "SELECT count(*) FROM receipt") == [(0,)]


@pytest.mark.parametrize("identifier", ["", "x" * 300, "a\x00b", "ü", "\ud800", "%", "_"])
async def test_an_id_of_another_form_is_not_found(tmp_path: Path, identifier: str) -> None:
    async with running(tmp_path) as store:
        store.add(receipt(1))
        await store.written()
        assert await absent(store, identifier)


async def test_nobody_but_the_service_can_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with running(folder) as store:
        store.add(receipt(1))
        await store.written()
        assert folder.stat().st_mode & 0o777 == 0o700
        files = list(folder.iterdir())
        assert len(files) == 3  # the log and its index beside the database
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


# ----------------------------------------------------------------------------- evidence, reports


async def test_evidence_is_served_in_full_to_who_has_a_receipt_that_cites_it(
    tmp_path: Path,
) -> None:
    one = epoch(1, rims=(b"<rim/>",))
    async with running(tmp_path) as store:
        store.add_epoch(one)
        with pytest.raises(RouteNotFound):  # no receipt cites it yet
            await store.find_epoch(one.evidence_digest, "a")
        store.add(receipt(1, evidence=(one.evidence_digest,)))
        at_once = await store.find_epoch(one.evidence_digest, "a")
        await store.written()
        assert await store.find_epoch(one.evidence_digest, "a") == at_once
        with pytest.raises(RouteNotFound):
            await store.find_epoch(one.evidence_digest, "b")
        # On disk already, cited by a receipt that is not.
        store.add(receipt(2, tenant="c", evidence=(one.evidence_digest,)))
        assert await store.find_epoch(one.evidence_digest, "c") == at_once
    async with running(tmp_path) as store:
        assert await store.find_epoch(one.evidence_digest, "a") == at_once
    served = json.loads(at_once)
    gpus = tuple(parse_gpu_evidence(gpu, where="gpus") for gpu in served.pop("gpus"))
    assert gpus == one.gpus
    assert gpu_evidence_digest(gpus) == one.evidence_digest
    assert served == {
        "api_version": "dcv/1",
        "evidence_digest": "sha256:" + one.evidence_digest.hex(),
        "keyset_digest": "sha256:" + KEYSET.hex(),
        "tree_size": 2,
        "root": one.tree.root.hex(),
        "collected_at": 1_750_000_000,
    }


async def test_a_chain_is_stored_once_and_goes_with_the_last_evidence_that_has_it(
    tmp_path: Path,
) -> None:
    clock, limits = Clock(), ReceiptLimits(max_age_s=100.0 + EVIDENCE_GRACE_S)
    async with running(tmp_path, limits, now=clock) as store:
        for number in range(20):
            store.add_epoch(epoch(number))
            store.add(receipt(number, evidence=(epoch(number).evidence_digest,)))
        await store.written()
        assert rows(tmp_path, "SELECT count(*) FROM evidence") == [(20,)]
        assert rows(tmp_path, "SELECT count(*), sum(size) FROM part") == [(1, 5000)]
        clock.at += limits.max_age_s + 1
        store.add_epoch(epoch(50, chain=b"new"))
        store.add(receipt(50, evidence=(epoch(50).evidence_digest,)))
        await store.written()
        assert rows(tmp_path, "SELECT count(*) FROM evidence") == [(1,)]
        assert rows(tmp_path, "SELECT body FROM part") == [(b"new",)]
        assert rows(tmp_path, "SELECT count(*) FROM citation") == [(1,)]
        assert rows(tmp_path, "SELECT count(*) FROM part_of") == [(1,)]


async def test_evidence_stays_as_long_as_one_receipt_cites_it(tmp_path: Path) -> None:
    clock, one = Clock(), epoch(1)
    limits = ReceiptLimits(max_age_s=1000.0 + EVIDENCE_GRACE_S)
    async with running(tmp_path, limits, now=clock) as store:
        store.add_epoch(one)
        store.add(receipt(1, evidence=(one.evidence_digest,)))
        await store.written()
        clock.at += 500
        store.add(receipt(2, evidence=(one.evidence_digest,)))
        await store.written()
        clock.at += limits.max_age_s - 499
        store.add(receipt(3))
        await store.written()
        assert await kept(store, range(1, 4)) == [2, 3]
        assert await store.find_epoch(one.evidence_digest, "a")


async def test_evidence_is_bounded_in_bytes_the_oldest_goes_first(tmp_path: Path) -> None:
    limits = ReceiptLimits(max_evidence_bytes=30_000)
    digests = []
    async with running(tmp_path, limits) as store:
        for number in range(12):
            one = epoch(number, chain=bytes([number]) * 5000)
            digests.append(one.evidence_digest)
            store.add_epoch(one)
            store.add(receipt(number, evidence=(one.evidence_digest,)))
            await store.written()
        (sizes,) = rows(
            tmp_path,
            "SELECT (SELECT sum(size) FROM evidence), (SELECT sum(size) FROM part),"
            " (SELECT sum(length(body)) FROM evidence), (SELECT sum(length(body)) FROM part)",
        )
        assert sizes[:2] == sizes[2:]
        assert 20_000 < int(str(sizes[0])) + int(str(sizes[1])) <= 30_000
        assert await store.find_epoch(digests[-1], "a")
        with pytest.raises(RouteNotFound):
            await store.find_epoch(digests[0], "a")


async def test_what_no_receipt_cites_is_gone_after_a_restart(tmp_path: Path) -> None:
    other = hashlib.sha256(b"other").digest()
    async with running(tmp_path) as store:
        store.add_epoch(epoch(1))
        store.add_epoch(epoch(2))
        store.add(receipt(1, evidence=(epoch(1).evidence_digest,)))
        store.add_report(KEYSET, b"cited")
        store.add_report(other, b"never cited")
        assert await store.find_report(other) == b"never cited"
        await store.written()
        assert await store.find_report(other) == b"never cited"
    async with running(tmp_path) as store:
        assert await store.find_report(KEYSET) == b"cited"
        assert await store.find_report(other) is None
    assert rows(tmp_path, "SELECT count(*) FROM evidence") == [(1,)]
    assert rows(tmp_path, "SELECT count(*) FROM part") == [(1,)]


async def test_a_report_goes_with_the_last_receipt_of_its_keyset_unless_it_is_of_this_run(
    tmp_path: Path,
) -> None:
    clock, limits = Clock(), ReceiptLimits(max_age_s=100.0)
    for expected in (b"report", None):
        async with running(tmp_path, limits, now=clock) as store:
            if expected is not None:
                store.add_report(KEYSET, expected)
                store.add(receipt(1))
                await store.written()
                clock.at += 50
                store.add(receipt(2))
                await store.written()
            clock.at += 101
            store.add(replace(receipt(3), keyset_digest=bytes(32)))
            await store.written()
            if expected is not None:
                store.add(receipt(4))
                await store.written()
            assert await store.find_report(KEYSET) == expected


# -------------------------------------------------------------------------------------- bounds


async def test_old_receipts_expire(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, ReceiptLimits(max_age_s=100.0), now=clock) as store:
        store.add(receipt(1))
        store.begin(receipt(2).receipt_id, chat_id=None, tenant="a")
        await store.written()
        clock.at += 99
        store.add(receipt(3))
        await store.written()
        assert await kept(store, range(1, 4)) == [1, 3]
        clock.at += 2
        store.add(receipt(4))
        await store.written()
        assert await kept(store, range(1, 5)) == [3, 4]
        assert rows(tmp_path, "SELECT count(*) FROM receipt") == [(2,)]


async def test_the_oldest_go_when_there_are_too_many_in_all(tmp_path: Path) -> None:
    async with running(tmp_path, ReceiptLimits(max_count=10)) as store:
        for number in range(25):
            store.add(receipt(number))
        await store.written()
        assert await kept(store, range(25)) == list(range(15, 25))
        store.add(receipt(25))
        await store.written()
        assert await kept(store, range(26)) == list(range(16, 26))
    async with running(tmp_path, ReceiptLimits(max_count=3)) as store:  # lowered meanwhile
        store.add(receipt(26))
        await store.written()
        assert await kept(store, range(27)) == [24, 25, 26]


async def test_a_key_that_has_too_many_loses_its_own(tmp_path: Path) -> None:
    async with running(tmp_path, ReceiptLimits(max_per_tenant=5)) as store:
        store.add(receipt(100, tenant="b"))
        for number in range(12):
            store.add(receipt(number))
        await store.written()
        assert await kept(store, range(12)) == list(range(7, 12))
        assert await kept(store, range(100, 101), "b") == [100]


async def test_the_database_is_bounded_in_bytes(tmp_path: Path) -> None:
    limits = ReceiptLimits(max_bytes=1 << 20)
    async with running(tmp_path, limits) as store:
        for number in range(1500):  # of two KiB
            store.add(receipt(number))
            if number % 100 == 0:
                await store.written()
        await store.written()
        left = await kept(store, range(1500))
        assert 50 < len(left) < 512
        assert left[-1] == 1499
    assert (tmp_path / FILE).stat().st_size < 3 << 20


async def test_pruning_is_done_in_small_steps(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        for number in range(3 * PRUNE_ROWS):
            store.add(receipt(number))
        await store.written()
    async with running(tmp_path, ReceiptLimits(max_count=1)) as store:
        counts = []
        for number in range(5):
            store.add(receipt(10_000 + number))
            await store.written()
            counts += [int(str(row)) for (row,) in rows(tmp_path, "SELECT count(*) FROM receipt")]
        # One step when it started, one for the first receipt.
        assert counts[0] >= 3 * PRUNE_ROWS - 2 * (PRUNE_ROWS + 2)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 1


# ------------------------------------------------------------------------------ disks that fail


async def test_a_file_that_is_no_database_is_set_aside_and_service_goes_on(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, whatever its name is " * 100)
    with capture_logs() as lines:
        async with running(tmp_path) as store:
            store.add(receipt(1))
            await store.written()
            assert await store.find(receipt(1).receipt_id, "a") == receipt(1).data
    assert [line["event"] for line in lines] == ["receipts_set_aside"]
    assert lines[0]["file"] == FILE + ".damaged"
    assert (tmp_path / (FILE + ".damaged")).read_bytes().startswith(b"not a database")
    async with running(tmp_path) as store:
        assert await store.find(receipt(1).receipt_id, "a") == receipt(1).data


async def test_damage_inside_a_database_sets_it_aside(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        for number in range(50):
            store.add(receipt(number))
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom((tmp_path / FILE).stat().st_size - 4096))
    with capture_logs() as lines:
        async with running(tmp_path) as store:
            store.add(receipt(100))
            await store.written()
            assert await kept(store, range(40, 101)) == [100]
    assert [line["event"] for line in lines] == ["receipts_set_aside"]


@pytest.mark.parametrize("change", ["DROP TABLE citation", "PRAGMA user_version = 99"])
async def test_a_database_of_another_form_is_set_aside(tmp_path: Path, change: str) -> None:
    async with running(tmp_path) as store:
        store.add(receipt(1))
    rows(tmp_path, change)
    with capture_logs() as lines:
        async with running(tmp_path) as store:
            store.add(receipt(2))
            await store.written()
            assert await kept(store, range(1, 3)) == [2]
    assert [line["event"] for line in lines] == ["receipts_set_aside"]


async def test_a_folder_that_cannot_be_used_is_said_once_and_memory_serves_until_it_can(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = RATE
    folder = tmp_path / "state"
    folder.write_text("a file is in the way")
    with capture_logs() as lines:
        async with running(folder) as store:
            store.add(receipt(1))
            await store.written()  # does not wait for a disk that fails
            await trio.sleep(3 * RETRY_S)
            assert await store.find(receipt(1).receipt_id, "a") == receipt(1).data
            with pytest.raises(Overloaded, match="disk"):
                await store.find(receipt(2).receipt_id, "a")
            assert [line["event"] for line in lines] == ["receipts_disk_fails"]
            assert str(tmp_path) not in repr(lines)
            folder.unlink()
            await trio.sleep(2 * RETRY_S)
            assert lines[1:] == [{"event": "receipts_written_again", "log_level": "info"}]
            assert rows(folder, "SELECT count(*) FROM receipt") == [(1,)]
    assert len(lines) == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is to a process: writing beyond here fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_disk_that_fills_up_is_said_once_and_nothing_is_lost_when_it_has_room_again(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = RATE
    with capture_logs() as lines:
        async with running(tmp_path) as store:
            store.add(receipt(0))
            await store.written()
            with files_of_at_most(64 << 10):
                for number in range(1, 101):
                    store.add(receipt(number))
                await trio.sleep(3 * RETRY_S)
                store.add(receipt(101))
                assert await kept(store, range(102)) == list(range(102))
                assert [line["event"] for line in lines] == ["receipts_disk_fails"]
            await trio.sleep(2 * RETRY_S)
            assert rows(tmp_path, "SELECT count(*) FROM receipt") == [(102,)]
            assert await kept(store, range(102)) == list(range(102))
    assert [line["event"] for line in lines] == ["receipts_disk_fails", "receipts_written_again"]


async def test_memory_is_bounded_while_the_disk_fails_and_the_newest_stay(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.write_text("a file is in the way")
    size = len(receipt(0).data)
    with capture_logs() as lines:
        async with running(folder, ReceiptLimits(max_memory_bytes=10 * size)) as store:
            for number in range(50):
                store.add(receipt(number))
                if number == 20:
                    await store.written()
            for number in range(40, 50):
                assert await store.find(receipt(number).receipt_id, "a")
            with pytest.raises(Overloaded):
                await store.find(receipt(39).receipt_id, "a")
    events = [line["event"] for line in lines]
    assert events == ["receipts_disk_fails", "receipts_dropped", "receipts_not_written"]
    assert lines[2]["receipts"] == 10


async def test_evidence_in_memory_is_bounded_too_and_goes_after_receipts(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.write_text("a file is in the way")
    epochs = [epoch(number, chain=b"chain" * 400) for number in range(10)]  # of 4 KB each
    digests = [one.evidence_digest for one in epochs]
    with capture_logs() as lines:
        async with running(folder, ReceiptLimits(max_memory_bytes=16_000)) as store:
            for one in epochs:
                store.add_epoch(one)
            store.add(receipt(1, evidence=(digests[0], digests[9])))
            assert await store.find_epoch(digests[9], "a")
            with pytest.raises(Overloaded):
                await store.find_epoch(digests[0], "a")
    assert lines[1]["event"] == "receipts_dropped"


# ------------------------------------------------------------------------- the end of the service

SERVICE = """
import sys, time, trio
from pathlib import Path
from tests.unit.test_receipts import KEYSET, a_log, receipt
from appliance.serving.receipts import ReceiptStore

async def main():
    store = ReceiptStore(Path(sys.argv[1]), now=time.time, log=a_log())
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for number in range(300):
            one = receipt(number)
            store.begin(one.receipt_id, chat_id=one.chat_id, tenant="a")
            if number % 3:
                store.add(one)
            if number % 10 == 0:
                await store.written()
        await store.written()
        print("written", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_sigkill_loses_open_exchanges_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here
        [sys.executable, "-c", SERVICE, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    ) as service:
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == b"written\n"
        finally:
            service.send_signal(signal.SIGKILL)
    assert service.returncode == -signal.SIGKILL
    with capture_logs() as lines:
        async with running(tmp_path, now=time.time) as store:
            for number in range(300):
                one = receipt(number)
                if number % 3:
                    assert await store.find(one.receipt_id, "a") == one.data
                else:
                    with pytest.raises(ReceiptLost):
                        await store.find(str(one.chat_id), "a")
    assert lines == []


async def test_what_was_added_last_is_written_before_the_end(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        await trio.sleep(2 * BATCH_S)
        for number in range(20):
            store.add(receipt(number))
    async with running(tmp_path) as store:
        assert await kept(store, range(20)) == list(range(20))


async def test_a_batch_that_is_cut_off_by_the_end_is_written_all_the_same(tmp_path: Path) -> None:
    """Cancelled at every moment of its writing, from before the thread starts to after it ends."""
    for delay_ms in range(12):
        folder = tmp_path / str(delay_ms)
        async with running(folder) as store:
            store.begin("rcpt-open", chat_id=None, tenant="a")
            for number in range(200):
                store.add(receipt(number, evidence=(epoch(1).evidence_digest,)))
            store.add_epoch(epoch(1))
            await trio.sleep(BATCH_S + delay_ms / 1000)
        assert rows(folder, "SELECT count(*) FROM receipt") == [(201,)]
        assert rows(folder, "SELECT count(*) FROM citation") == [(200,)]


async def test_another_process_that_holds_the_database_delays_the_end_but_does_not_stop_it(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as store:
        store.add(receipt(1))
        await store.written()
        holder = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        store.add(receipt(2))
    holder.execute("ROLLBACK")
    holder.close()


# ----------------------------------------------------------------------------------------- cost


async def test_ten_thousand_receipts_a_minute_are_no_load(tmp_path: Path) -> None:
    """A minute's worth at once, each with its beginning: measured 0.6 s of 60, most of it in the
    thread; the bound leaves a slow machine ten times that."""
    started = time.perf_counter()
    adding: list[float] = []
    async with running(tmp_path) as store:
        for number in range(10_000):
            one = receipt(number, tenant=str(number % 7), evidence=(bytes([number % 50]) * 32,))
            before = time.perf_counter()
            store.begin(one.receipt_id, chat_id=one.chat_id, tenant=one.tenant)
            store.add(one)
            adding.append(time.perf_counter() - before)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
        await store.written()
    assert time.perf_counter() - started < 12.0
    assert statistics.median(adding) < 1e-3  # finalisation's share of the 1 ms
    assert rows(tmp_path, "SELECT count(*) FROM receipt WHERE body IS NOT NULL") == [(10_000,)]

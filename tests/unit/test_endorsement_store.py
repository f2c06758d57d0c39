"""endorsements.store: files of operators and of ours, and what happens to bad ones."""

from __future__ import annotations

import datetime
import os
import stat
from pathlib import Path

import pytest
import structlog
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from appliance.endorsements.store import (
    MAX_VALUE_BYTES,
    EndorsementStore,
    Kind,
    Limits,
    Stored,
)
from appliance.errors import Malformed

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
RIM = "NV_GPU_DRIVER_GH100_595.71.05"


def open_store(folder: Path, limits: Limits | None = None) -> EndorsementStore:
    return EndorsementStore(folder / "endorsements", log=structlog.get_logger(), limits=limits)


def entry(folder: Path, kind: str = "rim", name: str = RIM) -> Path:
    return folder / "endorsements" / "cache" / kind / f"{name}.entry"


async def test_what_is_put_is_found_by_another_process(tmp_path: Path) -> None:
    await open_store(tmp_path).put("rim", RIM, b"<xml/>\n", expires=NOW + HOUR)
    (found,) = await open_store(tmp_path).find("rim", RIM, at=NOW)
    assert found == Stored(b"<xml/>\n", "cache", NOW + HOUR)
    assert await open_store(tmp_path).find("ocsp", RIM, at=NOW) == ()


async def test_an_expired_entry_is_not_found_and_can_be_replaced(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.put("ocsp", "ab", b"old", expires=NOW)
    assert await store.find("ocsp", "ab", at=NOW) == ()
    await store.put("ocsp", "ab", b"new", expires=NOW + HOUR)
    assert [one.value for one in await store.find("ocsp", "ab", at=NOW)] == [b"new"]


async def test_files_of_the_operator_come_first_and_are_left_alone(tmp_path: Path) -> None:
    theirs: dict[Kind, tuple[str, str]] = {
        "rim": (RIM, f"rim/{RIM}.xml"),
        "ocsp": ("ab" * 32, f"ocsp/{'ab' * 32}.der"),
        "amd": ("Milan/00ff-3-0-8-115", "amd/Milan/00ff-3-0-8-115.der"),
        "intel": ("b0c06f000000-platform", "intel/b0c06f000000-platform.json"),
    }
    store = open_store(tmp_path, Limits(entries=1, total_bytes=1000))
    for kind, (name, path) in theirs.items():
        file = tmp_path / "endorsements" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"theirs")
        assert await store.find(kind, name, at=NOW) == (Stored(b"theirs", "operator", None),)
        await store.put(kind, name, b"ours", expires=None)
        found = await store.find(kind, name, at=NOW)
        assert [(one.value, one.origin) for one in found] == [
            (b"theirs", "operator"),
            (b"ours", "cache"),
        ]
        assert file.read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data.replace(b"value", b"vlaue"),
        lambda data: b"",
        lambda data: b"{}" + data,
        lambda data: data.replace(b'"rim"', b'"amd"'),
        lambda data: data.replace(b"595.71.05", b"595.71.06"),
        lambda data: data.replace(b"}\n", b',"more":1}\n'),
        lambda data: bytes(MAX_VALUE_BYTES + 5000),
    ],
)
async def test_a_damaged_entry_is_set_aside_and_named(tmp_path: Path, damage: object) -> None:
    store = open_store(tmp_path)
    await store.put("rim", RIM, b"value", expires=NOW + HOUR)
    file = entry(tmp_path)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with capture_logs() as lines:
        assert await store.find("rim", RIM, at=NOW) == ()
        assert await store.find("rim", RIM, at=NOW) == ()
    assert [(line["event"], line["name"]) for line in lines] == [
        ("endorsement_set_aside", f"rim/{RIM}")
    ]
    assert not file.exists()
    assert (tmp_path / "endorsements/cache/corrupt" / f"rim-{RIM}").exists()
    await store.put("rim", RIM, b"value", expires=None)
    assert len(await store.find("rim", RIM, at=NOW)) == 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(junk=st.binary(max_size=200))
def test_no_bytes_on_disk_are_taken_for_an_entry(tmp_path: Path, junk: bytes) -> None:
    async def main() -> None:
        entry(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        entry(tmp_path).write_bytes(junk)
        with capture_logs():
            assert await open_store(tmp_path).find("rim", RIM, at=NOW) == ()

    trio.run(main)


NO_NAMES = ("", "..", "../x", "a/../b", "/etc/passwd", "a//b", ".hidden", "a\0b", "a\nb", "ä")


@pytest.mark.parametrize("name", [*NO_NAMES, "a" * 201, "a/b/c/d"])
async def test_a_name_that_no_vendor_gives_is_malformed(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path)
    with pytest.raises(Malformed):
        await store.find("rim", name, at=NOW)
    with pytest.raises(Malformed):
        await store.put("rim", name, b"", expires=None)
    assert list(tmp_path.iterdir()) == []


async def test_folders_and_files_are_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        await open_store(tmp_path).put("amd", "Milan/x", b"value", expires=None)
    finally:
        os.umask(before)
    made = sorted((tmp_path / "endorsements").rglob("*"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert modes == {"cache": 0o700, "amd": 0o700, "Milan": 0o700, "x.entry": 0o600}
    assert stat.S_IMODE((tmp_path / "endorsements").stat().st_mode) == 0o700


async def test_count_and_size_are_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    store = open_store(tmp_path, Limits(entries=3, total_bytes=1 << 20))
    for number in range(5):
        await store.put("ocsp", f"n{number}", b"x", expires=None)
        os.utime(entry(tmp_path, "ocsp", f"n{number}"), (number, number))
    left = [n for n in range(5) if await store.find("ocsp", f"n{n}", at=NOW)]
    assert left == [2, 3, 4]
    store = open_store(tmp_path, Limits(entries=100, total_bytes=2000))
    await store.put("ocsp", "big", bytes(1500), expires=None)
    assert [n for n in range(5) if await store.find("ocsp", f"n{n}", at=NOW)] in ([4], [3, 4])
    assert await store.find("ocsp", "big", at=NOW)


async def test_what_was_set_aside_counts_too(tmp_path: Path) -> None:
    store = open_store(tmp_path, Limits(entries=2, total_bytes=1 << 20))
    for number in range(6):
        await store.put("ocsp", f"n{number}", b"x", expires=None)
        entry(tmp_path, "ocsp", f"n{number}").write_bytes(b"damaged")
        with capture_logs():
            await store.find("ocsp", f"n{number}", at=NOW)
    await store.put("ocsp", "last", b"x", expires=None)
    files = [path for path in (tmp_path / "endorsements").rglob("*") if path.is_file()]
    assert len(files) == 2


async def test_a_value_over_the_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Malformed):
        await open_store(tmp_path).put("rim", RIM, bytes(MAX_VALUE_BYTES + 1), expires=None)


async def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "endorsements" / "rim"
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{RIM}.xml")
    with capture_logs() as lines, trio.fail_after(5):
        assert await open_store(tmp_path).find("rim", RIM, at=NOW) == ()
    assert lines[0]["event"] == "endorsement_unreadable"


async def test_a_folder_that_cannot_be_written_is_named_and_survived(tmp_path: Path) -> None:
    (tmp_path / "endorsements").write_bytes(b"a file, not a folder")
    store = open_store(tmp_path)
    with capture_logs() as lines:
        await store.put("rim", RIM, b"value", expires=None)
        assert await store.find("rim", RIM, at=NOW) == ()
    assert [(line["event"], line["name"]) for line in lines] == [
        ("endorsement_not_kept", f"rim/{RIM}")
    ]


async def test_readers_see_the_old_bytes_or_the_new_ones(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    values = [bytes((number,)) * 200_000 for number in range(8)]
    await store.put("rim", RIM, values[0], expires=None)
    seen: set[bytes] = set()

    async def write(value: bytes) -> None:
        await store.put("rim", RIM, value, expires=None)

    async with trio.open_nursery() as nursery:
        for value in values:
            nursery.start_soon(write, value)
        for _ in range(40):
            (found,) = await store.find("rim", RIM, at=NOW)
            seen.add(found.value)
    assert seen <= set(values)
    left = [path.name for path in (tmp_path / "endorsements/cache/rim").iterdir()]
    assert left == [f"{RIM}.entry"]

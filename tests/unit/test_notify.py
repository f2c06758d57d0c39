"""What systemd hears, on real datagram sockets."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import pytest

from appliance.notify import SEND_S, Notifier


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """A socket as systemd has one; it is read only when a test does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        receiver.settimeout(5)
        yield receiver


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"@dcv-{secrets.token_hex(8)}" if request.param == "abstract" else str(tmp_path / "notify")
    )


@pytest.mark.parametrize(
    ("say", "datagram"),
    [
        (Notifier.ready, b"READY=1"),
        (Notifier.watchdog, b"WATCHDOG=1"),
        (Notifier.stopping, b"STOPPING=1"),
        (lambda notifier: notifier.status("serving m"), b"STATUS=serving m"),
    ],
)
def test_a_message_is_one_datagram_at_a_path_or_an_abstract_name(
    address: str, say: Callable[[Notifier], None], datagram: bytes
) -> None:
    with manager(address) as receiver:
        say(Notifier(address=address))
        assert receiver.recv(4096) == datagram


@pytest.mark.parametrize(
    ("text", "datagram"),
    [
        ("one\nREADY=1", b"STATUS=one READY=1"),
        ("  a \t b\r\n", b"STATUS=a b"),
        ("caf\u00e9", "STATUS=café".encode()),
        ("broken \ud800 text", b"STATUS=broken ? text"),
        ("", b"STATUS="),
    ],
)
def test_a_status_is_one_line_whatever_it_says(tmp_path: Path, text: str, datagram: bytes) -> None:
    address = str(tmp_path / "notify")
    with manager(address) as receiver:
        Notifier(address=address).status(text)
        assert receiver.recv(4096) == datagram


def test_nobody_is_told_where_systemd_did_not_start_us() -> None:
    Notifier().ready()


@pytest.mark.parametrize("address", ["/nonexistent/notify", "x" * 500, "@dcv-nobody-listens", "/"])
def test_a_manager_that_does_not_listen_does_not_stop_us(address: str) -> None:
    notifier = Notifier(address=address)
    notifier.ready()
    notifier.status("x" * (1 << 22))  # more than a datagram holds


def test_a_manager_that_does_not_read_holds_us_up_for_a_moment_only(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with manager(address) as receiver:
        notifier = Notifier(address=address)
        began = perf_counter()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    sender.sendto(b"fill", address)
        notifier.ready()
        assert perf_counter() - began < SEND_S + 5
        assert receiver.recv(4096) == b"fill"


# ---------------------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Notifier()),
        ({"NOTIFY_SOCKET": ""}, Notifier()),
        ({"NOTIFY_SOCKET": "/run/notify"}, Notifier("/run/notify")),
        ({"NOTIFY_SOCKET": "@abstract"}, Notifier("@abstract")),
        ({"WATCHDOG_USEC": "30000000"}, Notifier(watchdog_s=30.0)),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "7"}, Notifier(watchdog_s=0.5)),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, Notifier()),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, Notifier()),
        ({"WATCHDOG_USEC": "0"}, Notifier()),
        ({"WATCHDOG_USEC": ""}, Notifier()),
        ({"WATCHDOG_USEC": "-1"}, Notifier()),
        ({"WATCHDOG_USEC": "1e6"}, Notifier()),
        ({"WATCHDOG_USEC": "\u00b2"}, Notifier()),
        ({"WATCHDOG_PID": "7"}, Notifier()),
    ],
)
def test_what_systemd_told_is_read_from_the_environment(
    environment: dict[str, str], expected: Notifier
) -> None:
    assert Notifier.from_environment(environment, pid=7) == expected

"""What a process tree listens on, from real sockets and from tables as kernels print them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from appliance.engine.sockets import (
    ListeningSocket,
    parse_tcp_table,
    process_tree,
    refuse_exposed,
)
from appliance.errors import EngineExposed, Malformed

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = (
    HEADER
    + "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 41001 1 0\n"
    + "   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41002 1 0\n"
    + "   2: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 41003 1 0\n"
    + "   3: 3501A8C0:01BB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41004 1 0\n"
)
TCP6 = (
    HEADER
    + "   0: 00000000000000000000000001000000:0277 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 42001 1\n"
    + "   1: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 42002 1\n"
    + "   2: 0000000000000000FFFF00000100007F:1F91 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 42003 1\n"
    + "   3: 0000000000000000FFFF000001020304:1F92 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 42004 1\n"
)

little_endian = pytest.mark.skipif(
    sys.byteorder != "little", reason="the table is of such a machine"
)


# ------------------------------------------------------------------------------- the table


@little_endian
def test_listening_sockets_are_read_from_an_ipv4_table() -> None:
    assert parse_tcp_table(TCP) == [
        ListeningSocket(ip_address("127.0.0.1"), 8080, 41001),
        ListeningSocket(ip_address("0.0.0.0"), 22, 41002),
        ListeningSocket(ip_address("192.168.1.53"), 443, 41004),
    ]


@little_endian
def test_listening_sockets_are_read_from_an_ipv6_table() -> None:
    assert parse_tcp_table(TCP6) == [
        ListeningSocket(ip_address("::1"), 631, 42001),
        ListeningSocket(ip_address("::"), 80, 42002),
        ListeningSocket(ip_address("::ffff:127.0.0.1"), 8081, 42003),
        ListeningSocket(ip_address("::ffff:4.3.2.1"), 8082, 42004),
    ]


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.5.6.7", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("fe80::1", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(address: str, loopback: bool) -> None:
    assert ListeningSocket(ip_address(address), 1, 1).is_loopback is loopback


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0:",
        "0: 0100007F 0:0 0A 0:0 0:0 0 0 0 1",
        "0: 0100007F:1F90",
        "0: 0100007:1F90 0:0 0A 0:0 0:0 0 0 0 1",
        "0: 0100007F00:1F90 0:0 0A 0:0 0:0 0 0 0 1",
        "0: 0100007F:port 0:0 0A 0:0 0:0 0 0 0 1",
        "0: 0100007F:1F90 0:0 0A 0:0 0:0 0 0 0 inode",
        "0: 0100007F:1F90 0:0 0A 0:0 0:0",
    ],
)
def test_a_line_of_another_form_is_malformed(line: str) -> None:
    with pytest.raises(Malformed, match="TCP table"):
        parse_tcp_table(f"{HEADER}{line}\n")


# ----------------------------------------------------------------------- a made-up /proc folder


def made_up_proc(root: Path, processes: dict[int, tuple[int, list[str]]]) -> Path:
    """A /proc with these processes: pid to parent and what its descriptors are."""
    (root / "net").mkdir()
    (root / "net" / "tcp").write_text(TCP)
    (root / "net" / "tcp6").write_text(TCP6)
    (root / "self").mkdir()
    for pid, (parent, links) in processes.items():
        (root / str(pid) / "fd").mkdir(parents=True)
        (root / str(pid) / "stat").write_text(f"{pid} (a (mean) 1 2) name) S {parent} 1 1 0\n")
        for number, link in enumerate(links):
            (root / str(pid) / "fd" / str(number)).symlink_to(link)
    return root


@little_endian
def test_sockets_of_descendants_count_and_those_of_others_do_not(tmp_path: Path) -> None:
    proc = made_up_proc(
        tmp_path,
        {
            10: (1, ["/dev/null", "socket:[41001]"]),
            11: (10, ["pipe:[5]", "socket:[42001]"]),
            12: (11, ["socket:[42003]", "socket:[41003]", "socket:[99999]"]),
            13: (1, ["socket:[41002]", "socket:[42002]"]),
        },
    )
    assert sorted(process_tree(10, proc=proc)) == [10, 11, 12]
    assert [entry.inode for entry in refuse_exposed(10, proc=proc)] == [41001, 42001, 42003]


@little_endian
@pytest.mark.parametrize(
    ("inode", "where"),
    [
        (41002, r"0\.0\.0\.0 port 22"),
        (41004, r"192\.168\.1\.53 port 443"),
        (42002, ":: port 80"),
        (42004, "port 8082"),
    ],
)
def test_a_descendants_socket_beyond_loopback_is_refused_and_named(
    tmp_path: Path, inode: int, where: str
) -> None:
    proc = made_up_proc(tmp_path, {10: (1, []), 11: (10, []), 12: (11, [f"socket:[{inode}]"])})
    with pytest.raises(EngineExposed, match=where):
        refuse_exposed(10, proc=proc)


@little_endian
def test_a_machine_without_ipv6_has_no_table_of_it(tmp_path: Path) -> None:
    proc = made_up_proc(tmp_path, {10: (1, ["socket:[41001]"])})
    (proc / "net" / "tcp6").unlink()
    assert [entry.inode for entry in refuse_exposed(10, proc=proc)] == [41001]


def test_processes_and_descriptors_that_go_away_meanwhile_are_left_out(tmp_path: Path) -> None:
    proc = made_up_proc(tmp_path, {10: (1, []), 11: (10, [])})
    (proc / "12").mkdir()  # its stat is gone
    (proc / "11" / "fd").rmdir()
    (proc / "10" / "fd" / "3").touch()  # no link any more
    assert sorted(process_tree(10, proc=proc)) == [10, 11]
    assert refuse_exposed(10, proc=proc) == []


# -------------------------------------------------------------------------------- real sockets


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip(f"this machine has no {address}")
        listener.listen()
        yield listener


def inode_of(held: socket.socket) -> int:
    return os.fstat(held.fileno()).st_ino


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_our_own_loopback_sockets_are_found_and_pass(address: str) -> None:
    with listening(address) as listener:
        found = {entry.inode: entry for entry in refuse_exposed(os.getpid())}
        entry = found[inode_of(listener)]
        assert entry.port == listener.getsockname()[1]
        assert entry.is_loopback


@contextmanager
def child_holding(*held: socket.socket) -> Iterator[int]:
    """A process with these sockets open, and nothing else to do; its pid."""
    descriptors = [each.fileno() for each in held]
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=descriptors,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_child_that_listens_on_every_interface_is_refused(address: str) -> None:
    with ExitStack() as stack:
        local = stack.enter_context(listening("127.0.0.1"))
        assert inode_of(local) in {
            entry.inode for entry in refuse_exposed(stack.enter_context(child_holding(local)))
        }
        exposed = stack.enter_context(listening(address))
        pid = stack.enter_context(child_holding(local, exposed))
        port = exposed.getsockname()[1]
        with pytest.raises(EngineExposed, match=f"listens on {address} port {port}"):
            refuse_exposed(pid)


def test_an_established_connection_is_no_listening_socket() -> None:
    with (
        listening("127.0.0.1") as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        accepted, _ = listener.accept()
        with accepted:
            found = {entry.inode for entry in refuse_exposed(os.getpid())}
            assert inode_of(listener) in found
            assert not found & {inode_of(client), inode_of(accepted)}


def test_a_process_that_is_gone_listens_on_nothing() -> None:
    with child_holding() as pid:
        pass
    assert refuse_exposed(pid) == []

"""Which TCP sockets a process tree listens on, from the kernel's own tables (proc(5)).

SGLang opens about ten, and torch's TCP store used to open one on every interface whatever the
command line said. What it was told is therefore not enough: what it does is looked up.
"""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import EngineExposed, Malformed

_TCP_LISTEN = "0A"  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A listening TCP socket: its address, and its inode, which names it in /proc/PID/fd."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    inode: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; IPv4-mapped addresses count as IPv4."""
        mapped = getattr(self.address, "ipv4_mapped", None)
        return (mapped or self.address).is_loopback


def refuse_exposed(pid: int, *, proc: Path = Path("/proc")) -> list[ListeningSocket]:
    """Check that everything `pid` and its descendants listen on is loopback; returns it all.

    Raises:
        EngineExposed: a socket is reachable from elsewhere. The message names address and port.
    """
    owned = _socket_inodes(process_tree(pid, proc=proc), proc=proc)
    tables = [proc / "net" / "tcp"]
    if (proc / "net" / "tcp6").exists():  # not where IPv6 is turned off
        tables.append(proc / "net" / "tcp6")
    table = [
        entry
        for path in tables
        for entry in parse_tcp_table(path.read_text(encoding="ascii"))
        if entry.inode in owned
    ]
    for entry in table:
        if not entry.is_loopback:
            raise EngineExposed(
                f"expected the engine to listen on loopback only, it listens on "
                f"{entry.address} port {entry.port}"
            )
    return table


def parse_tcp_table(text: str) -> list[ListeningSocket]:
    """The listening sockets of a /proc/net/tcp or tcp6 table.

    Addresses are hexadecimal in 32-bit words of the machine's byte order (proc(5)).

    Raises:
        Malformed: a line is not of the kernel's form.
    """
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        try:
            address, port = fields[1].split(":")
            if fields[3] != _TCP_LISTEN:
                continue
            words = bytes.fromhex(address)
            packed = b"".join(
                int.from_bytes(words[i : i + 4], sys.byteorder).to_bytes(4, "big")
                for i in range(0, len(words), 4)
            )
            found.append(
                ListeningSocket(ipaddress.ip_address(packed), int(port, 16), int(fields[9]))
            )
        except (IndexError, ValueError) as error:
            raise Malformed("expected a line of the kernel's TCP table") from error
    return found


def process_tree(pid: int, *, proc: Path = Path("/proc")) -> list[int]:
    """`pid` and its descendants, those that exited meanwhile left out."""
    children: dict[int, list[int]] = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            # The name in parentheses may hold anything; the fields after the last one may not.
            parent = int(stat[stat.rfind(")") + 2 :].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, generation = [pid], [pid]
    while generation:
        generation = [child for parent in generation for child in children.get(parent, [])]
        found += generation
    return found


def _socket_inodes(pids: list[int], *, proc: Path) -> set[int]:
    inodes = set()
    for pid in pids:
        links = _readable_links(proc / str(pid) / "fd")
        inodes |= {int(link[8:-1]) for link in links if link.startswith("socket:[")}
    return inodes


def _readable_links(folder: Path) -> list[str]:
    """What a process's descriptors are; it may exit or close them while we look."""
    found: list[str] = []
    try:
        entries = list(folder.iterdir())
    except OSError:
        return found
    for entry in entries:
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue
    return found

"""sd_notify(3): telling systemd that we are ready, alive, stopping, and what we are doing.

The protocol is one datagram of `KEY=value` lines to the socket that systemd named in
NOTIFY_SOCKET; the caller reads that variable, as it reads every other fact of the environment.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

SEND_S = 0.2
"""For one datagram. It blocks the event loop, so it is short; systemd reads at once."""


@dataclass(frozen=True, slots=True)
class Notifier:
    """Sends to systemd, or nowhere when it did not start us.

    Attributes:
        address: of the datagram socket; a leading `@` means the abstract namespace.
        watchdog_s: how often systemd wants to hear from us, or None.
    """

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, pid: int) -> Notifier:
        """What systemd told this process (sd_notify(3), sd_watchdog_enabled(3))."""
        watchdog_s = None
        micros = environment.get("WATCHDOG_USEC", "")
        if micros.isdecimal() and environment.get("WATCHDOG_PID", str(pid)) == str(pid):
            watchdog_s = int(micros) / 1e6
        return cls(address=environment.get("NOTIFY_SOCKET") or None, watchdog_s=watchdog_s or None)

    def ready(self) -> None:
        """The start is complete."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Still alive."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        """Best effort: a manager that does not listen must not stop the service, one whose queue
        is full (ten datagrams, net.unix.max_dgram_qlen) is waited for a moment."""
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_S)
            try:
                sender.sendto(message.encode("utf-8", errors="replace"), address)
            except OSError:
                return

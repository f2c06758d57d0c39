"""A process between us and the engine, so that nothing of the engine outlives us.

    gateway ──control socket── guardian ──fork── engine main ── scheduler, detokenizer, …

The gateway may be killed with SIGKILL, and a prctl death signal alone would not do: it belongs to
the *thread* that forked, is cleared by the kernel on some execs, and is not inherited by
grandchildren. So the guardian

- holds one end of a socket pair: its end of file means that the gateway is gone;
- is a child subreaper: a descendant whose parent died becomes the guardian's child, whatever
  session or group it moved to, and can be found and killed;
- gives the engine a session of its own and a death signal, for the case that the guardian itself
  is killed.

Control protocol, one byte commands from the gateway: `T` SIGTERM to the engine's main process
only (a signal to the group makes SGLang crash instead of drain), `K` SIGKILL to everything,
`S` remember which shared memory files the engine has mapped. The guardian answers in lines:
`pid N`, then `exit STATUS` (as in `subprocess`: negative for a signal) after nothing is left.

It runs isolated (`python -I -S`), on the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY = "/dev/shm/"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(control_fd: int, command: list[str]) -> int:
    """Run `command` under guard; returns when it and all its descendants are gone."""
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for ignored in ENDING:
        signal.signal(ignored, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    engine = _start(command)
    _tell(control, f"pid {engine}\n")
    status, mapped = _watch(control, wake_read, engine)
    _kill_everything(mapped)
    for path in mapped:
        _unlink(path)
    _tell(control, f"exit {status}\n")
    return 0


def _start(command: list[str]) -> int:
    guardian = os.getpid()
    # Blocked, a signal waits; ignored, as the child begins, an early SIGTERM would be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return pid
    try:
        os.setsid()
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:  # it died before the death signal was armed
            os._exit(127)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"cannot start the engine: {error.strerror}\n".encode())
    os._exit(127)


def _watch(control: socket.socket, wake: int, engine: int) -> tuple[int, set[str]]:
    """Serve commands until the engine's main process is gone; its status and shared memory."""
    mapped: set[str] = set()
    inputs: list[socket.socket | int] = [control, wake]
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if wake in ready:
            os.read(wake, 4096)
            if (status := _reap(engine)) is not None:
                return status, mapped
        if control in ready:
            commands = _receive(control)
            if not commands or b"K" in commands:
                inputs.remove(control)
                _kill_everything(mapped)
                return -signal.SIGKILL, mapped
            if b"S" in commands:
                mapped |= _mapped_shared_memory()
            if b"T" in commands:
                _kill(engine, signal.SIGTERM)


def _reap(engine: int) -> int | None:
    """Collect every child that ended; the engine's exit status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == engine:
            found = os.waitstatus_to_exitcode(status)


def _kill_everything(mapped: set[str]) -> None:
    """SIGKILL all descendants until there is none: orphans of the killed become our children."""
    mapped |= _mapped_shared_memory()
    while True:
        for pid in _descendants():
            _kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (parent := _parent(name)) is not None:
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    generation = [os.getpid()]
    while generation:
        generation = [child for pid in generation for child in children.get(pid, [])]
        found += generation
    return found


def _parent(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    # proc(5): the name in parentheses may hold anything, the fields after the last one may not.
    return int(stat[stat.rfind(b")") + 2 :].split()[1])


def _mapped_shared_memory() -> set[str]:
    """Files that descendants have mapped, by the names these have now.

    A POSIX semaphore is made under a name that is gone at once and linked to its own, so the
    kernel calls it deleted; the inode tells which it is (glibc, sem_open).
    """
    found: set[str] = set()
    renamed: set[int] = set()
    for pid in _descendants():
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                for line in file:
                    # proc(5): address, permissions, offset, device, inode, and maybe a path.
                    inode, path = line.rstrip("\n").split(maxsplit=5)[-2:]
                    if not path.startswith(SHARED_MEMORY):
                        continue
                    if path.endswith(" (deleted)"):
                        renamed.add(int(inode))
                    else:
                        found.add(path)
        except OSError:
            continue
    with os.scandir(SHARED_MEMORY) as entries:
        return found | {entry.path for entry in entries if entry.inode() in renamed}


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _receive(control: socket.socket) -> bytes:
    try:
        return control.recv(64)
    except OSError:
        return b""


def _tell(control: socket.socket, line: str) -> None:
    try:
        control.sendall(line.encode())
    except OSError:
        return  # the gateway is gone; we are on our way out too


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

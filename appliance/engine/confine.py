"""Gives up what the engine does not need, then becomes the engine.

    guardian ── confine.py RULES COMMAND… ──exec── engine main ── scheduler, detokenizer, …

Run between the guardian and SGLang, in the process that will be SGLang, because what is given up
here is inherited and cannot be had back:

1. `no_new_privs`: no program that is executed later gains privileges (prctl(2)).
2. Landlock, where the kernel has it: no file outside the rules can be opened, whoever owns it. The
   gateway's receipts and its sockets' folder belong to the same user and are outside. A process in
   a Landlock domain cannot trace one outside of it either, and from ABI 6 on neither send it a
   signal nor connect to its abstract sockets (Documentation/userspace-api/landlock.rst).

What it does not do: TCP is not restricted (the engine listens on a port that is chosen at each
start), nor is connecting to a socket that has a path; who listens there looks at the caller.

RULES is JSON: `{"read": [PATH…], "write": [PATH…]}`. Below `read` files may be read and executed,
below `write` made, changed and removed but not executed; a path that is not there gives nothing.
A kernel without Landlock is said on standard error; anything else that fails ends the start with
status 127.

It runs isolated (`python -I -S`), on the standard library alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Iterable

PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h

SYS_LANDLOCK_CREATE_RULESET = 444  # these three have one number on every architecture
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

# linux/landlock.h, LANDLOCK_ACCESS_FS_*.
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

FIRST_ABI = MAKE_SYM | (MAKE_SYM - 1)
LATER = ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
"""What each later version of the interface can restrict as well."""

SCOPES_ABI = 6
SCOPES = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL

READ = READ_FILE | READ_DIR | EXECUTE
CHANGE = REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | REFER
WRITE = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | CHANGE
DEVICES = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | IOCTL_DEV
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""All that a rule may allow whose path is no folder."""


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr; an older kernel takes it shorter, or longer with zeros."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


LIBC = ctypes.CDLL(None, use_errno=True)


def main(rules: str, command: list[str]) -> int:
    """Restrict this process and replace it by `command`; returns only if that fails."""
    allowed = json.loads(rules)
    try:
        _call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        abi = landlock_abi()
        if abi:
            _restrict(abi, allowed["read"], allowed["write"])
        _say(f"confined by Landlock, ABI {abi}" if abi else "not confined: no Landlock here")
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        _say(f"cannot start the engine: {error.strerror}")
    return 127


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 where it has none, or was started without it.

    Raises:
        OSError: it does not say.
    """
    try:
        return _call(LIBC.syscall, SYS_LANDLOCK_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP}:
            return 0
        raise


def _restrict(abi: int, read: Iterable[str], write: Iterable[str]) -> None:
    handled = FIRST_ABI
    for version, access in LATER:
        handled |= access if abi >= version else 0
    attr = RulesetAttr(handled, 0, SCOPES if abi >= SCOPES_ABI else 0)
    ruleset = _call(
        LIBC.syscall, SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0
    )
    for path in read:
        _allow(ruleset, path, READ & handled)
    _allow(ruleset, "/dev", DEVICES & handled)
    for path in write:
        _allow(ruleset, path, WRITE & handled)
    _call(LIBC.syscall, SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        access &= OF_FILES
    rule = PathBeneathAttr(access, place)
    _call(LIBC.syscall, SYS_LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(place)


def _call(function: ctypes._NamedFuncPointer, number: int, *arguments: object) -> int:
    """A call of libc's that returns -1 and sets errno when it fails."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(function(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _say(line: str) -> None:
    os.write(2, line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

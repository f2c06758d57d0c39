"""The units as files: what they say, what they enable, and how exposed systemd finds them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from appliance.config import Engine, Limits
from appliance.errors import (
    ConfigError,
    EngineDied,
    EngineStartFailed,
    ListenError,
    ModelError,
    Unauthentic,
)
from appliance.operator_input import MAX_BYTES as MAX_OPERATOR_FILE
from appliance.wire.sealed import MAX_BYTES as MAX_SEALED_FILE
from image import build
from tests.image.unit_files import SYSTEMD, UNIT_SUFFIXES, directives, unit_files, values

ANALYZE = shutil.which("systemd-analyze")
TOOLS = build.plan("test", "metal").tools
"""Of the image's own Debian, in whose systemd some directives are known that ours has not."""

# What may stand in a unit of ours. A name that systemd does not know is ignored with a warning
# that nobody reads, and the hole it was to close stays open.
KNOWN = {
    "Unit": """
        After AllowIsolate Before ConditionPathExists Conflicts DefaultDependencies Description
        Documentation FailureAction OnFailure Requires StartLimitBurst StartLimitIntervalSec Wants
    """,
    "Service": """
        AmbientCapabilities CapabilityBoundingSet DeviceAllow DevicePolicy DynamicUser
        EnvironmentFile ExecPaths ExecStart ExecStartPost ExecStop Group IPAddressAllow IPAddressDeny
        InaccessiblePaths KeyringMode KillMode LimitCORE LimitMEMLOCK LimitNOFILE LoadCredential
        LockPersonality
        MemoryDenyWriteExecute NoExecPaths NoNewPrivileges NotifyAccess OOMPolicy PIDFile PrivateDevices
        PrivateIPC PrivateMounts PrivateNetwork PrivateTmp PrivateUsers ProcSubset ProtectClock
        ProtectControlGroups ProtectHome ProtectHostname ProtectKernelLogs ProtectKernelModules
        ProtectKernelTunables ProtectProc ProtectSystem ReadWritePaths RemainAfterExit RemoveIPC Restart
        RestartMaxDelaySec RestartPreventExitStatus RestartSec RestartSteps RestrictAddressFamilies
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID RuntimeDirectory RuntimeDirectoryMode
        RuntimeDirectoryPreserve StandardError StandardOutput StateDirectory StateDirectoryMode
        SupplementaryGroups SystemCallArchitectures SystemCallErrorNumber SystemCallFilter TTYPath
        TasksMax TimeoutStartSec TimeoutStopSec Type UMask User WatchdogSec WorkingDirectory
    """,
    "Socket": "Backlog DirectoryMode ListenStream SocketGroup SocketMode SocketUser",
    "Mount": "Options Type What Where",
    "Install": "Alias WantedBy",
}

# Directives that may be given again: lists, and steps in order.
REPEATED = {"After", "Before", "Requires", "Wants", "ExecStart", "ExecStop", "DeviceAllow"} | {
    "SystemCallFilter"
}

# Debian's units that our preset enables.
FOREIGN = {
    "nftables.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
}

GATEWAY = SYSTEMD / "dcv.service"
ATTESTER = SYSTEMD / "dcv-attester.service"
CREDENTIALS = SYSTEMD / "dcv-credentials.service"


@pytest.mark.parametrize("path", unit_files(), ids=lambda path: path.name)
def test_every_directive_is_one_we_know_and_stands_once(path: Path) -> None:
    found = directives(path)
    assert found
    for one in found:
        assert one.name in KNOWN[one.section].split(), f"[{one.section}] {one.name}"
    single = [(one.section, one.name) for one in found if one.name not in REPEATED]
    assert len(set(single)) == len(single)


@pytest.mark.parametrize("path", unit_files(), ids=lambda path: path.name)
def test_what_is_loosened_has_its_reason_above(path: Path) -> None:
    for one in directives(path):
        sandbox = one.name.startswith(("Private", "Protect", "Restrict", "MemoryDeny", "NoNew"))
        is_loose = (
            (sandbox and one.value == "no")
            or (one.name == "DeviceAllow")
            or (one.name == "ProcSubset" and one.value == "all")
            or (one.name == "User" and one.value == "root" and path == ATTESTER)
            or (one.name == "CapabilityBoundingSet" and one.value != "")
            or one.name == "IPAddressAllow"
        )
        if is_loose:
            assert len(one.reason) > 20, f"{one.name}={one.value} without a reason"


def test_nothing_but_our_list_is_enabled() -> None:
    lines = [
        line
        for line in (SYSTEMD / "dcv.preset").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[-1] == "disable *"  # the first match wins, so it has to be the last
    enabled = {line.removeprefix("enable ") for line in lines[:-1]}
    assert len(enabled) == len(lines) - 1
    ours = {
        path.name
        for path in unit_files()
        if any(one.section == "Install" for one in directives(path))
    }
    assert enabled == ours | FOREIGN


def test_a_refused_boot_and_a_crash_are_told_apart() -> None:
    (never,) = values(GATEWAY, "RestartPreventExitStatus")
    prevented = {int(status) for status in never.split()}
    # What a measured, read-only file says is the same at the next start.
    assert {ConfigError.exit_status, ModelError.exit_status} == prevented
    # What the world says may change; and a crash is not a refusal at all.
    for error in (Unauthentic, EngineStartFailed, ListenError, EngineDied):
        assert error.exit_status not in prevented
    assert values(GATEWAY, "Restart") == ["on-failure"]


def test_three_starts_in_a_row_that_never_serve_are_the_last() -> None:
    assert values(GATEWAY, "StartLimitBurst") == ["3"]
    # However long one takes. A start that serves begins the count anew.
    assert values(GATEWAY, "StartLimitIntervalSec") == ["infinity"]
    assert values(GATEWAY, "ExecStartPost") == ["+/usr/bin/systemctl reset-failed dcv.service"]


def test_the_end_gets_the_time_that_it_may_take() -> None:
    (seconds,) = values(GATEWAY, "TimeoutStopSec")
    assert int(seconds) >= Limits().drain_s + Engine().stop_grace_s + 30
    # SIGTERM to SGLang's whole group makes it crash.
    assert values(GATEWAY, "KillMode") == ["mixed"]


def test_the_gateway_has_no_capability_and_no_device() -> None:
    assert values(GATEWAY, "CapabilityBoundingSet") == [""]
    assert values(GATEWAY, "AmbientCapabilities") == [""]
    assert values(GATEWAY, "PrivateDevices") == ["yes"]
    assert values(GATEWAY, "DeviceAllow") == []
    assert values(GATEWAY, "User") == ["dcv"]


def test_the_collector_has_no_network_and_three_devices() -> None:
    assert values(ATTESTER, "PrivateNetwork") == ["yes"]
    assert values(ATTESTER, "RestrictAddressFamilies") == ["AF_UNIX"]
    allowed = [value.split()[0] for value in values(ATTESTER, "DeviceAllow")]
    assert allowed == ["/dev/tpmrm0", "/dev/sev-guest", "/dev/tdx_guest"]
    rules = (SYSTEMD / "dcv.rules").read_text()
    # It is root without the capability to pass over a file's mode.
    for device in ("tpmrm[0-9]*", "sev-guest", "tdx_guest"):
        assert f'KERNEL=="{device}", OWNER="root"' in rules


def test_what_unseals_has_the_tpm_and_nothing_else() -> None:
    assert values(CREDENTIALS, "DeviceAllow") == ["/dev/tpmrm0 rw"]
    assert values(CREDENTIALS, "PrivateNetwork") == ["yes"]
    assert values(CREDENTIALS, "RestrictAddressFamilies") == ["AF_UNIX"]
    assert values(CREDENTIALS, "CapabilityBoundingSet") == [""]
    assert values(CREDENTIALS, "LimitCORE") == ["0"]


def test_no_gateway_without_a_secret_that_is_sealed() -> None:
    """Refused by the TPM, the unit fails, and what requires it does not start. On a machine without a
    TPM it is skipped, which is no failure: a gateway that needs the secret says so itself."""
    assert CREDENTIALS.name in values(GATEWAY, "Requires")
    assert CREDENTIALS.name in values(GATEWAY, "After")
    for unit in (GATEWAY, CREDENTIALS):  # nor without what the operator said
        for directive in ("Requires", "After"):
            assert "dcv-operator.service" in values(unit, directive)
    assert values(CREDENTIALS, "ConditionPathExists") == ["/dev/tpmrm0"]


def test_secrets_are_where_systemd_looks_for_them_and_the_gateway_cannot() -> None:
    (command,) = values(CREDENTIALS, "ExecStart")
    (out,) = re.findall(r"--out (\S+)", command)
    secrets = f"{out}/secrets"
    assert values(GATEWAY, "LoadCredential") == [f"sealed:{secrets}"]
    assert f"-{secrets}" in values(GATEWAY, "InaccessiblePaths")[0].split()
    # There, and root's, on every machine: a missing one would keep the gateway from starting.
    assert f"d {secrets} 0700 root root -" in (SYSTEMD / "dcv.tmpfiles.conf").read_text()
    # And what is read comes from where the operator's partition is copied to.
    (sealed,) = re.findall(r"--sealed (\S+)", command)
    script = (SYSTEMD.parent / "image/mkosi/files/common/operator-input").read_text()
    assert f"copy dcv-sealed {MAX_SEALED_FILE + 1} {Path(sealed).name}" in script
    assert f"copy dcv-operator {MAX_OPERATOR_FILE + 1} input.toml" in script
    (folder,) = values(SYSTEMD / "dcv-operator.service", "RuntimeDirectory")
    assert Path(sealed).parent == Path("/run", folder)


def test_nothing_takes_a_credential_from_the_host() -> None:
    """ImportCredential= and a LoadCredential= without a path would take what SMBIOS brings."""
    for path in unit_files():
        for one in directives(path):
            assert "ImportCredential" not in one.name
            assert "Encrypted" not in one.name
            if one.name == "LoadCredential":
                assert one.value.partition(":")[2].startswith("/run/dcv-")


def test_only_the_gateways_user_may_ask_the_collector() -> None:
    socket = SYSTEMD / "dcv-attester.socket"
    assert values(socket, "SocketUser") == values(GATEWAY, "User")
    assert values(socket, "SocketMode") == ["0600"]
    (command,) = values(ATTESTER, "ExecStart")
    assert command.endswith("--gateway dcv")
    assert re.search(r"^u dcv 700 ", (SYSTEMD / "dcv.sysusers.conf").read_text(), re.MULTILINE)


def test_the_ready_state_of_gpus_is_set_by_no_unit() -> None:
    for path in unit_files():
        commands = [one.value for one in directives(path) if one.name.startswith("Exec")]
        assert not any("conf-compute" in one or "-srs" in one for one in commands), path.name


# Exposure, by systemd's own count: 0 is closed, 10 is open.
LIMITS = {
    (): {
        "dcv.service": 1.5,
        "dcv-attester.service": 1.3,
        "dcv-operator.service": 1.3,
        "dcv-credentials.service": 1.2,
        "dcv-image.service": 1.3,
        "dcv-model.service": 4.5,
    },
    ("gpu",): {
        "dcv.service": 1.5,
        "dcv-attester.service": 1.5,
        "dcv-gpu.service": 3.5,
        "nvidia-persistenced.service": 3.5,
    },
    ("azure",): {"dcv-attester.service": 2.0, "dcv-azure-ready.service": 1.3},
}


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    ("profiles", "unit"),
    [(profiles, unit) for profiles, units in LIMITS.items() for unit in units],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "base",
)
def test_exposure_stays_below_its_limit(
    tmp_path: Path, profiles: tuple[str, ...], unit: str
) -> None:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for path in SYSTEMD.iterdir():
        if path.suffix in (".service", ".socket"):
            shutil.copy(path, units)
    for profile in profiles:
        shutil.copytree(SYSTEMD / "profiles" / profile, units, dirs_exist_ok=True)
    assert ANALYZE is not None
    command = [ANALYZE, "security", "--offline=yes", f"--root={tmp_path}", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= LIMITS[profiles][unit]


# Debian's, which ours ask for.
NEEDED = [
    "nftables.service",
    "basic.target",
    "sysinit.target",
    "shutdown.target",
    "network-online.target",
    "time-set.target",
    "sockets.target",
    "local-fs.target",
    "local-fs-pre.target",
    "umount.target",
    "swap.target",
    "-.slice",
    "system.slice",
]
SAID_OF_NOBODY = "dcv-image.service:14: Special user nobody configured, this is not safe!"
"""A program without privileges that reads a disk: safe from other nobodies, of which there are none."""


@pytest.mark.skipif(
    not (TOOLS / "usr/bin/systemd-analyze").exists() or shutil.which("bwrap") is None,
    reason="no tools tree: `image/build.py test` makes it",
)
@pytest.mark.parametrize("profiles", [(), ("gpu",), ("azure",), ("test",), ("gpu", "azure")])
def test_the_images_systemd_understands_every_unit(
    tmp_path: Path, profiles: tuple[str, ...]
) -> None:
    units = tmp_path / "usr/lib/systemd/system"
    ignored = shutil.ignore_patterns("profiles", "README.md", "dcv.preset", "*.rules", "*.conf")
    shutil.copytree(SYSTEMD, units, ignore=ignored)
    for profile in profiles:
        shutil.copytree(SYSTEMD / "profiles" / profile, units, dirs_exist_ok=True)
    named = sorted(path.name for path in units.iterdir() if path.suffix in UNIT_SUFFIXES)
    for name in NEEDED:
        kind = "Service]\nExecStart=/usr/bin/true" if name.endswith(".service") else "Unit]"
        (units / name).write_text(f"[{kind}\n")
    for path in units.rglob("*"):
        if path.is_file():
            for one in directives(path):
                if one.name.startswith("ExecSt") and one.value:
                    program = tmp_path / one.value.lstrip("+-").split()[0].lstrip("/")
                    program.parent.mkdir(parents=True, exist_ok=True)
                    program.touch(0o755)
    done = subprocess.run(
        [
            *("bwrap", "--ro-bind", TOOLS, "/", "--proc", "/proc", "--dev", "/dev", "--chdir", "/"),
            *("--tmpfs", "/tmp", "--tmpfs", "/run", "--dir", "/run/root"),
            *("--bind", tmp_path, "/run/root", "systemd-analyze", "verify", "--man=no"),
            *("--generators=no", "--root=/run/root", *named),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    told = {line.rpartition("/")[2] for line in done.stderr.splitlines()}
    assert told <= {SAID_OF_NOBODY}
    assert done.returncode == 0

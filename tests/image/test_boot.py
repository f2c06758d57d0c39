"""The image for real: QEMU, OVMF, dm-verity, a software TPM, and a relying party outside of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import DefaultHttpxClient, OpenAI

from appliance.wire.event_log import Event, parse_event_log
from image.boot import STORAGE_KEY, provision_tpm
from image.measure.tdx import rtmr1_events, rtmr2_events
from tests.image.disk import flip_one_bit, make_disk, partitions, rename_partition
from tests.image.machine import (
    DISK,
    PACKAGES,
    POLICY,
    REFERENCE,
    ROOT,
    UKI,
    Machine,
    booted,
    needs_image,
)

pytestmark = needs_image

EROFS_SUPERBLOCK = 1024
REFUSED_STARTS = 3


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with booted(DISK, tmp_path_factory.mktemp("machine")) as one:
        one.wait_until_it_serves()
        yield one


@pytest.fixture(scope="module")
def facts(machine: Machine) -> dict[str, str]:
    return machine.facts()


@pytest.fixture(scope="module")
def predicted() -> dict[str, list[str]]:
    (image,) = json.loads(REFERENCE.read_text())["images"]
    pcrs: dict[str, list[str]] = image["pcrs"]
    return pcrs


def dcv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a relying party runs it."""
    return subprocess.run(
        [
            *(str(Path(sys.executable).with_name("dcv")), *arguments),
            *("--policy", str(POLICY), "--reference", str(REFERENCE)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def verify(machine: Machine) -> tuple[int, dict[str, Any]]:
    """`dcv verify`, under the reference values of the image that was built: exit status and
    document."""
    done = dcv("verify", machine.url, "--json")
    return done.returncode, json.loads(done.stdout)


def contraindicated(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The findings of that tier, by check."""
    found = [one for part in named(document, "findings") for one in part]
    return {one["check"]: one for one in found if one["tier"] == "contraindicated"}


def named(document: object, name: str) -> Iterator[Any]:
    """Every value of this name, anywhere in a JSON document."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == name:
                yield value
            yield from named(value, name)
    elif isinstance(document, list):
        for value in document:
            yield from named(value, name)


def test_what_the_machine_quotes_is_what_was_predicted(
    machine: Machine, predicted: dict[str, list[str]]
) -> None:
    _, document = verify(machine)
    for pcr in ("4", "7", "11"):
        assert list(named(document, f"pcr{pcr}"))[:1] == predicted[pcr]
    assert list(named(document, "pcr12"))[:1] == ["00" * 32]


def test_a_relying_party_finds_nothing_against_it(machine: Machine) -> None:
    status, document = verify(machine)
    assert status == 3, document  # a TPM protects no memory: never more than a warning
    assert set(named(document, "check")) == {"tpm2.memory", "report.gpus"}


def openai_client(machine: Machine) -> OpenAI:
    """As an application has it, trusting the certificate that is there now."""
    certificate = ssl.get_server_certificate(("127.0.0.1", machine.port))
    trust = ssl.create_default_context(cadata=certificate)
    return OpenAI(
        base_url=f"{machine.url}/v1",
        api_key="unused",
        timeout=120,
        http_client=DefaultHttpxClient(verify=trust),
    )


def test_an_openai_client_gets_a_streamed_answer(machine: Machine) -> None:
    with openai_client(machine) as client:
        stream = client.chat.completions.create(
            model="stand-in", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 3
    assert "".join(parts)


def test_systemctl_status_tells_an_operator_what_is_going_on(facts: dict[str, str]) -> None:
    assert re.search(
        r'Status: "serving stand-in at https://\S+, attestation: warning"', facts["status"]
    )


def test_nothing_has_failed(facts: dict[str, str]) -> None:
    assert facts["failed"] == ""


def public_sockets(facts: dict[str, str]) -> set[tuple[str, str]]:
    """Protocol and port of each that is not on loopback."""
    sockets = [line.split() for line in facts["listening"].splitlines()]
    return {
        (line[0], line[4].rpartition(":")[2])
        for line in sockets
        if not line[4].startswith(("127.", "[::1]"))
    }


def test_only_the_public_port_listens_beyond_loopback(facts: dict[str, str]) -> None:
    # The DHCP client's own socket is bound to the interface; the firewall lets only a server in.
    assert public_sockets(facts) == {("tcp", "8443"), ("udp", "68")}


def test_the_root_is_read_only_and_var_is_memory(facts: dict[str, str]) -> None:
    assert facts["root"].startswith("/dev/mapper/root / erofs ro,")
    assert facts["var"].startswith("tmpfs /var tmpfs ")


def test_the_kernel_is_locked_down(facts: dict[str, str]) -> None:
    assert facts["lockdown"] == "none integrity [confidentiality]"


def test_nobody_can_log_in_and_nothing_generates_units(facts: dict[str, str]) -> None:
    for fact, count in (("logins", 4), ("generators", 2)):
        assert facts[fact].count("No such file or directory") == count


def test_exposure_in_the_machine_is_what_it_is_offline(facts: dict[str, str]) -> None:
    scores = {line.split()[0]: float(line.split()[1]) for line in facts["exposure"].splitlines()}
    assert scores["dcv.service"] <= 1.5
    assert scores["dcv-attester.service"] <= 1.3


def test_the_machine_knows_the_digest_of_its_image(facts: dict[str, str]) -> None:
    (image,) = json.loads(REFERENCE.read_text())["images"]
    assert facts["image-digest"] == image["image_digest"]


def test_a_killed_gateway_comes_back_with_new_keys_and_its_old_receipts(
    machine: Machine, facts: dict[str, str], tmp_path: Path
) -> None:
    with openai_client(machine) as client:
        answer = client.chat.completions.with_raw_response.create(
            model="stand-in", messages=[{"role": "user", "content": "Hello"}]
        )
    receipt_id = answer.headers["X-Receipt-Id"]
    receipt = machine.get(f"/v1/aci/receipts/{receipt_id}")
    (old,) = set(named(verify(machine)[1], "workload_keyset_digest"))

    starts = machine.console.count('"event": "serving"')
    machine.say("kill-gateway")
    machine.wait_for('"event": "serving"', times=starts + 1)
    machine.wait_until_it_serves()

    status, document = verify(machine)
    assert status == 3, document
    assert set(named(document, "workload_keyset_digest")) != {old}
    # What it gave before is found, and holds under the keys of then.
    assert machine.get(f"/v1/aci/receipts/{receipt_id}") == receipt
    files = {"receipt": receipt, "report": machine.get(f"/v1/dcv/reports/{old}")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    report = ("--report", str(tmp_path / "report"))
    checked = dcv("receipt", "verify", str(tmp_path / "receipt"), *report, "--json")
    assert json.loads(checked.stdout)["verdict"] == "warning", checked.stdout
    # It was no refused boot: nothing has failed, and what the machine says of itself is as before.
    machine.facts(block=2)  # the unit's failure prints one, while the gateway is down
    machine.say("facts")
    again = machine.facts(block=3)
    assert again["failed"] == ""
    assert public_sockets(again) == public_sockets(facts)


def test_a_direct_start_logs_what_tdx_will_extend(tmp_path: Path) -> None:
    # The registers of a TDX guest have no hardware here, their events have: the same firmware code, stub
    # and kernel measure them into a TPM, whose log has every bank.
    with booted(DISK, tmp_path, "--kernel", str(UKI)) as machine:
        machine.wait_until_it_serves()
        report = json.loads(machine.get("/v1/aci/attestation"))
    (log,) = named(report, "event_log_b64")
    events = parse_event_log(base64.b64decode(log))

    def logged(*registers: int) -> list[bytes]:
        there = [one for one in events if one.register in registers]
        return [one.digests["sha384"] for one in there if not separates(one)]

    def separates(event: Event) -> bool:
        # A TPM has one in each of its first PCRs. RTMR 1 has one, in the place of PCR 4's.
        return event.type_name == "EV_SEPARATOR" and event.register != 4

    uki = UKI.read_bytes()
    assert logged(*range(2, 7)) == list(rtmr1_events(uki))
    assert logged(*range(8, 16)) == list(rtmr2_events(uki))


def test_one_changed_bit_of_the_root_does_not_boot(tmp_path: Path) -> None:
    disk = tmp_path / "changed.raw"
    shutil.copy(DISK, disk)
    offset, _ = partitions(disk)["root-x86-64"]
    flip_one_bit(disk, offset + EROFS_SUPERBLOCK + 16)
    with booted(disk, tmp_path) as machine:
        console = machine.wait_for_end()
    assert "Kernel panic - not syncing: dm-verity device corrupted" in console
    assert "systemd[1]" not in console


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same packages and commit, and one file of the root changed: a whole build of its own."""
    folder = tmp_path_factory.mktemp("rebuilt")
    config = (ROOT / "image/mkosi/test.toml").read_text()
    changed = config.replace("max_bytes = 67_108_864", "max_bytes = 67_108_865")
    assert changed != config
    (folder / "dcv.toml").write_text(changed)
    options = {"config": "dcv.toml", "out": "out", "work": "work"}
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "image/build.py"), "test", "--packages", str(PACKAGES)),
            *(f"--{name}={folder / value}" for name, value in options.items()),
        ],
        check=True,
        timeout=1800,
    )
    return folder / "out/dcv-test.raw"


def test_another_image_in_the_name_of_a_known_one_is_found_out(
    rebuilt: Path, predicted: dict[str, list[str]], tmp_path: Path
) -> None:
    # The name is what the machine finds on a partition, and the disks are the host's: it gives this
    # image a second disk, with the UKI that is known, where the machine will look.
    rename_partition(rebuilt, "esp", "other")
    with booted(rebuilt, tmp_path, "--second-disk", str(DISK)) as machine:
        machine.wait_until_it_serves()
        status, document = verify(machine)
    (image,) = json.loads(REFERENCE.read_text())["images"]
    assert image["image_digest"] in named(document, "image_digest")
    assert status == 1
    found = contraindicated(document)
    assert set(found) == {"tpm2.pcr4", "tpm2.pcr11", "report.image.roothash"}
    assert [found["tpm2.pcr11"]["expected"]] == predicted["11"]


def test_an_argument_added_to_the_command_line_is_named(tmp_path: Path) -> None:
    extra = "type=11,value=io.systemd.stub.kernel-cmdline-extra=dcv.extra=1"
    with booted(DISK, tmp_path, "--smbios", extra) as machine:
        machine.wait_until_it_serves()
        status, document = verify(machine)
        cmdline = machine.facts()["cmdline"]
    assert cmdline.endswith(" dcv.extra=1")
    assert status == 1
    found = contraindicated(document)
    assert set(found) == {"tpm2.pcr12"}
    assert found["tpm2.pcr12"]["got"].endswith(", which is 'dcv.extra=1'")


def test_three_refused_boots_end_in_a_failed_unit_that_says_why(tmp_path: Path) -> None:
    with booted(DISK, tmp_path, "--key", "stranger") as machine:
        # A block follows each start; the last one, the unit's failure.
        blocks = machine.wait_for("Active: failed").count("DCV-FACTS-BEGIN\n")
        facts = machine.facts(block=blocks)
        console = machine.console
    assert console.count('"event": "appliance_ended"') == REFUSED_STARTS
    assert "Active: failed" in facts["status"]
    assert re.search(r'Status: "failed: stage \d+ \(', facts["status"])
    assert facts["failed"].startswith("dcv.service")


def test_a_machine_without_what_the_configuration_requires_is_not_started_again(
    tmp_path: Path,
) -> None:
    with booted(DISK, tmp_path, "--key", "none") as machine:
        facts = machine.facts()
        console = machine.console
    assert console.count('"event": "appliance_ended"') == 1
    assert "Active: failed" in facts["status"]
    assert re.search(r'Status: "failed: stage 3 \(attester\): ', facts["status"])


SECRET = "nvapi-CANARY-0123456789"
OPERATOR_FILE = b'[attestation]\nnvidia_service_key = "sealed_nvidia"\n'


def sealed_to(tpm: Path, *options: str) -> bytes:
    """The secret, sealed to this TPM and the built image; neither has ever run."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "image/seal.py"), "nvidia", *options),
            *("--storage-key", str(tpm / STORAGE_KEY), "--reference", str(REFERENCE)),
        ],
        input=SECRET.encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    return done.stdout


@pytest.fixture
def tpm(tmp_path: Path) -> Path:
    folder = tmp_path / "provisioned"
    folder.mkdir()
    provision_tpm(folder)
    return folder


def with_operator(tpm: Path, sealed: bytes) -> tuple[str, ...]:
    """Options for a machine with this TPM and a disk of the operator's."""
    disk = tpm / "operator.raw"
    make_disk(disk, {"dcv-operator": OPERATOR_FILE, "dcv-sealed": sealed})
    return ("--tpm", str(tpm), "--second-disk", str(disk))


def test_a_secret_that_was_sealed_before_the_machine_ran_reaches_its_gateway(
    tpm: Path, tmp_path: Path
) -> None:
    with booted(DISK, tmp_path, *with_operator(tpm, sealed_to(tpm))) as machine:
        # It names the credential, so it would not start without.
        machine.wait_until_it_serves()
        status, document = verify(machine)
        storage_key = machine.get("/.well-known/dcv/storage-key")
        facts = machine.facts()
        console = machine.console
    assert status == 3, document
    assert set(named(document, "check")) == {"tpm2.memory", "report.gpus"}
    (digest,) = set(named(document, "operator_input_digest"))
    assert digest == "sha256:" + hashlib.sha256(OPERATOR_FILE).hexdigest()
    assert re.search(r'"event": "unsealed".*"names": \["nvidia"\]', console)
    assert storage_key == (tpm / STORAGE_KEY).read_bytes()
    assert facts["failed"] == ""
    assert SECRET not in console


def test_a_secret_that_was_sealed_for_another_image_keeps_the_gateway_down(
    tpm: Path, tmp_path: Path
) -> None:
    sealed = sealed_to(tpm, "--pcr", f"11={'11' * 32}")
    with booted(DISK, tmp_path, *with_operator(tpm, sealed)) as machine:
        console = machine.wait_for("Dependency failed for")
    assert re.search(r'"code": "seal_refused".*"nvidia: sealed for another image or boot', console)
    assert '"event": "boot_stage"' not in console
    assert SECRET not in console

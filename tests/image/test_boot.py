"""The image for real: QEMU, OVMF, dm-verity, a software TPM, and a relying party outside of it."""

from __future__ import annotations

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

from tests.image.disk import flip_one_bit, partitions
from tests.image.machine import DISK, POLICY, REFERENCE, Machine, booted, needs_image

pytestmark = needs_image

EROFS_SUPERBLOCK = 1024
REFUSED_STARTS = 3


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with booted(DISK, tmp_path_factory.mktemp("machine")) as one:
        one.wait_for('"event": "serving"')
        yield one


@pytest.fixture(scope="module")
def facts(machine: Machine) -> dict[str, str]:
    return machine.facts()


@pytest.fixture(scope="module")
def predicted() -> dict[str, list[str]]:
    (image,) = json.loads(REFERENCE.read_text())["images"]
    pcrs: dict[str, list[str]] = image["pcrs"]
    return pcrs


def verify(machine: Machine) -> tuple[int, dict[str, Any]]:
    """`dcv verify` as a relying party runs it: exit status and document."""
    url = f"https://127.0.0.1:{machine.port}"
    arguments = ["verify", url, "--policy", str(POLICY), "--reference", str(REFERENCE), "--json"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dcv")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout)


def named(document: object, name: str) -> Iterator[str]:
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


def test_an_openai_client_gets_a_streamed_answer(machine: Machine) -> None:
    certificate = ssl.get_server_certificate(("127.0.0.1", machine.port))
    trust = ssl.create_default_context(cadata=certificate)
    client = OpenAI(
        base_url=f"https://127.0.0.1:{machine.port}/v1",
        api_key="unused",
        timeout=120,
        http_client=DefaultHttpxClient(verify=trust),
    )
    with client:
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


def test_only_the_public_port_listens_beyond_loopback(facts: dict[str, str]) -> None:
    sockets = [line.split() for line in facts["listening"].splitlines()]
    public = {
        (line[0], line[4].rpartition(":")[2])
        for line in sockets
        if not line[4].startswith(("127.", "[::1]"))
    }
    # The DHCP client's own socket is bound to the interface; the firewall lets only a server in.
    assert public == {("tcp", "8443"), ("udp", "68")}


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


def test_one_changed_bit_of_the_root_does_not_boot(tmp_path: Path) -> None:
    disk = tmp_path / "changed.raw"
    shutil.copy(DISK, disk)
    offset, _ = partitions(disk)["root-x86-64"]
    flip_one_bit(disk, offset + EROFS_SUPERBLOCK + 16)
    with booted(disk, tmp_path) as machine:
        console = machine.wait_for_end()
    assert "Kernel panic - not syncing: dm-verity device corrupted" in console
    assert "systemd[1]" not in console


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

"""What goes into the image: settings, staged files, firewall. Nothing is built here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from appliance.config import parse_config
from appliance.verifier.check import load_rules
from image import boot, build
from image.common import BuildError, PackagesGoneError
from tests.image.unit_files import directives, unit_files

ROOT = Path(__file__).parent.parent.parent
IMAGE = ROOT / "image"
MKOSI = IMAGE / "mkosi"

TOOLS = build.plan("test", "metal").tools

TEXTS = sorted(
    path
    for folder in (MKOSI, IMAGE / "measure", IMAGE / "initrd", IMAGE / "policies", ROOT / "systemd")
    for path in folder.rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)
SETTINGS = [MKOSI / "mkosi.conf", *sorted((MKOSI / "mkosi.profiles").iterdir())]


def entries(path: Path) -> list[str]:
    """The words of a settings file, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return " ".join(lines).split()


def test_every_profile_has_its_settings() -> None:
    assert {path.stem for path in SETTINGS[1:]} == set(build.PROFILES)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_mirror_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("deb.debian.org", "snapshot.debian.org", "deb http", "URIs:", "Mirror="):
        assert word not in text


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_nothing_to_log_in_with_is_installed(path: Path) -> None:
    for word in ("openssh-server", "sudo", "login", "curl", "wget", "gdb", "python3-pip"):
        assert word not in entries(path)


def test_generators_and_logins_are_removed_and_units_masked() -> None:
    removed = entries(MKOSI / "mkosi.conf")
    for path in (
        "/usr/lib/systemd/system-generators",
        "/usr/sbin/agetty",
        "/usr/sbin/sulogin",
        "/usr/bin/login",
    ):
        assert path in removed
    masked = set(build.package_list(MKOSI / "masked-units"))
    assert {
        "getty@.service",
        "serial-getty@.service",
        "debug-shell.service",
        "emergency.service",
        "rescue.service",
        # They would extend PCRs that the firmware's log explains.
        "systemd-pcrphase.service",
        "systemd-pcrphase-sysinit.service",
        "systemd-pcrmachine.service",
    } <= masked


@pytest.mark.parametrize("profile", ["cpu", "test"])
def test_the_kernel_keeps_its_memory_to_itself(profile: str) -> None:
    words = entries(MKOSI / "mkosi.conf") + entries(MKOSI / f"mkosi.profiles/{profile}.conf")
    for option in ("lockdown=confidentiality", "module.sig_enforce=1", "panic=-1", "oops=panic"):
        assert option in words


def test_packages_are_listed_once_and_in_order() -> None:
    for name in ("build-packages.txt", "tools-packages.txt"):
        packages = build.package_list(IMAGE / name)
        assert packages == sorted(set(packages)), name


def test_no_simulated_file_stays_and_the_rest_works_without_it(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "appliance", tmp_path / "appliance", ignore=ignored)
    assert list(tmp_path.rglob("*simulated*"))
    build.remove_simulated(tmp_path)
    assert not list(tmp_path.rglob("*simulated*"))
    build.refuse_simulated(tmp_path)
    modules = "appliance.cli, appliance.attester.main, appliance.attester.registry"
    code = f"import {modules}, appliance; print(appliance.__file__)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))


def test_an_environment_keeps_its_wheels_lists_without_what_was_taken_out(tmp_path: Path) -> None:
    """xgrammar finds its library by the list; without one the engine of a booted image ended."""
    lock = tmp_path / "lock"
    one = build.Build("cpu", "metal", "abc", "0.1.0", 0, tmp_path, tmp_path, tmp_path, lock)
    packages = one.stage / "opt/x/lib/python3.11/site-packages"
    for name in ("bin/tool", "xgrammar/lib.so", "x-1.dist-info/INSTALLER", "x-1.dist-info/RECORD"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    kept = "xgrammar/lib.so,sha256=abc,1\nx-1.dist-info/RECORD,,\n"
    (packages / "x-1.dist-info/RECORD").write_text(
        f"bin/tool,sha256=def,2\nx-1.dist-info/INSTALLER,sha256=ghi,3\n{kept}"
    )
    build.finish_environment(one, one.stage / "opt/x")
    assert (packages / "x-1.dist-info/RECORD").read_text() == kept
    assert not (packages / "x-1.dist-info/INSTALLER").exists()


def test_a_simulated_file_from_elsewhere_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/Simulated_tpm.pem").touch()
    with pytest.raises(BuildError, match=r"opt/Simulated_tpm\.pem"):
        build.refuse_simulated(tmp_path)


def test_the_test_profiles_configuration_is_one() -> None:
    config = parse_config((MKOSI / "test.toml").read_text(), folder=Path("/usr/share/dcv"))
    assert config.attestation.attester_socket == "/run/dcv-attester/attester.sock"
    assert config.listen.port == boot.GUEST_PORT
    stand_in = config.engine.unsafe_command[-1].rpartition("/")[2]
    assert (ROOT / "tests/fakes" / stand_in).is_file()


def test_the_cpu_profiles_configuration_names_the_embedded_model() -> None:
    config = parse_config((IMAGE / "config/cpu.toml").read_text(), folder=Path("/usr/share/dcv"))
    lock = tomllib.loads((IMAGE / "locks/model-smollm2.toml").read_text())
    assert config.model.files == lock["files"]
    assert config.engine.version in (IMAGE / "locks/engine-cpu.txt").read_text()
    assert config.attestation.tpm_roots_file == "/usr/share/dcv/tpm-root.pem"


def test_the_test_policy_accepts_the_test_machine_and_trusts_its_root() -> None:
    rules = load_rules(IMAGE / "policies/test.toml", None)
    assert rules.policy.tee_types == ("tpm2",)
    assert rules.policy.gpus == "unsafe_none"
    root = x509.load_pem_x509_certificate(boot.ROOT_FILE.read_bytes())
    assert root in rules.anchors.tpm


def test_the_published_root_issues_for_the_key_of_a_machine() -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    certificate = x509.load_der_x509_certificate(boot.certify(key))
    root = x509.load_pem_x509_certificate(boot.ROOT_FILE.read_bytes())
    certificate.verify_directly_issued_by(root)
    assert certificate.public_key() == key


CONFIG = '[attestation]\ncpu = "{cpu}"\nendorsements = "{endorsements}"\n'


@pytest.mark.parametrize(
    ("cpu", "endorsements", "output", "expected"),
    [
        ("tpm2", "offline", "metal", []),
        ("sev_snp", "online", "metal", ['meta skuid "dcv" tcp dport 443 accept']),
        (
            "azure_vtpm",
            "online",
            "azure",
            [
                'meta skuid "dcv" tcp dport 443 accept',
                'meta skuid "root" ip daddr 169.254.169.254 tcp dport 80 accept',
                "ip daddr 168.63.129.16 tcp dport 80 accept",
            ],
        ),
    ],
)
def test_the_firewall_lets_out_what_the_configuration_lists(
    cpu: str, endorsements: str, output: str, expected: list[str]
) -> None:
    rules = build.firewall_rules(CONFIG.format(cpu=cpu, endorsements=endorsements), output)
    assert rules.splitlines()[1:] == expected


def test_the_firewall_lets_in_the_public_port_and_drops_the_rest() -> None:
    text = (MKOSI / "nftables.conf").read_text()
    lines = [line.strip() for line in text.splitlines()]
    dropped = [line for line in lines if line.endswith("policy drop;")]
    assert [line.split()[3] for line in dropped] == ["input", "forward", "output"]
    arriving = text[text.index("chain input") : text.index("chain forward")]
    accepted = [line.strip() for line in arriving.splitlines() if "dport" in line]
    assert accepted == ["tcp dport 8443 accept", "udp sport 67 udp dport 68 accept"]


def a_gpu_build(
    tmp_path: Path, attestation: str = "", path: str = build.MODEL_MOUNT
) -> build.Build:
    """One whose operator gave everything; nothing of it is there yet but what is measured."""
    config = tmp_path / "dcv.toml"
    config.write_text(
        f'[attestation]\ncpu = "tdx"\ngpu = "nvidia"\n{attestation}[model]\npath = "{path}"\n'
    )
    driver_lock = tmp_path / "nvidia-driver.toml"
    driver_lock.write_text(f'version = "580.0.1"\nsha256 = "{"0" * 64}"\n')
    volume = tmp_path / "model.raw.volume"
    volume.write_text(VOLUME)
    return build.Build(
        *("gpu", "metal", "abc", "0.1.0", 0, tmp_path, tmp_path, tmp_path, tmp_path / "gpu.txt"),
        config=config,
        model_volume=volume,
        driver_lock=driver_lock,
        rims=tmp_path / "rims",
    )


VOLUME = (
    "DATA=/dev/disk/by-partlabel/dcv-model\n"
    "HASH=/dev/disk/by-partlabel/dcv-model-verity\n"
    f"ROOT={'ab' * 32}\n"
)


def test_the_root_of_the_weights_becomes_part_of_what_is_measured(tmp_path: Path) -> None:
    one = a_gpu_build(tmp_path)
    build.install_files(one)
    assert (one.stage / "usr/share/dcv/model-volume").read_text() == VOLUME


def test_an_image_for_gpus_without_weights_is_refused(tmp_path: Path) -> None:
    one = a_gpu_build(tmp_path)
    with pytest.raises(BuildError, match="needs --model-volume FILE"):
        build.model_volume(dataclasses.replace(one, model_volume=None))
    for wrong in ("ROOT=abc\n", VOLUME + "X=1\n", VOLUME.replace("dcv-model", "other")):
        (tmp_path / "model.raw.volume").write_text(wrong)
        with pytest.raises(BuildError, match=r"not what image/model_volume\.py wrote"):
            build.model_volume(one)
    with pytest.raises(BuildError, match="a volume is mounted at /run/dcv-model"):
        build.model_volume(a_gpu_build(tmp_path, path="/usr/share/dcv/model"))


def test_manifests_of_nvidia_come_with_the_one_of_the_driver(tmp_path: Path) -> None:
    one = a_gpu_build(tmp_path)
    rims = tmp_path / "rims"
    rims.mkdir()
    (rims / "NV_GPU_VBIOS_1010_0200_882_96009F0001.xml").write_text("<vbios/>")
    with pytest.raises(BuildError, match=r"NV_GPU_DRIVER_GH100_580\.0\.1\.xml is not there"):
        build.install_rims(one)
    (rims / "NV_GPU_DRIVER_GH100_580.0.1.xml").write_text("<driver/>")
    build.install_rims(one)
    baked = sorted(path.name for path in (one.stage / "usr/share/dcv/rims").iterdir())
    assert baked == sorted(path.name for path in rims.iterdir())
    (rims / "README").touch()
    with pytest.raises(BuildError, match="README is not named as a manifest"):
        build.install_rims(one)


def test_nvidias_sdk_is_where_the_image_has_it_or_the_build_stops(tmp_path: Path) -> None:
    build.install_sdk(a_gpu_build(tmp_path))
    assert not (tmp_path / "stage/opt/dcv/nvidia-sdk").exists()  # nobody asks for its opinion
    elsewhere = 'nvidia_sdk = "record"\nnvidia_sdk_python = "/opt/sdk/bin/python"\n'
    with pytest.raises(BuildError, match="in an image it is /opt/dcv/nvidia-sdk/bin/python"):
        build.install_sdk(a_gpu_build(tmp_path, elsewhere))


@pytest.mark.parametrize("name", ["azure", "gcp", "metal-snp", "metal-tdx"])
def test_the_configurations_of_machines_with_gpus_fit_the_image(name: str) -> None:
    config = parse_config((IMAGE / f"config/{name}.toml").read_text(), folder=Path("/"))
    assert config.model.path == build.MODEL_MOUNT
    assert config.attestation.rim_dirs == ("/usr/share/dcv/rims",)
    assert config.engine.python == "/opt/dcv/engine/bin/python"
    assert config.attestation.nvidia_sdk_python in {"", build.SDK_PYTHON}


def test_modules_are_compiled_for_the_kernel_of_the_image() -> None:
    one = build.plan("gpu", "metal")
    image = build.locked_kernel(one.lock, "linux-image-")
    assert build.locked_kernel(one.module_lock, "linux-headers-") == image
    names = {line.split()[0] for line in build.package_list(one.module_lock)}
    assert {f"linux-headers-{image}", *build.MODULE_PACKAGES} <= names
    # A compiler is for the build alone.
    root = {line.split()[0] for line in build.package_list(one.lock)}
    assert not {name for name in root if name.startswith(("gcc-14-x", "make", "linux-headers-"))}


def test_a_lock_with_another_kernel_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "gpu.txt"
    lock.write_text("linux-image-cloud-amd64 6.12.1-1 amd64 0 pool/x\n")
    with pytest.raises(BuildError, match=r"gpu\.txt names 0 kernels"):
        build.locked_kernel(lock, "linux-image-")


OURS = ("/opt/dcv/", "/usr/lib/dcv/", "/usr/bin/nvidia-")
PROGRAMS = {
    "/usr/bin/mount": "mount",
    "/usr/bin/systemctl": "systemd",
    "/usr/bin/udevadm": "udev",
    "/usr/bin/umount": "mount",
    "/usr/lib/systemd/systemd-veritysetup": "systemd-cryptsetup",
    "/usr/sbin/modprobe": "kmod",
    "/usr/sbin/sysctl": "procps",
}


@pytest.mark.parametrize("profile", build.PROFILES)
def test_every_program_that_a_unit_starts_is_in_a_package_of_the_profile(profile: str) -> None:
    packages = {line.split()[0] for line in build.package_list(IMAGE / f"packages/{profile}.txt")}
    started = {
        one.value.lstrip("+-").split()[0]
        for path in unit_files()
        for one in directives(path)
        if one.name.startswith("ExecSt") and one.value
    }
    for program in started:
        assert program.startswith(OURS) or PROGRAMS[program] in packages, program


@pytest.mark.skipif(
    not (TOOLS / "usr/bin/mkosi").exists(), reason="no tools tree: `image/build.py test` makes it"
)
@pytest.mark.parametrize("profile", build.PROFILES)
def test_mkosi_accepts_the_settings(profile: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkosi", "--directory", MKOSI, "--profile", profile, "summary"],
        env={**os.environ, "PYTHONPATH": str(TOOLS / "usr/lib/python3/dist-packages")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert f"Profiles: {profile}" in done.stdout


def test_every_file_of_a_profile_has_a_place() -> None:
    for kind in (ROOT / "systemd/profiles", MKOSI / "files"):
        names = {path.name for path in kind.iterdir() if path.is_dir()}
        assert names <= {*build.PROFILES, *build.OUTPUTS, "common"}


def test_the_initrd_names_every_program_that_it_calls() -> None:
    script = (IMAGE / "initrd/init").read_text()
    known = {*build.INITRD_APPLETS, "modprobe", "veritysetup", "blkid"}
    for word in ("mount", "modprobe", "blkid", "veritysetup", "switch_root", "sed", "tr", "cut"):
        assert word in script
        assert word in known


def test_os_release_says_version_and_commit(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    one = build.Build("test", "metal", "abc", "0.1.0", 0, tmp_path, tmp_path, tmp_path, lock)
    build.install_files(one)
    text = (one.stage / "usr/lib/os-release").read_text()
    release = tomllib.loads(text)
    assert (release["VERSION_ID"], release["BUILD_ID"]) == ("0.1.0", "abc")
    assert (release["ID"], release["VARIANT_ID"]) == ("dcv", "test")


PACKAGE = b"package"
LINE = "libkmod2 1:34.2-2 amd64 {digest} pool/main/k/kmod/libkmod2_34.2-2+b1_amd64.deb\n"

needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None or not Path(build.APT_HELPER).exists(),
    reason="fetching is apt's, which is not installed",
)


def a_build(tmp_path: Path) -> build.Build:
    """One whose lock names one package."""
    lock = tmp_path / "lock.txt"
    lock.write_text("# comment\n" + LINE.format(digest=hashlib.sha256(PACKAGE).hexdigest()))
    one = build.Build("test", "metal", "abc", "0.1.0", 0, tmp_path, tmp_path, tmp_path, lock)
    one.archives.mkdir(parents=True)
    return one


def a_mirror(folder: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with one file, as both mirrors of the machine."""
    file = folder / "pool/main/k/kmod/libkmod2_34.2-2+b1_amd64.deb"
    file.parent.mkdir(parents=True)
    file.write_bytes(contents)
    monkeypatch.setenv("DCV_DEBIAN_MIRROR", f"file://{folder}")
    monkeypatch.setenv("DCV_DEBIAN_SECURITY_MIRROR", f"file://{folder}/nothing")


def test_a_build_without_a_lock_says_how_to_make_one(tmp_path: Path) -> None:
    one = a_build(tmp_path)
    one.lock.unlink()
    with pytest.raises(BuildError, match=r"lock\.txt is missing: `--lock`"):
        build.locked_packages(one)


def test_a_locked_package_in_the_cache_is_held_to_its_hash(tmp_path: Path) -> None:
    one = a_build(tmp_path)
    file = one.archives / "libkmod2_1%3a34.2-2_amd64.deb"
    file.write_bytes(b"another")
    with pytest.raises(BuildError, match="expected SHA-256"):
        build.locked_packages(one)
    file.write_bytes(PACKAGE)
    assert build.locked_packages(one) == [file]


@needs_apt
def test_a_locked_package_that_is_not_cached_is_fetched_from_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_mirror(tmp_path / "mirror", PACKAGE, monkeypatch)
    (file,) = build.locked_packages(a_build(tmp_path))
    assert file.read_bytes() == PACKAGE


@needs_apt
def test_a_locked_package_that_the_mirror_has_otherwise_is_gone_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_mirror(tmp_path / "mirror", b"another", monkeypatch)
    one = a_build(tmp_path)
    with pytest.raises(PackagesGoneError, match=r"mirrors: libkmod2 1:34\.2-2: "):
        build.locked_packages(one)
    assert not list(one.archives.iterdir())


def test_every_line_of_a_lock_is_a_package_with_its_hash() -> None:
    locks = sorted((IMAGE / "packages").iterdir())
    assert {lock.stem for lock in locks} == {*build.PROFILES, "gpu-modules"}
    for lock in locks:
        packages = [build.Package(*line.split()) for line in build.package_list(lock)]
        assert [one.name for one in packages] == sorted({one.name for one in packages})
        assert all(re.fullmatch("[0-9a-f]{64}", one.sha256) for one in packages)
        for one in packages:
            assert one.pool_path.startswith("pool/"), one.name
            assert one.pool_path.endswith(f"_{one.architecture}.deb"), one.name
        if lock.stem in build.PROFILES:
            assert {"linux-image-cloud-amd64", "python3.11", "systemd"} <= {
                one.name for one in packages
            }

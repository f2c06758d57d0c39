"""Build the appliance image: `python3 image/build.py PROFILE [--output azure|gcp|metal]`.

    1. tools    Debian trixie's mkosi, ukify, repart and veritysetup, in a folder of the cache
    2. stage    the appliance as a wheel with its locked environment, units, configuration
    3. initrd   busybox, veritysetup and one script
    4. mkosi    packages, erofs root under dm-verity, UKI, disk
    5. values   what the image will measure, as reference-values.json beside it

Results lie in image/out/PROFILE. Nothing here depends on the machine's distribution but Python
3.11, pip and image/build-packages.txt; mirrors are those of the machine's own apt configuration.
The commit's time is the time of every file.

The root's packages are those of image/packages/PROFILE.txt, by hash: from the cache, else from the
mirrors. Debian removes a package some time after its successor came out; then the build ends with
status 69 and names it. `--lock` takes what the mirrors have now and writes the list anew,
`--unlocked` takes that for this build and leaves the list alone. `--lock --only packages` writes the
list and makes no image; the gpu profile, which compiles modules for the kernel that its list names,
has no other way.
"""

from __future__ import annotations

import argparse
import compileall
import csv
import hashlib
import json
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this is a script, of a folder that is none of Python's

from image import clouds, nvidia_driver  # noqa: E402
from image.common import (  # noqa: E402
    BuildError,
    PackagesGoneError,
    copy,
    read,
    remove,
    run,
    said,
    sha256,
)

IMAGE: Final = ROOT / "image"
PROFILES: Final = ("gpu", "cpu", "test")
OUTPUTS: Final = ("metal", "azure", "gcp")

PYTHON: Final = "/usr/bin/python3.11"
"""In the image. The environments' scripts name it."""

INITRD_PROGRAMS: Final = ("usr/sbin/veritysetup", "usr/sbin/blkid", "usr/bin/kmod")
INITRD_APPLETS: Final = (
    *("cat", "cut", "echo", "false", "grep", "mount", "sed", "sh", "sleep", "switch_root", "tr"),
)

SDK_PYTHON: Final = "/opt/dcv/nvidia-sdk/bin/python"
"""Where NVIDIA's attestation SDK is, in an image whose configuration asks for it."""

MODEL_VOLUME: Final = re.compile(
    r"DATA=/dev/disk/by-partlabel/dcv-model\n"
    r"HASH=/dev/disk/by-partlabel/dcv-model-verity\n"
    r"ROOT=[0-9a-f]{64}\n"
)
"""What dcv-model.service reads: nothing but the hash differs between volumes."""

MODEL_MOUNT: Final = "/run/dcv-model"

MODULE_PACKAGES: Final = (
    *("coreutils", "dash", "diffutils", "findutils", "gcc-14", "grep", "make", "mawk", "sed"),
)
"""What kernel modules are compiled with, besides the headers of the image's kernel."""

EX_UNAVAILABLE: Final = 69
"""A locked package is nowhere to be had (sysexits.h)."""


@dataclass(frozen=True, slots=True)
class Build:
    """One build of one commit.

    Attributes:
        work: scratch. cache: tools and packages, shared by all builds. out: results.
        lock: the root's Debian packages, a `Package` a line.
        config: what is measured instead of the profile's own configuration.
        firmware: options of image/measure about machines that start the UKI themselves.
        model_volume: of image/model_volume.py, where the weights are a disk of their own.
        driver: NVIDIA's file. driver_lock: which one it has to be.
        rims: folder with manifests of NVIDIA's, `<RIM id>.xml`.
    """

    profile: str
    output: str
    commit: str
    version: str
    epoch: int
    work: Path
    cache: Path
    out: Path
    lock: Path
    config: Path | None = None
    firmware: tuple[str, ...] = ()
    model_volume: Path | None = None
    driver: Path | None = None
    driver_lock: Path | None = None
    rims: Path | None = None

    @property
    def module_lock(self) -> Path:
        """What the driver's modules are compiled with, in the same form; none of it is in the root."""
        return self.lock.with_name(f"{self.lock.stem}-modules.txt")

    @property
    def tools(self) -> Path:
        """The tools tree, named by what is in it."""
        names = (IMAGE / "tools-packages.txt").read_bytes()
        return self.cache / f"tools-{hashlib.sha256(names).hexdigest()[:16]}"

    @property
    def stage(self) -> Path:
        """What goes into the root besides packages."""
        return self.work / "stage"

    @property
    def initrd(self) -> Path:
        """Without kernel modules, which mkosi appends."""
        return self.work / "initrd.cpio.zst"

    @property
    def packages(self) -> Path:
        """Beside the image: the lock that it was made by, or that would make it again."""
        return self.out / "packages.txt"

    @property
    def archives(self) -> Path:
        """Package files, as apt names them; shared by all profiles."""
        return self.cache / "packages/cache/apt/archives"


def main() -> int:
    """Returns the exit status: 0 built, 1 something failed and one line says what, 69 that a locked
    package cannot be had."""
    parser = argparse.ArgumentParser(
        prog="image/build.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("profile", choices=PROFILES)
    parser.add_argument("--output", choices=OUTPUTS, default="metal")
    parser.add_argument("--nvidia-driver", type=Path, help="NVIDIA's file (gpu)")
    parser.add_argument(
        "--nvidia-driver-lock", type=Path, help="its version and SHA-256, as TOML (gpu)"
    )
    parser.add_argument("--rims", type=Path, help="folder with NVIDIA's manifests (gpu)")
    parser.add_argument(
        "--model-volume", type=Path, help="what image/model_volume.py wrote beside its disk"
    )
    parser.add_argument("--work", type=Path, help="scratch; default: below the cache")
    parser.add_argument("--out", type=Path, help="results; default: image/out/PROFILE")
    parser.add_argument("--config", type=Path, help="measured instead of the profile's own")
    metal = parser.add_argument_group(
        "bare metal", "what the machine is started with, so that SEV-SNP and TDX are predicted too"
    )
    metal.add_argument("--snp-firmware", type=Path, help="with --vcpus and --vcpu-type")
    metal.add_argument("--vcpus", help="of the guest, as 8; 8,16 are alternatives")
    metal.add_argument("--vcpu-type", help="QEMU's name, as EPYC-v4")
    metal.add_argument("--snp-features", help="SEV_FEATURES, if not 1")
    metal.add_argument("--tdx-firmware", type=Path)
    packages = parser.add_mutually_exclusive_group()
    packages.add_argument(
        "--packages", type=Path, help="a lock; default: image/packages/PROFILE.txt"
    )
    packages.add_argument(
        "--lock",
        action="store_true",
        help="take what the mirrors have now, and write the lock anew",
    )
    packages.add_argument(
        "--unlocked",
        action="store_true",
        help="take what the mirrors have now, for this build",
    )
    parser.add_argument(
        "--only", choices=("tools", "packages", "stage", "initrd"), help="stop after this step"
    )
    arguments = parser.parse_args()
    from_mirrors = arguments.lock or arguments.unlocked
    given = (arguments.nvidia_driver, arguments.nvidia_driver_lock, arguments.rims)
    if arguments.profile != "gpu" and any(given):
        parser.error("NVIDIA's driver and manifests are for gpu alone")
    if arguments.only == "packages" and not arguments.lock:
        parser.error("`--only packages` writes a lock: it needs `--lock`")
    if arguments.profile == "gpu" and from_mirrors and arguments.only != "packages":
        parser.error("gpu compiles for the kernel of its lock: first `--lock --only packages`")
    try:
        build = plan(
            arguments.profile,
            arguments.output,
            work=arguments.work,
            out=arguments.out,
            lock=arguments.packages,
            config=arguments.config,
            firmware=firmware_options(arguments),
        )
        build = replace(
            build,
            model_volume=arguments.model_volume,
            driver=arguments.nvidia_driver,
            driver_lock=arguments.nvidia_driver_lock,
            rims=arguments.rims,
        )
        make_tools(build)
        if arguments.only == "tools":
            return 0
        if arguments.only == "packages":
            lock_packages(build)
            return 0
        make_stage(build)
        if arguments.only == "stage":
            return 0
        make_initrd(build)
        if arguments.only == "initrd":
            return 0
        make_image(build, from_mirrors=from_mirrors)
        if from_mirrors:
            write_lock(build, build.packages)
        if arguments.lock:
            shutil.copy(build.packages, build.lock)
        elif not arguments.unlocked:
            shutil.copy(build.lock, build.packages)
        make_output(build)
    except BuildError as error:
        print(f"image: {error}", file=sys.stderr)
        return EX_UNAVAILABLE if isinstance(error, PackagesGoneError) else 1
    return 0


def plan(
    profile: str,
    output: str,
    *,
    work: Path | None = None,
    out: Path | None = None,
    lock: Path | None = None,
    config: Path | None = None,
    firmware: tuple[str, ...] = (),
) -> Build:
    """What is built, from the checkout: version, commit and time."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commit = said("git", "-C", ROOT, "rev-parse", "HEAD")
    if said("git", "-C", ROOT, "status", "--porcelain"):
        commit += "+changes"  # never mistaken for the commit
    epoch = int(said("git", "-C", ROOT, "log", "-1", "--format=%ct"))
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (configured if configured.is_absolute() else Path.home() / ".cache") / "dcv" / "image"
    return Build(
        profile=profile,
        output=output,
        commit=commit,
        version=project["version"],
        epoch=epoch,
        work=work.resolve() if work else cache / "work" / profile,
        cache=cache,
        out=out.resolve() if out else IMAGE / "out" / profile,
        lock=lock or IMAGE / f"packages/{profile}.txt",
        config=config,
        firmware=firmware,
    )


def firmware_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    """For image/measure, which runs last: so what is missing is said here, before the build.

    Raises:
        BuildError: a file that is not there, processors that are not told, or a cloud's machine,
            which starts with a firmware of the cloud's.
    """
    together = {bool(one) for one in (arguments.snp_firmware, arguments.vcpus, arguments.vcpu_type)}
    if len(together) > 1:
        raise BuildError("--snp-firmware, --vcpus and --vcpu-type go together")
    if arguments.output != "metal" and (arguments.snp_firmware or arguments.tdx_firmware):
        raise BuildError("--snp-firmware and --tdx-firmware are for --output metal")
    options: list[str] = []
    for name in ("snp_firmware", "vcpus", "vcpu_type", "snp_features", "tdx_firmware"):
        value = getattr(arguments, name)
        if isinstance(value, Path):
            if not value.is_file():
                raise BuildError(f"{value} is not a file")
            value = value.resolve()
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(options)


# 1. Tools.


def make_tools(build: Build) -> None:
    """The tools tree, once per list of packages."""
    if (build.tools / "usr/bin/mkosi").exists():
        return
    sources = "".join(source.line for source in debian_sources("trixie"))
    partial = build.tools.with_suffix(".partial")
    remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    excluded = ("doc", "man", "locale", "info")
    run(
        *("mmdebstrap", "--variant=apt", "--mode=auto", "--skip=output/dev", "--format=directory"),
        *(f"--dpkgopt=path-exclude=/usr/share/{one}/*" for one in excluded),
        *(f"--aptopt={option}" for option in apt_options()),
        *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"'),
        f"--include={','.join(package_list(IMAGE / 'tools-packages.txt'))}",
        *("trixie", partial, "-"),
        stdin=sources,
    )
    partial.rename(build.tools)


@dataclass(frozen=True, slots=True)
class Source:
    """One suite of a Debian mirror."""

    uri: str
    suite: str

    @property
    def line(self) -> str:
        """As in sources.list(5)."""
        return f"deb [signed-by={KEYRING}] {self.uri} {self.suite} main\n"

    @property
    def stanza(self) -> str:
        """The same in deb822 form."""
        return (
            f"Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\nComponents: main\n"
            f"Signed-By: {KEYRING}\n\n"
        )


KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


def debian_sources(suite: str) -> list[Source]:
    """`suite` with its updates, from the mirrors that this machine's apt uses for its own release.

    DCV_DEBIAN_MIRROR and DCV_DEBIAN_SECURITY_MIRROR name others.

    Raises:
        BuildError: there is none.
    """
    own = tomllib.loads(
        re.sub(r"^(\w+)=([^\"\n]*)$", r'\1="\2"', read("/etc/os-release"), flags=re.MULTILINE)
    ).get("VERSION_CODENAME", "")
    listed = said(
        *("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"),
        "Created-By: Packages",
    )
    found = {tuple(line.split()[1:]): line.split()[0] for line in listed.splitlines()}
    base = os.environ.get("DCV_DEBIAN_MIRROR") or found.get((own, "main"))
    security = os.environ.get("DCV_DEBIAN_SECURITY_MIRROR") or found.get(
        (f"{own}-security", "main")
    )
    if not base:
        raise BuildError(
            "no Debian mirror in this machine's apt configuration; set DCV_DEBIAN_MIRROR"
        )
    sources = [Source(base.rstrip("/"), suite), Source(base.rstrip("/"), f"{suite}-updates")]
    if security:
        sources.append(Source(security.rstrip("/"), f"{suite}-security"))
    return sources


def apt_options() -> list[str]:
    """What this machine's apt needs to reach its mirrors: proxies, and whether dates are checked."""
    wanted = re.compile(r"Acquire::(https?|Check-)")
    lines = said("apt-config", "dump").splitlines()
    return [line.removesuffix(";") for line in lines if wanted.match(line) and '""' not in line]


def package_list(path: Path) -> list[str]:
    """Names, one a line; `#` begins a comment."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


# 2. Stage.


def make_stage(build: Build) -> None:
    """Everything of ours that goes into the root, with fixed modes and times."""
    remove(build.stage)
    build.stage.mkdir(parents=True)
    make_environment(build)
    install_units(build)
    install_files(build)
    match build.profile:
        case "test":
            install_stand_in(build)
        case "cpu":
            install_engine(build)
        case "gpu":
            # What an operator gave wrong comes out in seconds, compiling and fetching take long.
            install_rims(build)
            install_sdk(build)
            install_driver(build)
            install_gpu_engine(build)
    refuse_simulated(build.stage)
    for path in sorted(build.stage.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (build.epoch, build.epoch), follow_symlinks=False)


def make_environment(build: Build) -> None:
    """`/opt/dcv/appliance`: the lock's wheels, then ours."""
    home = build.stage / "opt/dcv/appliance"
    wheels = build.work / "wheels"
    remove(wheels)
    # The checkout's own environment has the build backend that the development lock pins.
    run(
        *(ROOT / ".venv/bin/python", "-m", "hatchling", "build", "-t", "wheel", "-d", wheels),
        cwd=ROOT,
        env={"SOURCE_DATE_EPOCH": str(build.epoch)},
    )
    (wheel,) = wheels.glob("*.whl")
    packages = install_packages(home, "appliance")
    run(*PIP_INSTALL, "--target", packages, "--no-index", wheel)
    remove_simulated(packages)
    finish_environment(build, home)
    script = home / "bin/dcv"
    script.write_text(
        "#!/opt/dcv/appliance/bin/python -IB\n"
        "import sys\n\nfrom appliance.cli import main\n\nsys.exit(main())\n",
        encoding="utf-8",
    )
    script.chmod(0o755)


PIP_INSTALL: Final = (
    *(ROOT / ".venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install"),
    *("--quiet", "--no-deps", "--no-compile"),
)


def install_packages(home: Path, *locks: str) -> Path:
    """The wheels of image/locks, by hash, into an environment; returns where they are."""
    packages = home / "lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    lists = [word for lock in locks for word in ("-r", IMAGE / f"locks/{lock}.txt")]
    run(
        *(*PIP_INSTALL, "--target", packages),
        *("--require-hashes", "--only-binary", ":all:", *lists),
    )
    return packages


def finish_environment(build: Build, home: Path) -> None:
    """What makes a folder of packages an environment of the image's Python; compiled, because the
    root is read-only."""
    packages = home / "lib/python3.11/site-packages"
    for bundled in (packages / "bin", packages / "tests"):
        remove(bundled)
    for metadata in packages.glob("*.dist-info"):
        for name in ("direct_url.json", "REQUESTED", "INSTALLER"):
            (metadata / name).unlink(missing_ok=True)  # where it came from is not part of it
        _keep_true(metadata / "RECORD")
    (home / "pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n", encoding="utf-8"
    )
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to(PYTHON)
    compileall.compile_dir(
        packages,
        quiet=2,  # templates and tests for other Pythons are in some packages
        workers=0,
        stripdir=str(build.stage),
        prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def _keep_true(record: Path) -> None:
    """Only those lines of a wheel's list whose file is there: xgrammar finds its library by them, and
    the scripts that pip made name the building machine."""
    packages = record.parent.parent
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
    there = (line for line in lines if (packages / next(csv.reader([line]))[0]).exists())
    record.write_text("".join(there), encoding="utf-8")


def remove_simulated(packages: Path) -> None:
    """No simulated evidence in an image: neither its code nor its keys nor its roots."""
    for path in sorted((packages / "appliance").rglob("*simulated*")):
        remove(path)


def refuse_simulated(stage: Path) -> None:
    """Raises BuildError for a file of that name, wherever it came from. Not judged: the engine's
    packages, which have the word for something else (speculative decoding)."""
    foreign = stage / "opt/dcv/engine/lib"
    left = [
        path
        for path in stage.rglob("*")
        if "simulated" in path.name.lower() and not path.is_relative_to(foreign)
    ]
    if left:
        raise BuildError(f"a simulated file would be in the image: {left[0].relative_to(stage)}")


def install_units(build: Build) -> None:
    """The folder systemd/, each file where systemd looks for its kind."""
    usr_lib = build.stage / "usr/lib"
    for path in sorted((ROOT / "systemd").iterdir()):
        if path.name not in ("README.md", "profiles"):
            copy(path, usr_lib / UNIT_PLACES.get(path.name, f"systemd/system/{path.name}"))
    for name in (build.profile, build.output):
        folder = ROOT / "systemd/profiles" / name
        if folder.is_dir():
            copy(folder, usr_lib / "systemd/system")


UNIT_PLACES: Final = {
    "dcv.preset": "systemd/system-preset/00-dcv.preset",
    "dcv.rules": "udev/rules.d/90-dcv.rules",
    "dcv.sysusers.conf": "sysusers.d/dcv.conf",
    "dcv.tmpfiles.conf": "tmpfiles.d/dcv.conf",
}


def install_files(build: Build) -> None:
    """Configuration, firewall and os-release of this build."""
    share = build.stage / "usr/share/dcv"
    copy(measured_config(build), share / "dcv.toml")
    copy(IMAGE / "mkosi/masked-units", share / "masked-units")
    copy(IMAGE / "mkosi/nftables.conf", build.stage / "etc/nftables.conf")
    (build.stage / "etc/nftables.d").mkdir()
    (build.stage / "etc/nftables.d/config.nft").write_text(
        firewall_rules(read(measured_config(build)), build.output), encoding="utf-8"
    )
    copy(IMAGE / "mkosi/files" / "common", build.stage / "usr/lib/dcv")
    for name in (build.profile, build.output):
        folder = IMAGE / "mkosi/files" / name
        if folder.is_dir():
            copy(folder, build.stage / "usr/lib/dcv")
    if volume := model_volume(build):
        (share / "model-volume").write_text(volume, encoding="utf-8")
    release = {
        "ID": "dcv",
        "ID_LIKE": "debian",
        "NAME": "DCV",
        "PRETTY_NAME": f"DCV {build.version} ({build.profile})",
        "VERSION_ID": build.version,
        "BUILD_ID": build.commit,
        "VARIANT_ID": build.profile,
        "IMAGE_ID": "dcv",
        "IMAGE_VERSION": build.version,
    }
    text = "".join(f'{key}="{value}"\n' for key, value in release.items())
    (build.stage / "usr/lib/os-release").write_text(text, encoding="utf-8")


def model_volume(build: Build) -> str:
    """What dcv-model.service opens; empty where the image carries its model.

    Raises:
        BuildError: it is another file, or the configuration does not look where it is mounted.
    """
    if build.model_volume is None:
        if build.profile == "gpu":
            raise BuildError("the gpu profile needs --model-volume FILE (image/model_volume.py)")
        return ""
    text = read(build.model_volume) if build.model_volume.is_file() else ""
    if not MODEL_VOLUME.fullmatch(text):
        raise BuildError("--model-volume: not what image/model_volume.py wrote")
    if tomllib.loads(read(measured_config(build)))["model"]["path"] != MODEL_MOUNT:
        raise BuildError(f"[model] path: a volume is mounted at {MODEL_MOUNT}")
    return text


def measured_config(build: Build) -> Path:
    """The configuration file that becomes part of the image."""
    if build.config is not None:
        return build.config
    match build.profile, build.output:
        case "test", _:
            return IMAGE / "mkosi/test.toml"
        case "cpu", _:
            return IMAGE / "config/cpu.toml"
        case _, "metal":
            return IMAGE / "config/metal-snp.toml"
        case _, output:
            return IMAGE / f"config/{output}.toml"


def firewall_rules(config: str, output: str) -> str:
    """What the gateway and the collector may reach beyond the base rules, from the measured file.

    Vendors' services move between addresses, so HTTPS is open by user, not by address; which names
    are asked is measured, and what they answer is signed. The clouds' own addresses are fixed.
    """
    attestation = tomllib.loads(config)["attestation"]
    rules = ["# From the measured configuration, by image/build.py."]
    if attestation.get("endorsements", "online") == "online":
        rules.append('meta skuid "dcv" tcp dport 443 accept')
    if attestation["cpu"] == "azure_vtpm":
        rules.append('meta skuid "root" ip daddr 169.254.169.254 tcp dport 80 accept')
    if output == "azure":
        rules.append("ip daddr 168.63.129.16 tcp dport 80 accept")
    return "\n".join(rules) + "\n"


def install_stand_in(build: Build) -> None:
    """The tests' engine, a model that is one file, and the root that vouches for the test's TPM."""
    lib = build.stage / "usr/lib/dcv/stand-in/tests"
    (lib / "fakes").mkdir(parents=True)
    (lib / "__init__.py").touch()
    (lib / "fakes/__init__.py").touch()
    for name in ("engine", "dialect", "model", "modes", "request"):
        copy(ROOT / f"tests/fakes/sglang_{name}.py", lib / f"fakes/sglang_{name}.py")
    model = build.stage / "usr/share/dcv/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    copy(IMAGE / "mkosi/test-tpm-root.pem", build.stage / "usr/share/dcv/tpm-root.pem")


def install_engine(build: Build) -> None:
    """SGLang for a processor, the embedded model, and the root that vouches for the test's TPM."""
    home = build.stage / "opt/dcv/engine"
    install_packages(home, "torch-cpu", "engine-cpu")
    finish_environment(build, home)
    copy(ROOT / "appliance/engine/cpu/path", build.stage / "opt/dcv/engine-cpu")
    for cached in (build.stage / "opt/dcv/engine-cpu").rglob("__pycache__"):
        remove(cached)
    # Beside the development scripts, which know where `just setup` puts it.
    sys.path.append(str(IMAGE / "development"))
    from paths import model_digests, model_directory  # noqa: PLC0415

    model = build.stage / "usr/share/dcv/model"
    for name, digest in model_digests().items():
        copy(model_directory() / name, model / name)
        if sha256(model / name) != digest:
            raise BuildError(f"{name} of the model is not the lock's: run `just setup` again")
    copy(IMAGE / "mkosi/test-tpm-root.pem", build.stage / "usr/share/dcv/tpm-root.pem")


def install_gpu_engine(build: Build) -> None:
    """SGLang as its authors release it, with CUDA's libraries."""
    home = build.stage / "opt/dcv/engine"
    install_packages(home, "engine-gpu")
    finish_environment(build, home)


def install_sdk(build: Build) -> None:
    """NVIDIA's attestation SDK, if the measured configuration asks for its opinion.

    Raises:
        BuildError: it is asked for where it is not.
    """
    attestation = tomllib.loads(read(measured_config(build)))["attestation"]
    if attestation.get("nvidia_sdk", "off") == "off":
        return
    if attestation.get("nvidia_sdk_python") != SDK_PYTHON:
        raise BuildError(f"[attestation] nvidia_sdk_python: in an image it is {SDK_PYTHON}")
    home = build.stage / "opt/dcv/nvidia-sdk"
    install_packages(home, "nvidia-sdk")
    finish_environment(build, home)


def install_rims(build: Build) -> None:
    """NVIDIA's manifests for the folder of `rim_dirs`; among them that of the driver, which the image
    fixes. They are signed, and authenticated where they are used: here only names are looked at.

    Raises:
        BuildError: that one is not there, or a file is none.
    """
    if build.rims is None:
        return
    version = nvidia_driver.read_lock(build.driver_lock).version
    files = sorted(build.rims.iterdir()) if build.rims.is_dir() else []
    for file in files:
        if not re.fullmatch(r"NV_[A-Za-z0-9_.]{1,200}\.xml", file.name) or not file.is_file():
            raise BuildError(f"--rims: {file.name} is not named as a manifest, <RIM id>.xml")
        copy(file, build.stage / "usr/share/dcv/rims" / file.name)
    wanted = f"NV_GPU_DRIVER_GH100_{version}.xml"
    if wanted not in {file.name for file in files}:
        raise BuildError(f"--rims: {wanted} is not there")


def install_driver(build: Build) -> None:
    """The operator's NVIDIA driver: unpacked, and its modules compiled for the kernel of the lock.

    Raises:
        BuildError: it is not the one that was named, or it does not compile.
    """
    lock = nvidia_driver.read_lock(build.driver_lock)
    if not build.module_lock.is_file():
        raise BuildError(f"{build.module_lock.name} is missing: `--lock --only packages` makes it")
    unpacked = build.work / "driver"
    remove(unpacked)
    nvidia_driver.unpack(build.driver, lock, unpacked)
    nvidia_driver.install(unpacked, lock.version, build.stage)
    kernel = locked_kernel(build.lock, "linux-image-")
    if locked_kernel(build.module_lock, "linux-headers-") != kernel:
        raise BuildError(f"{build.module_lock.name} is for another kernel than {build.lock.name}")
    nvidia_driver.compile_modules(
        unpacked,
        tree=make_module_tree(build),
        kernel=kernel,
        epoch=build.epoch,
        stage=build.stage,
    )


def locked_kernel(lock: Path, prefix: str) -> str:
    """The release of the one kernel in a lock, by the package that is named after it."""
    found = {
        match[1]
        for line in package_list(lock)
        if (match := re.fullmatch(rf"{prefix}([0-9]\S*-cloud-amd64) .*", line))
    }
    if len(found) != 1:
        raise BuildError(f"{lock.name} names {len(found)} kernels")
    return found.pop()


def module_tree(build: Build) -> Path:
    """Where compiler and kernel headers are, once they are; named by what is in it."""
    return build.cache / f"modules-{sha256(build.module_lock)[:16]}"


def make_module_tree(build: Build) -> Path:
    """The packages of the module lock, unpacked and not installed: no script of theirs runs."""
    tree = module_tree(build)
    if tree.exists():
        return tree
    partial = tree.with_suffix(".partial")
    remove(partial)
    for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "build", "dev", "proc", "tmp"):
        (partial / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (partial / name).symlink_to(f"usr/{name}")
    for package in locked_packages(replace(build, lock=build.module_lock)):
        run("dpkg-deb", "--extract", package, partial)
    (partial / "usr/bin/awk").symlink_to("mawk")  # an alternative, which installing would choose
    partial.rename(tree)
    return tree


# 3. Initrd.


def make_initrd(build: Build) -> None:
    """busybox, veritysetup, blkid and modprobe with their libraries, and image/initrd/init."""
    tree = build.work / "initrd"
    remove(tree)
    for name in ("bin", "dev", "proc", "sys", "run", "newroot", "tmp"):
        (tree / name).mkdir(parents=True)
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for link, target in (
        ("lib", "usr/lib"),
        ("lib64", "usr/lib/x86_64-linux-gnu"),
        ("sbin", "bin"),
    ):
        (tree / link).symlink_to(target)
    tools = build.tools
    for program in INITRD_PROGRAMS:
        shutil.copy(tools / program, tree / "bin" / Path(program).name)
    for library in needed_libraries(tools, INITRD_PROGRAMS):
        shutil.copy(library, libraries / library.name)
    (tree / "bin/modprobe").symlink_to("kmod")
    shutil.copy(tools / "usr/bin/busybox", tree / "bin/busybox")
    for applet in INITRD_APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    shutil.copy(IMAGE / "initrd/init", tree / "init")
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (build.epoch, build.epoch), follow_symlinks=False)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "--reproducible", "--owner", "0:0"],
        input="\n".join(names).encode(),
        cwd=tree,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    packed = subprocess.run(
        ["zstd", "-q", "-19"], input=archive, stdout=subprocess.PIPE, check=True
    )
    build.initrd.write_bytes(packed.stdout)


def needed_libraries(tools: Path, programs: Sequence[str]) -> list[Path]:
    """Shared libraries of programs of the tools tree, as its own loader finds them."""
    loader = tools / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    folder = loader.parent
    found = {loader}
    for program in programs:
        listed = said(loader, "--library-path", folder, "--list", tools / program)
        for line in listed.splitlines():
            if (match := re.search(r"=> (\S+) \(", line)) and "vdso" not in line:
                found.add(folder / Path(match[1]).name)
    return sorted(found)


# 4. mkosi.


@dataclass(frozen=True, slots=True)
class Package:
    """One line of a lock.

    Attributes:
        pool_path: where a Debian mirror, or one of its security archive, has the file.
    """

    name: str
    version: str
    architecture: str
    sha256: str
    pool_path: str

    @property
    def file_name(self) -> str:
        """In apt's cache, where an epoch's colon is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def locked_packages(build: Build) -> list[Path]:
    """The files that the lock names, each held to its hash; fetched, if the cache has them not.

    Raises:
        PackagesGoneError: there are some that neither the cache nor a mirror has.
        BuildError: there is no lock, or a file in the cache is another one.
    """
    if not build.lock.exists():
        raise BuildError(
            f"{build.lock.parent.name}/{build.lock.name} is missing: `--lock` makes it from the mirrors"
        )
    packages = [Package(*line.split()) for line in package_list(build.lock)]
    missing = [one for one in packages if not (build.archives / one.file_name).exists()]
    if missing:
        print(f"image: fetching {len(missing)} locked packages", flush=True)
        mirrors = dict.fromkeys(one.uri for one in debian_sources("trixie"))
        gone = [one for one in missing if not fetch_package(build, one, tuple(mirrors))]
        if gone:
            raise PackagesGoneError(
                "neither in the cache nor on the mirrors: "
                + ", ".join(f"{one.name} {one.version}" for one in gone)
                + f": put the files into {build.archives}, or take what the mirrors have now with"
                " `--lock`"
            )
    files = [build.archives / one.file_name for one in packages]
    for package, path in zip(packages, files, strict=True):
        if (got := sha256(path)) != package.sha256:
            raise BuildError(f"{path}: expected SHA-256 {package.sha256}, got {got}")
    return files


def fetch_package(build: Build, package: Package, mirrors: Sequence[str]) -> bool:
    """Into the cache, by apt's own means of getting through to a mirror; False if none has it.

    No index is asked: the hash says which file is meant, and mirrors keep a file for a while after
    their index has gone on to the next version.
    """
    build.archives.mkdir(parents=True, exist_ok=True)
    target = build.archives / package.file_name
    partial = target.with_suffix(".partial")
    for mirror in mirrors:
        uri = f"{mirror}/{quote(package.pool_path)}"
        done = subprocess.run(
            [
                *(APT_HELPER, "-qq", "-o", "APT::Sandbox::User=root", "download-file"),
                *(uri, partial, f"SHA256:{package.sha256}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # a mirror that has it not is an answer
            check=False,
        )
        if done.returncode == 0:
            partial.rename(target)
            return True
        remove(partial)
    return False


APT_HELPER: Final = "/usr/lib/apt/apt-helper"


def lock_packages(build: Build) -> None:
    """Resolve a profile's packages and write its lock, without an appliance and without an image.

    For gpu also what its modules are compiled with, for the same kernel.
    """
    resolved = replace(build, out=build.work / "resolved")
    remove(build.stage)
    build.stage.mkdir(parents=True)
    install_units(build)
    copy(IMAGE / "mkosi/masked-units", build.stage / "usr/share/dcv/masked-units")
    make_image(resolved, "--format=directory", "--bootable=no", from_mirrors=True)
    write_lock(resolved, build.lock)
    if build.profile == "gpu":
        write_module_lock(build)


def write_lock(build: Build, file: Path) -> None:
    """What is in the image that was just built, from its manifest."""
    manifest = json.loads(read(build.out / f"dcv-{build.profile}.manifest"))
    indexed = {one.sha256: one for one in mirror_packages(apt_state(build))}
    packages = []
    for item in manifest["packages"]:
        package = Package(item["name"], item["version"], item["architecture"], "", "")
        digest = sha256(build.archives / package.file_name)
        if digest not in indexed:
            raise BuildError(
                f"the mirrors' indexes went on while this was built, {package.name} is not in them"
                " any more: once again"
            )
        packages.append(replace(package, sha256=digest, pool_path=indexed[digest].pool_path))
    write_packages(
        file,
        f"# Debian packages of the {build.profile} profile, made by `image/build.py --lock`: name,\n"
        "# version, architecture, SHA-256, path on a mirror. A build takes these files and no others.",
        packages,
    )


def write_module_lock(build: Build) -> None:
    """What apt would install beside the headers of the locked kernel, on a machine with nothing."""
    options = apt_state(build)
    headers = f"linux-headers-{locked_kernel(build.lock, 'linux-image-')}"
    listed = said(
        *("apt-get", *options, "-qq", "--no-install-recommends", "--print-uris", "install"),
        *(*MODULE_PACKAGES, headers),
    )
    indexed = {one.file_name: one for one in mirror_packages(options)}
    write_packages(
        build.module_lock,
        "# What the driver's kernel modules are compiled with, made by `image/build.py gpu --lock`:\n"
        "# headers of the kernel of gpu.txt, a compiler, and what they need. None of it is in the image.",
        [indexed[line.split()[1]] for line in listed.splitlines()],
    )


def write_packages(file: Path, head: str, packages: Sequence[Package]) -> None:
    """A lock, in the order of names."""
    lines = [
        f"{one.name} {one.version} {one.architecture} {one.sha256} {one.pool_path}"
        for one in sorted(packages, key=lambda one: one.name)
    ]
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def apt_state(build: Build) -> list[str]:
    """Options for an apt of our own, which knows the image's suites and of no installed package."""
    state = build.work / "apt"
    remove(state)
    for name in ("lists/partial", "archives/partial", "parts"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    sources = debian_sources("trixie") + debian_sources("bookworm")
    (state / "sources.list").write_text("".join(one.line for one in sources), encoding="utf-8")
    (state / "preferences").write_text(PREFERENCES, encoding="utf-8")
    settings = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Etc::SourceList": state / "sources.list",
        "Dir::Etc::SourceParts": state / "parts",
        "Dir::Etc::Preferences": state / "preferences",
        "Dir::Etc::PreferencesParts": state / "parts",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", "-qq", *options, "update")
    return options


PREFERENCES: Final = "Package: *\nPin: release n=bookworm*\nPin-Priority: 100\n"
"""Debian 12 is for its python3.11 only: what trixie has comes from trixie."""


def mirror_packages(options: Sequence[str]) -> list[Package]:
    """Every package in the mirrors' indexes."""
    found = []
    listed = ("indextargets", "--format", "$(FILENAME)", "Created-By: Packages")
    names = ("Package", "Version", "Architecture", "SHA256", "Filename")
    field = re.compile(rf"^({'|'.join(names)}): (\S+)$", re.MULTILINE)
    for index in said("apt-get", *options, *listed).splitlines():
        for stanza in said(APT_HELPER, *options, "cat-file", index).split("\n\n"):
            fields = dict(field.findall(stanza))
            if len(fields) == len(names):
                found.append(Package(*(fields[name] for name in names)))
    return found


def make_image(build: Build, *settings: str, from_mirrors: bool) -> None:
    """Run trixie's mkosi on this machine's Python, on the locked packages or on the mirrors'.

    Args:
        settings: as mkosi spells them, in place of those of image/mkosi.
    """
    sandbox = build.work / "sandbox"
    remove(sandbox)
    apt = sandbox / "etc/apt"
    for name in ("sources.list.d", "apt.conf.d", "preferences.d"):
        (apt / name).mkdir(parents=True)
    # mkosi leaves its own list of mirrors out when this file is there.
    debs = build.work / "debs"
    remove(debs)
    debs.mkdir(parents=True)
    sources: list[Source] = []
    if from_mirrors:
        sources = debian_sources("trixie") + debian_sources("bookworm")
    else:
        for path in locked_packages(build):
            shutil.copy(path, debs)
    (apt / "sources.list.d/mkosi.sources").write_text("".join(one.stanza for one in sources))
    (apt / "apt.conf.d/99host").write_text("".join(f"{option};\n" for option in apt_options()))
    (apt / "preferences.d/10-dcv").write_text(PREFERENCES)
    for path in (build.out, build.cache / "packages", build.work / "mkosi"):
        path.mkdir(parents=True, exist_ok=True)
    for old in (*build.out.glob(f"dcv-{build.profile}*"), build.out / "reference-values.json"):
        remove(old)
    run(
        *(sys.executable, "-m", "mkosi", "--force", "--directory", IMAGE / "mkosi"),
        *("--tools-tree", build.tools, "--sandbox-tree", sandbox),
        *("--profile", build.profile, "--image-version", build.version),
        *("--source-date-epoch", str(build.epoch)),
        *("--initrd", build.initrd, "--extra-tree", build.stage),
        *settings,
        *("--output", f"dcv-{build.profile}", "--output-directory", build.out),
        *("--package-directory", debs),
        *("--package-cache-directory", build.cache / "packages"),
        *("--workspace-directory", build.work / "mkosi", "build"),
        env={"PYTHONPATH": str(build.tools / "usr/lib/python3/dist-packages")},
    )


# 5. What it will measure, and the forms in which it is handed over.


def make_output(build: Build) -> None:
    """The cloud's form of the disk, and the reference values."""
    disk = build.out / f"dcv-{build.profile}.raw"
    run(
        *(ROOT / ".venv/bin/python", "-m", "image.measure", build.out / f"dcv-{build.profile}.efi"),
        *("--version", build.version, "--commit", build.commit, "--profile", build.profile),
        *("--out", build.out / "reference-values.json"),
        *build.firmware,
        cwd=ROOT,
    )
    match build.output:
        case "azure":
            clouds.write_vhd(disk, disk.with_suffix(".vhd"), epoch=build.epoch)
        case "gcp":
            clouds.write_gcp_tar(disk, disk.with_suffix(".tar.gz"), epoch=build.epoch)
    if build.driver_lock is not None:  # for whoever builds it again, with `--packages`
        copy(build.driver_lock, build.out / "nvidia-driver.toml")
        copy(build.module_lock, build.packages.with_name("packages-modules.txt"))


if __name__ == "__main__":
    sys.exit(main())

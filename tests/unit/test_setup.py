"""Setup, on real virtual environments and a real pip, with an index that is a folder of tiny wheels."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from paths import Layout, ModelLock
from provisioning.environments import Environment, Variant, ensure_environment, site_packages
from provisioning.errors import NoMatchingDistributionError, SetupError
from provisioning.machine import exclusively, require_space, tree_bytes
from provisioning.model import ensure_model
from provisioning.pip import explain, run_logged, run_pip
from provisioning.progress import Step

ROOT: Final = Path(__file__).resolve().parents[2]
SETUP: Final = ROOT / "image" / "development" / "setup.py"
LOG: Final = Path("setup-x.log")

# What pip 23.2.1 printed when each of these was made to happen.

HASH_MISMATCH: Final = """\
Processing ./idna-3.20-py3-none-any.whl (from -r h.txt (line 1))
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the \
package versions, please update the hashes. Otherwise, examine the package contents carefully; \
someone may have tampered with them.
    idna==3.20 from file:///wheels/idna-3.20-py3-none-any.whl#sha256=ab7ae7122974 (from -r h.txt (line 1)):
        Expected sha256 0000000000000000000000000000000000000000000000000000000000000000
             Got        ab7ae7122974553370f0bdb919e1a960b2cd1bc1ef0276416d896db81c14582c
"""

HASH_MISMATCH_OF_SEVERAL: Final = """\
    idna==3.20 from file:///wheels/idna-3.20-py3-none-any.whl (from -r h.txt (line 1)):
        Expected sha256 0000000000000000000000000000000000000000000000000000000000000000
        Expected     or 1111111111111111111111111111111111111111111111111111111111111111
             Got        ab7ae7122974553370f0bdb919e1a960b2cd1bc1ef0276416d896db81c14582c
"""

NO_NETWORK: Final = """\
Looking in indexes: http://127.0.0.1:9/simple
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after \
connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPConnection object at \
0x7fd97f1fbf10>: Failed to establish a new connection: [Errno 111] Connection refused')': /simple/idna/
ERROR: Could not find a version that satisfies the requirement idna==3.20 (from versions: none)
ERROR: No matching distribution found for idna==3.20
"""

NO_PROJECT: Final = """\
Looking in links: /wheels
ERROR: Could not find a version that satisfies the requirement idna==3.20 (from versions: none)
ERROR: No matching distribution found for idna==3.20
"""

NO_MATCH: Final = """\
ERROR: Could not find a version that satisfies the requirement idna==3.20+cpu (from versions: 3.19, 3.20)
ERROR: No matching distribution found for idna==3.20+cpu
"""

WRONG_PYTHON: Final = """\
  Preparing metadata (pyproject.toml): finished with status 'done'
ERROR: Package 'proj' requires a different Python: 3.11.7 not in '>=3.99'
"""

DISK_FULL: Final = """\
Installing collected packages: numpy
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device

"""

FAILED_BUILD: Final = """\
  error: subprocess-exited-with-error
      ModuleNotFoundError: No module named 'editables'
      [end of output]
error: metadata-generation-failed
"""


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (HASH_MISMATCH, "idna==3.20 came as another file than the lock names (sha256 ab7ae7122974"),
        (HASH_MISMATCH_OF_SEVERAL, "idna==3.20 came as another file than the lock names"),
        (NO_NETWORK, "no connection to the package index: check the network and run it again"),
        (NO_PROJECT, "no package index that pip is configured for has idna==3.20, in any version"),
        (NO_MATCH, "the package index has no idna==3.20+cpu for this machine"),
        (WRONG_PYTHON, "wrong Python (3.11.7 not in '>=3.99'): the locks are for CPython 3.11"),
        (DISK_FULL, "the disk is full: make room and run it again"),
        (FAILED_BUILD, "ModuleNotFoundError: No module named 'editables' (all of it: setup-x.log)"),
        ("", "pip failed (all of it: setup-x.log)"),
    ],
)
def test_a_failure_of_pip_becomes_one_line_that_says_what_to_do(printed: str, said: str) -> None:
    message = str(explain(printed, log=LOG))
    assert said in message
    assert "\n" not in message


def test_only_an_index_that_answers_can_lack_a_distribution() -> None:
    """Or else a machine without network would be made to download the large torch."""
    assert isinstance(explain(NO_MATCH, log=LOG), NoMatchingDistributionError)
    assert not isinstance(explain(NO_NETWORK, log=LOG), NoMatchingDistributionError)
    assert not isinstance(explain(NO_PROJECT, log=LOG), NoMatchingDistributionError)


def test_an_index_that_refuses_connections_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_no_configuration_of_pip(monkeypatch)
    arguments = ["download", "--retries", "1", "--index-url", "http://127.0.0.1:9/simple"]
    with pytest.raises(SetupError, match="no connection to the package index"):
        run_pip(Path(sys.executable), [*arguments, "dcv-test-a==1"], log=tmp_path / "log")
    assert "NewConnectionError" in (tmp_path / "log").read_text()


# --- an index and a clone ------------------------------------------------------------------------


@dataclass
class Recorder:
    """A reporter that remembers, and that can interrupt as a person would."""

    lines: list[str] = field(default_factory=list)
    interrupt: bool = False

    def say(self, part: str, text: str) -> None:
        self.lines.append(f"{part}: {text}")

    @contextmanager
    def step(self, part: str, text: str) -> Iterator[Step]:
        self.say(part, text)
        yield self

    def update(self, done: float, note: str) -> None:
        assert 0 <= done <= 1
        if self.interrupt:
            raise KeyboardInterrupt


@dataclass
class Clone:
    """A clone with locks of its own, and the folder of wheels that is pip's only index."""

    layout: Layout
    wheels: Path

    @property
    def environment(self) -> Environment:
        return Environment("test", ".test", (Variant(("one",), 1), Variant(("two",), 1)))

    @property
    def folder(self) -> Path:
        return self.layout.root / ".test"

    def ensure(self, *, interrupt: bool = False) -> list[str]:
        recorder = Recorder(interrupt=interrupt)
        ensure_environment(self.environment, self.layout, recorder)
        return recorder.lines

    def wheel(self, name: str, version: str) -> str:
        """Put a wheel of one module into the index. Returns its line for a lock."""
        module, info = f"{name}.py", f"{name}-{version}.dist-info"
        files = {
            module: f"VERSION = {version!r}\n",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{path},{_record(text)},{len(text)}\n" for path, text in files.items())
        path = self.wheels / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
                archive.writestr(member, text)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"

    def lock(self, name: str, *lines: str) -> None:
        text = "# download: 2500000000 bytes\n" + "".join(lines)
        (self.layout.locks / f"{name}.txt").write_text(text)

    def versions(self) -> dict[str, str]:
        """What the environment's own interpreter finds of the test's wheels."""
        code = (
            "import importlib.metadata as m;"
            "print(*(f'{d.name}={d.version}' for d in m.distributions() if d.name.startswith('dcv')))"
        )
        python = self.folder / "bin" / "python"
        printed = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, check=True
        )
        return dict(sorted(pair.split("=") for pair in printed.stdout.split()))


def _record(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _use_no_configuration_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    _use_no_configuration_of_pip(monkeypatch)
    wheels = tmp_path / "wheels"
    layout = Layout(tmp_path / "clone", tmp_path / "cache")
    for folder in (wheels, layout.locks, layout.run):
        folder.mkdir(parents=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    clone = Clone(layout, wheels)
    clone.lock("two")
    return clone


# --- environments --------------------------------------------------------------------------------


def test_an_environment_is_made_once_and_then_follows_its_lock(clone: Clone) -> None:
    a1, a2 = clone.wheel("dcv_a", "1"), clone.wheel("dcv_a", "2")
    b1, c1 = clone.wheel("dcv_b", "1"), clone.wheel("dcv_c", "1")
    clone.lock("one", a1, b1)
    assert clone.ensure() == ["test: installing 2 packages from one.txt (2.5 GB in all)"]
    assert clone.versions() == {"dcv_a": "1", "dcv_b": "1"}

    started = time.process_time()
    assert clone.ensure() == ["test: up to date (.test)"]
    assert time.process_time() - started < 0.1  # our own work: it starts no pip

    # b is no longer named, a is another version, c is new.
    clone.lock("one", a2, c1)
    assert clone.ensure() == ["test: installing 2 packages from one.txt (2.5 GB in all)"]
    assert clone.versions() == {"dcv_a": "2", "dcv_c": "1"}


def test_an_interrupted_installation_goes_on(clone: Clone) -> None:
    clone.lock("one", clone.wheel("dcv_a", "1"), clone.wheel("dcv_b", "1"))
    with pytest.raises(KeyboardInterrupt):
        clone.ensure(interrupt=True)
    assert not list(clone.folder.glob("dcv-setup*"))
    clone.ensure()
    # As if the power had gone in the middle of unpacking a.
    (clone.folder / "dcv-setup.json").unlink()
    (site_packages(clone.folder) / "dcv_a.py").write_text("")
    assert clone.ensure() == ["test: installing 1 packages from one.txt (2.5 GB in all)"]
    assert (site_packages(clone.folder) / "dcv_a.py").read_text() == "VERSION = '1'\n"


def test_a_file_with_another_digest_is_refused_by_name_and_not_stamped(clone: Clone) -> None:
    right = clone.wheel("dcv_a", "1")
    clone.lock("one", right[:-5] + "0000\n")
    with pytest.raises(SetupError, match=r"dcv_a==1 came as another file than the lock names"):
        clone.ensure()
    assert clone.versions() == {}
    assert not (clone.folder / "dcv-setup.json").exists()


def test_without_the_first_choice_the_second_is_taken_and_its_size_said(clone: Clone) -> None:
    line = clone.wheel("dcv_a", "1")
    clone.lock("one", line.replace("==1", "==1+cpu"))
    clone.lock("two", line)
    assert clone.ensure() == [
        "test: installing 1 packages from one.txt (2.5 GB in all)",
        "test: no one on this machine's index: two downloads 2.5 GB",
        "test: installing 1 packages from two.txt (2.5 GB in all)",
    ]
    assert clone.ensure() == ["test: up to date (.test)"]


def test_an_environment_of_a_copied_clone_is_made_anew(clone: Clone) -> None:
    """A virtual environment has its own path inside: a copy of it would use the original."""
    clone.lock("one", clone.wheel("dcv_a", "1"))
    clone.ensure()
    copy = Clone(Layout(clone.layout.root.with_name("copy"), clone.layout.cache), clone.wheels)
    clone.layout.root.rename(copy.layout.root)
    assert copy.ensure() != ["test: up to date (.test)"]
    assert copy.versions() == {"dcv_a": "1"}


def test_a_file_that_is_no_lock_is_refused(clone: Clone) -> None:
    (clone.layout.locks / "one.txt").write_text("dcv_a\n")
    with pytest.raises(SetupError, match="not a lock: make it again with image/locks/compile one"):
        clone.ensure()


# --- the machine ---------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"needs 4\.0 GB more, 3\.9 GB are free: make room"):
        require_space(tmp_path / "env", 4_000_000_000, free=lambda _: 3_900_000_000)
    require_space(tmp_path / "env", 4_000_000_000, free=lambda _: 4_000_000_000)


def test_what_is_installed_already_needs_no_room_again(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(1_000_000))
    there = tree_bytes(tmp_path)
    assert there >= 1_000_000
    require_space(tmp_path, there + 10, free=lambda _: 10)
    with pytest.raises(SetupError):
        require_space(tmp_path, there + 11, free=lambda _: 10)


def test_two_setups_of_one_clone_do_not_run_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "setup.lock"
    with (
        exclusively(lock, "of this clone is running"),
        pytest.raises(SetupError, match="another setup of this clone is running: wait"),
        exclusively(lock, "of this clone is running"),
    ):
        pass
    with exclusively(lock, "of this clone is running"):
        pass


def test_an_interrupt_takes_the_child_along(tmp_path: Path) -> None:
    """Even where the terminal does not: the child here is only told by its parent."""
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt() -> None:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], log=tmp_path / "log", on_tick=interrupt)
    assert not Path("/proc", pid_file.read_text()).exists()


# --- the model -----------------------------------------------------------------------------------


@pytest.fixture
def with_model(tmp_path: Path) -> Layout:
    """A clone, and in the cache a model of two files just as its lock wants them."""
    layout = Layout(tmp_path / "clone", tmp_path / "cache")
    layout.locks.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    digests = "".join(
        f'"{name}" = "{hashlib.sha256(data).hexdigest()}"\n' for name, data in files.items()
    )
    (layout.locks / "model-smollm2.toml").write_text(
        f'name = "m"\nrequirement = "m==1"\nwheel_sha256 = "00"\n[files]\n{digests}'
    )
    layout.model.mkdir(parents=True)
    for name, data in files.items():
        (layout.model / name).write_bytes(data)
    return layout


def test_a_model_in_the_cache_is_used_as_it_is(with_model: Layout) -> None:
    recorder = Recorder()
    ensure_model(with_model, recorder)
    assert recorder.lines == [f"model: up to date ({with_model.model})"]


def test_a_changed_file_of_the_model_is_refused_by_name(with_model: Layout) -> None:
    (with_model.model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(SetupError, match=r"model\.safetensors: sha256 .*the lock says .*: remove "):
        ensure_model(with_model, Recorder())


def test_a_file_too_few_or_too_many_is_refused_by_name(with_model: Layout) -> None:
    (with_model.model / "config.json").rename(with_model.model / "added.py")
    with pytest.raises(SetupError, match=r"added\.py: not in the lock"):
        ensure_model(with_model, Recorder())
    (with_model.model / "added.py").unlink()
    with pytest.raises(SetupError, match=r"config\.json: missing, but in the lock"):
        ensure_model(with_model, Recorder())


def test_the_model_is_made_by_the_engine_or_not_at_all(with_model: Layout) -> None:
    (with_model.locks / "model-smollm2.toml").write_text(
        'name = "m"\nrequirement = "m==1"\nwheel_sha256 = "00"\n[files]\n"other" = "00"\n'
    )
    with pytest.raises(SetupError, match="run setup without --only model first"):
        ensure_model(with_model, Recorder())


def test_another_conversion_of_the_model_lies_elsewhere() -> None:
    one = ModelLock("m", "m==1", "00", {"a": "1", "b": "2"})
    assert one.digest == ModelLock("m", "m==1", "00", {"b": "2", "a": "1"}).digest
    assert one.digest != ModelLock("m", "m==1", "00", {"a": "2", "b": "1"}).digest


def test_the_cache_is_where_the_xdg_base_directories_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Layout.of(ROOT).cache == Path("/somewhere/dcv")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/x")
    assert Layout.of(ROOT).cache == Path("/home/x/.cache/dcv")


# --- the first step ------------------------------------------------------------------------------


def test_the_first_step_is_written_for_python_3_8() -> None:
    ast.parse(SETUP.read_text(), feature_version=(3, 8))


def test_without_a_python_3_11_it_says_what_to_install(tmp_path: Path) -> None:
    # Any interpreter will do here: this makes it take itself for another one.
    code = (
        f"import sys; sys.path.insert(0, {str(SETUP.parent)!r}); import setup;"
        " setup.WANTED = (3, 0); sys.exit(setup.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("setup: needs CPython 3.11 with venv and found none: install ")
    assert done.stderr.count("\n") == 1

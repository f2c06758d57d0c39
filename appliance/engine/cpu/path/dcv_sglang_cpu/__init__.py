"""SGLang plugin: deterministic mode on a CPU.

SGLang 0.5.23 has ``--enable-deterministic-inference`` for accelerators only, and it matters
without one as well: it is the switch that makes ``seed`` count, which is otherwise dropped in
silence. On a CPU two things stand in its way, and each is supplied here:

1. ``torch_native``, the attention that a CPU has, is not among the backends that deterministic
   mode admits. It is as deterministic as they are: it computes each sequence by itself.
2. Deterministic mode replaces matrix products by Triton kernels whose result for one request
   does not depend on which others share its batch. Triton has no CPU back end, so
   ``dcv_sglang_cpu.batch_invariant`` does it in torch.

SGLang finds the plugin by its entry point (group ``sglang.srt.plugins``) in the directory
beside this one, and calls `register` in each of its processes.
"""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Allow deterministic mode, if this process computes on a CPU. Else change nothing at all.

    SGLang logs what a plugin raises and goes on without it. That is safe here: without step 2
    it refuses ``torch_native`` in deterministic mode, and does not start.
    """
    if not computes_on_cpu():
        return
    # Imported late, because on a GPU not even these imports should happen on our account.
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from dcv_sglang_cpu import batch_invariant

    # 1. Before the choice is open: it must never be open without this.
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode",
        batch_invariant.enable,
        HookType.REPLACE,
    )
    # 2.
    add_deterministic_attention_backend_choices(["torch_native"])


def computes_on_cpu() -> bool:
    """SGLang was told to use the CPU, and torch sees nothing else that it could use.

    Both, because the first is only an environment variable (SGLANG_USE_CPU_ENGINE=1).
    """
    import torch
    from sglang.srt.utils.common import is_cpu

    return is_cpu() and not torch.accelerator.is_available()

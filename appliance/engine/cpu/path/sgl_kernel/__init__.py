"""What SGLang needs of ``sgl_kernel`` to serve from a CPU, where no build of it exists.

The package index has CUDA builds only. With SGLANG_USE_CPU_ENGINE=1, SGLang 0.5.23 imports eight
functions from here at module level and calls one operation:

- The functions move KV-cache entries and drive speculative decoding. Plain serving never calls
  them, so here each raises NotImplementedError with its own name.
- ``torch.ops.sgl_kernel.murmur_hash32_cpu`` turns a request's seed into noise for sampling. It
  is real: without it, ``seed`` fails for every temperature above zero.

Any other name is absent, as it would be from a smaller build, so that SGLang's own fall-backs
see it so. In particular torch.ops.sgl_kernel has no ``convert_weight_packed``: that is how
SGLang finds that the AMX kernels are not there, on a processor that has AMX too.
"""

from collections.abc import Callable
from typing import NoReturn

import torch

# What is imported, and by which file of sglang/.
_IMPORTED_BUT_ABSENT = {
    "assign_draft_cache_locs_contiguous_cpu": "kernels/ops/speculative/cache_locs.py",
    "assign_extend_cache_locs_cpu": "kernels/ops/speculative/cache_locs.py",
    "assign_req_to_token_pool_cpu": "srt/mem_cache/allocation.py",
    "build_tree_kernel_efficient_cpu": "kernels/ops/speculative/spec_tree.py",
    "copy_all_layer_kv_cache_cpu": "kernels/ops/kvcache/cache_move.py",
    "fill_accept_out_cache_loc_cpu": "kernels/ops/speculative/eagle.py",
    "fill_bonus_tokens_cpu": "kernels/ops/speculative/eagle.py",
    "verify_tree_greedy_cpu": "kernels/ops/speculative/spec_tree.py",
}

_UINT32 = 0xFFFFFFFF


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name not in _IMPORTED_BUT_ABSENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _absent(name)


def _absent(name: str) -> Callable[..., NoReturn]:
    def operation(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} (for sglang/{_IMPORTED_BUT_ABSENT[name]}) does not exist on a "
            "CPU: serve without speculative decoding, or on a GPU"
        )

    operation.__name__ = operation.__qualname__ = name
    return operation


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit, hash seed 0) of (seed, position, column), for every pair of them.

    The same function as SGLang's Triton kernel, kernels/ops/sampling/murmur_hash.py, so that a
    seed means the same on a CPU as on a GPU. The hashed message is 16 bytes: the seed as two
    little-endian words, low word first, then the position, then the column.

    Args:
        seed: (n,) uint64, or int64 with the same bits.
        positions: (n,) integers, each the index of the token to be drawn; taken modulo 2**32.
        columns: (m,) integers, token ids; taken modulo 2**32.

    Returns:
        (n, m) uint32.
    """
    # torch has no arithmetic on unsigned integers: int64 holds every 32-bit intermediate, and
    # every product of two, modulo 2**64, keeps the low 32 bits exact.
    words = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = torch.zeros_like(words)
    for block in (words & _UINT32, (words >> 32) & _UINT32, positions.to(torch.int64) & _UINT32):
        state = _mix(state, block)
    state = _mix(state[:, None], columns.to(torch.int64)[None, :] & _UINT32)
    return _finish(state, length=16).to(torch.uint32)


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (block * 0xCC9E2D51) & _UINT32
    block = (_rotate_left(block, 15) * 0x1B873593) & _UINT32
    return (_rotate_left(state ^ block, 13) * 5 + 0xE6546B64) & _UINT32


def _rotate_left(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _UINT32


def _finish(state: torch.Tensor, *, length: int) -> torch.Tensor:
    state = state ^ length
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _UINT32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _UINT32
    return state ^ (state >> 16)


# Kept at module level: a Library takes its operations with it when it is collected.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")

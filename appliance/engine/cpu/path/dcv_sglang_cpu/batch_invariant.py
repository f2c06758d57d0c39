"""Matrix products whose rows do not depend on how many other rows are computed with them.

A BLAS picks its kernel by the shape of the whole product. A request that is alone in the batch
is multiplied by another kernel than one of five, sums in another order, and differs in the last
bits; at the next near-tie between two tokens its text differs too. Measured with torch 2.13.0
on two cores, float32: the rows of a product of 1, 2, 3, 5, 6, 7, 9, 10 or 11 rows differ from
the same rows in a larger one. In bfloat16 the same happens for some shapes.

Here every product is made of products of exactly `ROWS` rows, the last one filled up with
zeros. The shape, hence the kernel, is then always the same, and in one kernel a row's result
depends neither on its place in the block nor on its neighbours (tests/engine checks both).

This is about one machine: another processor, or another number of threads, may round otherwise.
Attention needs nothing: torch_native computes it sequence by sequence. Nor do normalisation,
activation and softmax, which torch computes row by row.
"""

import torch

# Eight rows cost 1.3 (bfloat16) to 2 (float32) times what one row does, since reading the
# weights is most of it, and serve eight requests at once. Fewer would slow prompts down, whose
# tokens all pass through here; more would slow down a request that is alone.
ROWS = 8

# Kept at module level: a Library takes its registrations with it when it is collected.
_library: torch.library.Library | None = None


def enable(enable_bmm: bool = True) -> None:
    """Route CPU matrix products through this module, for the rest of the process.

    Takes the place of SGLang's enable_batch_invariant_mode and has its signature. `enable_bmm`
    changes nothing: no text model that runs on a CPU has a batched product outside attention.
    """
    del enable_bmm
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    # linear() and matmul() of two-dimensional operands end in one of these two.
    _library.impl("aten::mm", mm, "CPU")
    _library.impl("aten::addmm", addmm, "CPU")


def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of (m, k) and (k, n), in blocks of `ROWS` rows."""
    result = left.new_empty((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[0], ROWS):
        block = left[start : start + ROWS]
        # With `out` torch takes aten::mm.out, which nobody has overridden. An `out` that is a
        # view of `result` saves a copy, but only a full block can have one.
        if block.shape[0] == ROWS:
            torch.mm(block, right, out=result[start : start + ROWS])
        else:
            result[start:] = torch.mm(_fill_up(block), right, out=result.new_empty(0))[
                : block.shape[0]
            ]
    return result


def addmm(
    bias: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """``beta * bias + alpha * left @ right``, the product in blocks of `ROWS` rows."""
    product = mm(left, right)
    if alpha != 1:
        product = product.mul_(alpha)
    return product.add_(bias, alpha=beta) if beta != 0 else product


def _fill_up(block: torch.Tensor) -> torch.Tensor:
    filled = block.new_zeros((ROWS, block.shape[1]))
    filled[: block.shape[0]] = block
    return filled

"""The operator `ders::mix` (mix_op.py) on a GPU: its lists of tensors, handed to the kernels."""

from torch import Tensor

from ders.kernels.triton.low_rank import mix_low_rank, mix_low_rank_backward
from ders.kernels.triton.sparse_mix import mix_sparse, mix_sparse_backward


def mix(
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """As the operator; `slots` runs in torch operations there."""
    count = len(pre)
    if kind == "low_rank":
        z, b, a_out = delta[:count], delta[count:-1], delta[-1]
        return mix_low_rank(pre, z, index, gates, b, a_out, biases, activation, gated)
    values, columns, starts = _sparse(delta, count)
    return mix_sparse(delta[0], pre, index, gates, values, columns, starts, biases, activation, gated)


def mix_backward(
    grad_mixed: Tensor,
    grad_written: Tensor,
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> list[Tensor]:
    """Gradients of `pre`, the gates, the floats of `delta` and the biases, in this order."""
    count = len(pre)
    if kind == "low_rank":
        z, b, a_out = delta[:count], delta[count:-1], delta[-1]
        d_pre, d_z, d_gates, d_b, d_a_out, d_biases = mix_low_rank_backward(
            grad_mixed, grad_written, pre, z, index, gates, b, a_out, biases, activation, gated
        )
        return [*d_pre, d_gates, *d_z, *d_b, d_a_out, *d_biases]
    values, columns, starts = _sparse(delta, count)
    d_x, d_pre, d_gates, d_values, d_biases = mix_sparse_backward(
        grad_mixed, grad_written, delta[0], pre, index, gates, values, columns, starts, biases, activation, gated
    )
    return [*d_pre, d_gates, d_x, *d_values, *d_biases]


def _sparse(delta: list[Tensor], count: int) -> list[list[Tensor]]:
    """Values, columns and row starts of all projections."""
    return [delta[1 + i * (count + 1) : 1 + (i + 1) * (count + 1)] for i in range(3)]

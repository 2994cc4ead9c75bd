"""A layer whose experts differ from the base in a few whole neurons: the dense FFN, and these neurons beside it.

With J_e the neurons of expert e, g_e its gate (0 where a token did not choose it) and h the base's activations,

    Σ_e g_e FFN_e(x) = W_out (Σ_e g_e h + Σ_e g_e Σ_{j ∈ J_e} (h_e,j − h_j) 1_j) + Σ_e g_e Σ_{j ∈ J_e} Δ_out,e,j h_e,j

so activations are computed once per token, as in the dense FFN, and besides for E·N neurons.

T tokens, E experts, N neurons of an expert, J = E·N, F hidden width, C columns of an input projection's result (F, or
2F where gate and up are one projection, gate first), I/O features read and written.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.forms import Neurons
from ders.kernels.mix_op import run_mix
from ders.kernels.native.library import usable


def block_columns(neurons_N: Tensor, blocks: int, width: int) -> Tensor:
    """Where neurons (…, N) stand in a side that holds all `width` of them so many times: (…, blocks·N)."""
    return torch.cat([neurons_N + block * width for block in range(blocks)], dim=-1)


def mix_neurons_oracle(
    x_TI: Tensor,
    pre: Sequence[Tensor],
    gates_TE: Tensor,
    deltas: Sequence[Tensor],
    hidden: Callable[[list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Every expert for every token, each delta a matrix of (E, O, I)."""
    mixed, written = [], []
    for e, g_T in enumerate(gates_TE.T):
        h_TF = hidden([p + x_TI @ delta[e].T for p, delta in zip(pre, deltas, strict=False)])
        mixed.append(g_T[:, None] * h_TF)
        written.append(g_T[:, None] * (h_TF @ deltas[-1][e].T))
    return torch.stack(mixed).sum(0), torch.stack(written).sum(0)


def mix_neurons(
    x_TI: Tensor,
    pre: Sequence[Tensor],
    gates_TE: Tensor,
    forms: Sequence[Neurons],
    hidden: Callable[[list[Tensor]], Tensor],
    activation: str | None = None,
    gated: bool = True,
) -> tuple[Tensor, Tensor]:
    """(T, I), input projections' (T, C), (T, E) → mixed activations (T, F) and the deltas' output (T, O).

    Args:
        forms: of the input projections' deltas, then of the output projection's; all with the same neurons.
        hidden: the activations from the input projections' results.
        activation: its function by name, where it has one; then the base's activations take one pass.
        gated: whether the first half, or projection, gates the other.
    """
    neurons_EN = forms[-1].neurons_EN
    chosen_J, count = neurons_EN.flatten(), neurons_EN.shape[1]
    base, own = [], []
    for pre_TC, form in zip(pre, forms, strict=False):
        x, values_EMI = cast_for_matmul(x_TI, form.values_EMX)
        blocks = values_EMI.shape[1] // count
        # All experts' neurons of the first block, then of the second, as the result has them.
        values = values_EMI.unflatten(1, (blocks, count)).transpose(0, 1).flatten(0, 2)
        base.append(pre_TC.index_select(1, block_columns(chosen_J, blocks, pre_TC.shape[1] // blocks)))
        own.append(base[-1] + F.linear(x, values))
    gates_TE = gates_TE.to(pre[0].dtype)
    gates_TJ = gates_TE.repeat_interleave(count, dim=1)
    own_TJ = gates_TJ * hidden(own)
    mixed_TF = _scaled(pre, gates_TE.sum(1, keepdim=True), hidden, activation, gated)
    mixed_TF = mixed_TF.index_add_(1, chosen_J, own_TJ - gates_TJ * hidden(base))
    own_TJ, values_ENO = cast_for_matmul(own_TJ, forms[-1].values_EMX)
    return mixed_TF, own_TJ @ values_ENO.flatten(0, 1)


def _scaled(
    pre: Sequence[Tensor],
    gates_T1: Tensor,
    hidden: Callable[[list[Tensor]], Tensor],
    activation: str | None,
    gated: bool,
) -> Tensor:
    """Σ_e g_e h (T, F)."""
    if activation is None or not usable(pre[0].device.type, pre[0].dtype):
        return gates_T1 * hidden([*pre])
    # The pass that mixes experts over low-rank deltas, with one expert of rank zero.
    tokens, width = len(gates_T1), pre[0].shape[1] // (2 if gated and len(pre) == 1 else 1)
    nothing = [
        *(p.new_zeros(tokens, 0) for p in pre),
        *(p.new_zeros(1, p.shape[1], 0) for p in pre),
        pre[0].new_zeros(1, 0, width),
    ]
    index_T1 = torch.zeros(tokens, 1, dtype=torch.int64, device=gates_T1.device)
    wide = gates_T1.to(torch.promote_types(gates_T1.dtype, torch.float32))
    return run_mix([*pre], index_T1, wide, nothing, [], "low_rank", activation, gated)[0]

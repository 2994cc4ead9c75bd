"""What lies between the two products with the shared base, in one pass: thin deltas, activation, gates.

With expert e of a token, its gate g and the base's results p_j = W_j x (one or two input projections),

    a_j = p_j + Δ_j,e x + bias_j,e      h = act(a_0) · a_1 (gated) or act(a_0)
    mixed = Σ g h                       delta output = Σ g Δ_out,e h

so the layer's output is W_out mixed + the delta output. Only the inputs are kept: the backward pass recomputes the
activations, so a layer keeps less than the dense FFN does.

T tokens, K top-k, E experts, I/O features read and written, F hidden width, C columns of an input projection's result
(F, or 2F where gate and up are one projection, gate first), R rank, N kept entries, P rows + 1.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ders.kernels.autocast import cast_for_matmul
from ders.kernels.forms import Form, LowRank, Sparse, entry_rows
from ders.kernels.gpu import triton_available
from ders.kernels.mix_op import run_mix
from ders.kernels.native import library

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def mix_experts_oracle(
    x_TI: Tensor,
    pre: Sequence[Tensor],
    index_TK: Tensor,
    gates_TK: Tensor,
    deltas: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Token by token and choice by choice, each delta a matrix of (E, O, I): (T, F) and (T, O)."""
    mixed, written = [], []
    for t, x_I in enumerate(x_TI):
        mixed_F, written_O = pre[0].new_zeros(deltas[-1].shape[2]), pre[0].new_zeros(deltas[-1].shape[1])
        for e, gate in zip(index_TK[t].tolist(), gates_TK[t], strict=True):
            parts = [p[t] + delta[e] @ x_I for p, delta in zip(pre, deltas, strict=False)]
            if biases:
                parts = [part + bias[e] for part, bias in zip(parts, biases, strict=True)]
            if gated and len(parts) == 1:
                parts = list(parts[0].chunk(2))
            h_F = _FUNCTIONS[activation](parts[0]) * (parts[1] if gated else 1)
            mixed_F, written_O = mixed_F + gate * h_F, written_O + gate * (deltas[-1][e] @ h_F)
        mixed.append(mixed_F)
        written.append(written_O)
    return torch.stack(mixed), torch.stack(written)


def name_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of ACTIVATIONS a function is, by what it does; None: none of them."""
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    x = torch.linspace(-5, 5, 41, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y = function(x)
        return next(
            (name for name, known in _FUNCTIONS.items() if torch.allclose(y, known(x), rtol=0, atol=1e-12)), None
        )


def can_mix(device: str, dtype: torch.dtype, forms: Sequence[Form | None], activation: str | None) -> bool:
    """Whether `mix_experts` takes these: forms of one kind, a known activation, a device type with kernels."""
    low_rank = all(isinstance(form, LowRank) for form in forms)
    if activation is None or not (low_rank or all(isinstance(form, Sparse) for form in forms)):
        return False
    if device == "cuda":
        empty = any(isinstance(form, LowRank) and form.a_ERI.shape[1] == 0 for form in forms)
        return triton_available() and dtype != torch.float64 and not empty
    return library.usable(device, dtype)


def mix_experts(
    x_TI: Tensor,
    pre: Sequence[Tensor],
    index_TK: Tensor,
    gates_TK: Tensor,
    forms: Sequence[Form],
    biases: Sequence[Tensor],
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """(T, I), input projections' (T, C), (T, K), (T, K) → mixed activations (T, F) and the deltas' output (T, O).

    Differentiable in everything but the indices.

    Args:
        forms: of the input projections' deltas, then of the output projection's; all of one kind (`can_mix`).
        biases: (E, C) per input projection; empty where there are none.
        activation: one of ACTIVATIONS.
    """
    dtype = pre[0].dtype
    gates_TK = gates_TK.to(torch.promote_types(dtype, torch.float32))
    biases = [bias.to(dtype) for bias in biases]
    if isinstance(forms[0], LowRank):
        a = [form.a_ERI for form in forms if isinstance(form, LowRank)]
        b = [form.b_EOR for form in forms if isinstance(form, LowRank)]
        z = [F.linear(*cast_for_matmul(x_TI, a_ERI.flatten(0, 1))).to(dtype) for a_ERI in a[:-1]]
        delta = [*z, *(b_EOR.to(dtype) for b_EOR in b[:-1]), a[-1].to(dtype)]
        mixed_TF, z_out = run_mix([*pre], index_TK, gates_TK, delta, biases, "low_rank", activation, gated)
        return mixed_TF, F.linear(*cast_for_matmul(z_out, b[-1].transpose(0, 1).flatten(1)))
    sparse = [form for form in forms if isinstance(form, Sparse)]
    values = [form.values_EN.to(dtype) for form in sparse]
    indices = [*(f.columns_EN for f in sparse), *(f.row_starts_EP for f in sparse), *(_rows(f) for f in sparse)]
    mixed_TF, y_TO = run_mix(
        [*pre], index_TK, gates_TK, [x_TI.to(dtype), *values, *indices], biases, "sparse", activation, gated
    )
    return mixed_TF, y_TO


def _rows(form: Sparse) -> Tensor:
    return entry_rows(form.columns_EN, form.row_starts_EP) if form.rows_EN is None else form.rows_EN


def can_mix_slots(device: str, dtype: torch.dtype, activation: str | None) -> bool:
    """Whether `mix_slots` runs here."""
    return activation is not None and library.usable(device, dtype)


def mix_slots(
    pre: Sequence[Tensor],
    slots: Sequence[Tensor],
    index_TK: Tensor,
    gates_TK: Tensor,
    biases: Sequence[Tensor],
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The same around deltas of any kind: takes Δ_j,e x of each slot (T·K, C), gives g h (T·K, F) for Δ_out to read."""
    dtype = pre[0].dtype
    gates_TK = gates_TK.to(torch.promote_types(dtype, torch.float32))
    delta, biases = [slot.to(dtype) for slot in slots], [bias.to(dtype) for bias in biases]
    return run_mix([*pre], index_TK, gates_TK, delta, biases, "slots", activation, gated)

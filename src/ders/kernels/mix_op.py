"""`ders::mix`, the operator behind mix.py: known to autograd and torch.compile, run by mix.cpp or by Triton.

Its tensors come as lists, for projections and kinds of delta differ in how many there are. What `delta` holds, by kind:

- low_rank: z = A x (T, E·R) and B (E, C, R) of each input projection, then A (E, R, F) of the output's; the second
  result is Σ g A_out,e h (T, E·R), which the output's B is applied to;
- sparse: x (T, I), then values, columns, row starts and rows of all projections; the second result is (T, O);
- slots: Δ x (T·K, C) of each input projection; the second result is g h (T·K, F).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ders.kernels.native import library

# In the order in which mix.cpp numbers them.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class _Kind(ABC):
    """How a kind's tensors lie in `delta`, for a layer of `count` input projections."""

    @staticmethod
    @abstractmethod
    def written(delta: list[Tensor], count: int, index: Tensor, hidden: int) -> tuple[int, int]:
        """Shape of the second result."""

    @staticmethod
    @abstractmethod
    def native(delta: list[Tensor], count: int) -> list[Any]:
        """Its own arguments of mix.cpp."""

    @staticmethod
    @abstractmethod
    def per_token(count: int) -> int:
        """How many of its floating-point tensors have a row a token; gradients of the others are sums over tokens."""


class _LowRank(_Kind):
    @staticmethod
    def written(delta: list[Tensor], count: int, index: Tensor, hidden: int) -> tuple[int, int]:
        return len(index), delta[0].shape[1]

    @staticmethod
    def native(delta: list[Tensor], count: int) -> list[Any]:
        return [delta[:count], delta[count:-1], delta[-1], delta[-1].shape[1]]

    @staticmethod
    def per_token(count: int) -> int:
        return count


class _Sparse(_Kind):
    @staticmethod
    def written(delta: list[Tensor], count: int, index: Tensor, hidden: int) -> tuple[int, int]:
        return len(index), delta[3 * (count + 1)].shape[1] - 1

    @staticmethod
    def native(delta: list[Tensor], count: int) -> list[Any]:
        x, per = delta[0], count + 1
        values, columns, starts, rows = (delta[1 + i * per : 1 + (i + 1) * per] for i in range(4))
        kept = tuple(v.shape[1] for v in values)
        return [x, values, columns, starts, rows, kept, x.shape[1], starts[-1].shape[1] - 1]

    @staticmethod
    def per_token(count: int) -> int:
        return 1


class _Slots(_Kind):
    @staticmethod
    def written(delta: list[Tensor], count: int, index: Tensor, hidden: int) -> tuple[int, int]:
        return index.numel(), hidden

    @staticmethod
    def native(delta: list[Tensor], count: int) -> list[Any]:
        return [delta]

    @staticmethod
    def per_token(count: int) -> int:
        return count


_KINDS: dict[str, type[_Kind]] = {"low_rank": _LowRank, "sparse": _Sparse, "slots": _Slots}


def _mix(
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    pre, delta, biases, index, gates = *map(_contiguous, (pre, delta, biases)), index.contiguous(), gates.contiguous()
    if pre[0].is_cuda:
        from ders.kernels.triton.operator import mix as on_gpu

        return on_gpu(pre, index, gates, delta, biases, kind, activation, gated)
    results = _results(pre, index, delta, kind, gated)
    arguments = _native(pre, index, gates, delta, biases, kind, activation, gated)
    library.call(f"mix_{kind}", pre[0].dtype, *arguments, *results)
    return results


_mix_op = torch.library.custom_op("ders::mix", _mix, mutates_args=())


@torch.library.custom_op("ders::mix_backward", mutates_args=())
def _mix_backward(
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
    pre, delta, biases, index, gates = *map(_contiguous, (pre, delta, biases)), index.contiguous(), gates.contiguous()
    grads = grad_mixed.contiguous(), grad_written.contiguous()
    if pre[0].is_cuda:
        from ders.kernels.triton.operator import mix_backward as on_gpu

        return on_gpu(*grads, pre, index, gates, delta, biases, kind, activation, gated)
    floats = [t for t in delta if t.is_floating_point()]
    per_token = _KINDS[kind].per_token(len(pre))
    # Sums over tokens are kept in the wider type.
    d_token = [torch.empty_like(t) for t in floats[:per_token]]
    d_sums, d_biases = (
        [torch.zeros_like(t, dtype=gates.dtype) for t in tensors] for tensors in (floats[per_token:], biases)
    )
    d_pre, d_gates = [torch.empty_like(p) for p in pre], torch.empty_like(gates)
    own: dict[str, list[Any]] = {
        "low_rank": [d_token, d_gates, d_sums[:-1], *d_sums[-1:]],
        "sparse": [*d_token, d_gates, d_sums],
        "slots": [d_token, d_gates],
    }
    arguments = _native(pre, index, gates, delta, biases, kind, activation, gated)
    library.call(f"mix_{kind}_backward", pre[0].dtype, *arguments, *grads, d_pre, *own[kind], d_biases)
    return [*d_pre, d_gates, *d_token, *(d.to(pre[0].dtype) for d in (*d_sums, *d_biases))]


def run_mix(
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The operator: mixed activations (T, F), and what the kind gives beside them."""
    # Finding an operator costs as much as running it for one token: who only generates calls the function itself.
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(pre[0]) is Tensor
    function = _mix if plain else _mix_op
    result: tuple[Tensor, Tensor] = function(pre, index, gates, delta, biases, kind, activation, gated)
    return result


def _native(
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> list[Any]:
    """The arguments as mix.cpp takes them."""
    experts = delta[-1].shape[0] if kind != "slots" else len(biases[0]) if biases else 0
    named = ACTIVATIONS.index(activation)
    sizes = (len(index), index.shape[1], experts, _hidden(pre, gated), len(pre), gated, named, bool(biases))
    return [sizes, pre, index, gates, biases, *_KINDS[kind].native(delta, len(pre))]


def _hidden(pre: list[Tensor], gated: bool) -> int:
    return pre[0].shape[1] // (2 if gated and len(pre) == 1 else 1)


def _results(pre: list[Tensor], index: Tensor, delta: list[Tensor], kind: str, gated: bool) -> tuple[Tensor, Tensor]:
    hidden = _hidden(pre, gated)
    shape = _KINDS[kind].written(delta, len(pre), index, hidden)
    return pre[0].new_empty(pre[0].shape[0], hidden), pre[0].new_empty(shape)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


@_mix_op.register_fake
def _(
    pre: list[Tensor],
    index: Tensor,
    gates: Tensor,
    delta: list[Tensor],
    biases: list[Tensor],
    kind: str,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    return _results(pre, index, delta, kind, gated)


@_mix_backward.register_fake
def _(
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
    return [torch.empty_like(t) for t in (*pre, gates, *(t for t in delta if t.is_floating_point()), *biases)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pre, index, gates, delta, biases, *ctx.dials = inputs
    ctx.counts = [len(pre), len(delta)]
    ctx.save_for_backward(index, gates, *pre, *delta, *biases)


def _differentiate(ctx: Any, grad_mixed: Tensor, grad_written: Tensor) -> tuple[Any, ...]:
    index, gates, *rest = ctx.saved_tensors
    num_pre, num_delta = ctx.counts
    pre, delta, biases = rest[:num_pre], rest[num_pre : num_pre + num_delta], rest[num_pre + num_delta :]
    found = iter(_mix_backward(grad_mixed, grad_written, pre, index, gates, delta, biases, *ctx.dials))
    d_pre, d_gates = [next(found) for _ in pre], next(found)
    d_delta = [next(found) if t.is_floating_point() else None for t in delta]
    return d_pre, None, d_gates, d_delta, list(found), None, None, None


_mix_op.register_autograd(_differentiate, setup_context=_keep)

"""The same cases on a GPU and in Triton's interpreter.

The interpreter is chosen when Triton is first imported, for the whole process, so `test_interpreter.py` runs the
interpreted cases in a process of its own; in any other process they are skipped.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("run by test_interpreter.py, in a process of its own")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    return str(request.param)


# Half of a unit in the last place is 4e-3 of a value in bf16, 5e-4 in fp16; a few such errors meet in a result.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bf16 tiles")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def kernels(device: str) -> Any:
    pytest.importorskip("triton")
    from ders.kernels import triton

    return triton


@pytest.fixture
def agree() -> Callable[[Sequence[Tensor], Sequence[Tensor], torch.dtype], None]:
    """Results against float64: errors relative to the largest value of each."""

    def check(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.shape == b.shape, f"result {number}"
            assert a.isfinite().all(), f"result {number}"
            scale = b.abs().max().clamp(min=1e-30)
            error = ((a.double() - b.to(a.device)) / scale.to(a.device)).abs().max()
            assert error < TOLERANCES[dtype], f"result {number} is off by {error:.1e}"

    return check


@pytest.fixture
def make_entries(device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Values (E, N), columns and row starts of random sparse matrices."""

    def make(experts: int, rows: int, columns: int, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        positions_EN = torch.rand(experts, rows * columns).argsort(1)[:, :kept].sort(1).values
        bounds_EP = (torch.arange(rows + 1) * columns).expand(experts, -1).contiguous()
        starts_EP = torch.searchsorted(positions_EN, bounds_EP)
        values_EN = torch.randn(experts, kept).to(dtype)
        return values_EN.to(device), (positions_EN % columns).int().to(device), starts_EP.int().to(device)

    return make


@pytest.fixture
def build() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Compressed rows as matrices (E, rows, columns), differentiable in the values."""

    def dense(values_EN: Tensor, columns_EN: Tensor, row_starts_EP: Tensor, columns: int) -> Tensor:
        matrices = []
        for values_N, columns_N, starts_P in zip(values_EN, columns_EN, row_starts_EP, strict=True):
            rows_N = torch.repeat_interleave(torch.arange(len(starts_P) - 1, device=starts_P.device), starts_P.diff())
            empty = values_N.new_zeros(len(starts_P) - 1, columns)
            matrices.append(empty.index_put((rows_N, columns_N.long()), values_N))
        return torch.stack(matrices)

    return dense


@pytest.fixture
def route(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Experts (T, K), the last token's twice the same, and gates, one of them zero."""

    def make(tokens: int, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
        index_TK = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        index_TK[-1] = experts - 1
        gates_TK = torch.rand(tokens, top_k) + 0.1
        gates_TK[0, 0] = 0
        return index_TK.to(device), gates_TK.to(device)

    return make


@pytest.fixture
def mix_oracle() -> Callable[..., tuple[Tensor, Tensor]]:
    """Σ_k g h (T, F) and Σ_k g Δ_out,e h (T, O), from what is added to the base's results (T, K, C) per projection."""
    from torch.nn import functional

    functions = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "identity": lambda x: x,
    }

    def mix(
        pre: list[Tensor], added: list[Tensor], gates: Tensor, out_TKOF: Tensor, activation: str, gated: bool
    ) -> tuple[Tensor, Tensor]:
        parts = [p[:, None] + a for p, a in zip(pre, added, strict=True)]
        if gated and len(parts) == 1:
            parts = list(parts[0].chunk(2, -1))
        h_TKF = functions[activation](parts[0]) * (parts[1] if gated else 1) * gates[:, :, None]
        return h_TKF.sum(1), torch.einsum("tkof,tkf->to", out_TKOF, h_TKF)

    return mix

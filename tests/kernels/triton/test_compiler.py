"""All kernels through Triton's compiler, for an H200, without one: what the interpreter forgives shows here.

What is a compile-time constant, shapes of tiles, types of loops: the interpreter takes any; and no result is computed.
"""

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow  # Triton compiles some of them for ten seconds
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_every_kernel_compiles() -> None:
    pytest.importorskip("triton")
    # In a process of its own: it makes Triton believe in a GPU.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def pretend() -> None:
    """From here on a launch compiles the kernel for compute capability 9.0, and does no more."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Pretended:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Pretended())
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)


def compile_all(tokens: int, dtype: torch.dtype, top_k: int, experts: int, rank: int, inputs: int, bits: int) -> None:
    from ders.kernels import triton as kernels

    features, hidden = 128, 192
    width, biases = hidden * (3 - inputs), [torch.empty(experts, hidden * (3 - inputs), dtype=dtype)] * inputs
    index, gates = torch.zeros(tokens, top_k, dtype=torch.int64), torch.empty(tokens, top_k)
    x, pre = torch.empty(tokens, features, dtype=dtype), [torch.empty(tokens, width, dtype=dtype)] * inputs

    z, b = [x.new_empty(tokens, experts * rank)] * inputs, [x.new_empty(experts, width, rank)] * inputs
    low_rank = (pre, z, index, gates, b, x.new_empty(experts, rank, hidden), biases, "silu", True)
    kernels.mix_low_rank_backward(*kernels.mix_low_rank(*low_rank), *low_rank)

    shapes = [(width, features)] * inputs + [(features, hidden)]
    values = [x.new_empty(experts, rows * columns // 50) for rows, columns in shapes]
    columns = [torch.zeros(v.shape, dtype=torch.int32) for v in values]
    row_starts = [torch.zeros(experts, rows + 1, dtype=torch.int32) for rows, _ in shapes]
    sparse = (x, pre, index, gates, values, columns, row_starts, biases, "gelu", True)
    kernels.mix_sparse_backward(*kernels.mix_sparse(*sparse), *sparse)

    entries = values[0], columns[0], row_starts[0]
    codes = torch.zeros(experts, width, features * bits // 8, dtype=torch.uint8)
    expert, counts, weight = (
        torch.zeros(tokens, dtype=torch.int64),
        index.new_zeros(experts),
        x.new_empty(width, features),
    )
    kernels.sparse_matvec(x, expert, *entries)
    grad = kernels.synthesized_sparse(x, counts, weight, *entries)
    kernels.synthesized_sparse_backward(grad, x, counts, weight, *entries)
    for groups in (1, width, width * 2):
        grids = torch.empty(experts, groups)
        kernels.quantized_matvec(x, expert, codes, bits, grids, grids)
        kernels.synthesized_quantized(x, counts, weight, codes, bits, grids, grids)
        kernels.synthesized_quantized_backward(grad, counts, weight, codes, bits, grids, grids)


if __name__ == "__main__":
    pretend()
    for tokens, dtype in ((1, torch.bfloat16), (700, torch.bfloat16), (33, torch.float32)):
        compile_all(tokens, dtype, top_k=2, experts=4, rank=4, inputs=2, bits=2)
    compile_all(20, torch.float16, top_k=3, experts=6, rank=40, inputs=1, bits=4)
    compile_all(1, torch.bfloat16, top_k=1, experts=1, rank=1, inputs=1, bits=1)

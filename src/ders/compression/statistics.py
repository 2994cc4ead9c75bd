"""What one projection's experts say of their base: cosines, sizes and shapes of deltas, spectra, rounding errors.

E experts, F = E + 1 (the base first), O/I out/in features, N sampled entries, R rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ders.kernels import dequantize, quantize, row_blocks

# What is measured on samples: so many entries, so many rows.
_ENTRIES, _ROWS = 1 << 18, 256
# A sketch finds this many leading directions, and draws some more to find them well.
SKETCH_RANK, _OVERSAMPLING = 64, 16
SPARSITIES = (0.5, 0.9, 0.99)
BITS = (8, 4, 2, 1)


def power_sums(base_OI: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products (F, F) of {base, deltas}, flattened, and Σδ, Σδ², Σδ³, Σδ⁴ (E, 4) of each delta, in fp64.

    One pass: a block of every matrix is widened to fp32 and summed there; blocks are added in fp64. Differences are
    taken before products, so that what bf16 experts have in common with their base does not drown the rest.
    """
    wide = torch.promote_types(base_OI.dtype, torch.float32)
    gram_FF = torch.zeros(len(experts) + 1, len(experts) + 1, dtype=torch.float64)
    sums_E4 = torch.zeros(len(experts), 4, dtype=torch.float64)
    largest = next(row_blocks(*base_OI.shape)).stop * base_OI.shape[1]
    buffer_F, squares = torch.empty(len(experts) + 1, largest, dtype=wide), torch.empty(largest, dtype=wide)
    for rows in row_blocks(*base_OI.shape):
        size = (rows.stop - rows.start) * base_OI.shape[1]
        block_F, square = buffer_F[:, :size], squares[:size]
        block_F[0].copy_(base_OI[rows].reshape(-1))
        for delta, weight_OI, sums_4 in zip(block_F[1:], experts, sums_E4, strict=True):
            delta.copy_(weight_OI[rows].reshape(-1)).sub_(block_F[0])
            torch.mul(delta, delta, out=square)
            sums_4 += torch.stack([delta.sum(), square.sum(), delta @ square, square @ square])
        gram_FF += block_F @ block_F.T
    return gram_FF, sums_E4


def cosines(gram_FF: Tensor) -> Tensor:
    """Cosines (F, F) among {base, experts}, from the inner products of {base, deltas}.

    With norms n and 2 n_i n_j (1 − cos) = ‖w_i − w_j‖² − (n_i − n_j)², nothing near 1 is subtracted: 1 − cos is as
    exact as the deltas are. A cosine with a matrix of zeros is 0.
    """
    base, inner_FF = gram_FF[0, 0], gram_FF.clone()
    inner_FF[0] = inner_FF[:, 0] = 0  # the base is its own expert with no delta
    along_F = gram_FF[0].clone()
    along_F[0] = 0
    squares_F = inner_FF.diagonal()
    excess_F = 2 * along_F + squares_F  # of ‖w_i‖² over ‖base‖²
    norms_F = (base + excess_F).clamp(min=0).sqrt()
    apart_FF = squares_F[:, None] + squares_F - 2 * inner_FF
    norms_apart_FF = (excess_F[:, None] - excess_F) / (norms_F[:, None] + norms_F)
    distance_FF = (apart_FF - norms_apart_FF.square()) / (2 * norms_F[:, None] * norms_F)
    # Below this an expert's norm is rounding error of its base's.
    empty_F = norms_F < 1e-6 * base.sqrt()
    distance_FF[empty_F] = 1
    distance_FF[:, empty_F] = 1
    return (1 - distance_FF.clamp(0, 2)).fill_diagonal_(1)


def kurtosis(sums_4: Tensor, size: int) -> float | None:
    """Fourth central moment over the squared variance: 3 for a Gaussian; None for entries that are all alike."""
    mean, second, third, fourth = (sums_4 / size).tolist()
    variance = second - mean**2
    if variance <= 1e-6 * second:
        return None
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return float(central / variance**2)


def deltas(base_OI: Tensor, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each W_e − W_base in fp32, all in the same buffer: use one before asking for the next."""
    buffer_OI = torch.empty(base_OI.shape, dtype=torch.promote_types(base_OI.dtype, torch.float32))
    for weight_OI in experts:
        for rows in row_blocks(*base_OI.shape):
            buffer_OI[rows].copy_(weight_OI[rows]).sub_(base_OI[rows])
        yield buffer_OI


def ranks(shape: tuple[int, ...], limit: int) -> list[int]:
    """1, 2, 4, … as far as `limit` and the matrix go."""
    return [1 << i for i in range(min(*shape, limit).bit_length())]


def captured_energy(delta_OI: Tensor, *, full: bool) -> list[float] | None:
    """Share of ‖Δ‖² in the leading 1, 2, 4, … singular directions; None for a delta of zeros.

    The full spectrum is exact, from the smaller Gram matrix in fp64. The sketch (randomised range finder with one
    power iteration, arXiv 0909.4061) goes to rank 64; it can only miss energy: a flat spectrum's shares come out low.
    """
    total = float(delta_OI.norm()) ** 2
    if total == 0:
        return None
    if full:
        tall = delta_OI if delta_OI.shape[0] >= delta_OI.shape[1] else delta_OI.T
        gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
        for rows in tall.split(tall.shape[1]):
            part = rows.double()
            gram.addmm_(part.T, part)
    else:
        width = min(*delta_OI.shape, SKETCH_RANK + _OVERSAMPLING)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(delta_OI.shape[1], width, generator=generator).to(delta_OI)
        range_OR = torch.linalg.qr(delta_OI @ start).Q
        range_OR = torch.linalg.qr(delta_OI @ torch.linalg.qr(delta_OI.T @ range_OR).Q).Q
        part = (delta_OI.T @ range_OR).double()
        gram = part.T @ part
    energies_R = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).cumsum(0) / total
    wanted = ranks(delta_OI.shape, len(gram) if full else SKETCH_RANK)
    return [min(1.0, float(energies_R[rank - 1])) for rank in wanted]


def reconstruction_errors(delta_OI: Tensor) -> dict[str, float]:
    """‖Δ − Δ̂‖ / ‖Δ‖ of some compressions: 1 is what leaving the delta out would miss. 0 for a delta of zeros.

    `magnitude p` keeps the largest 1 − p of the entries as they are; `uniform k` and `sign 1` round to k bits with one
    grid per row. Large matrices are sampled: 2**18 random entries for the one, 256 evenly spaced rows for the other.
    """
    flat = delta_OI.flatten()
    if flat.numel() > _ENTRIES:
        flat = flat[torch.randint(flat.numel(), (_ENTRIES,), generator=torch.Generator().manual_seed(0))]
    energy_N = flat.square().sort().values.cumsum(0, dtype=torch.float64)
    errors = {}
    for sparsity in SPARSITIES:
        dropped = len(flat) - round((1 - sparsity) * len(flat))
        errors[f"magnitude {sparsity}"] = _root_share(energy_N[dropped - 1], energy_N[-1])
    chosen = torch.linspace(0, len(delta_OI) - 1, min(len(delta_OI), _ROWS)).long()
    rows_OI = delta_OI[chosen]
    total = rows_OI.double().square().sum()
    for scheme, bits in [*(("uniform", bits) for bits in BITS), ("sign", 1)]:
        codes_OB, lows_O, steps_O = quantize(rows_OI, bits, len(rows_OI), scheme, False)
        rounded_OI = dequantize(codes_OB, bits, rows_OI.shape[1], lows_O.to(rows_OI), steps_O.to(rows_OI))
        errors[f"{scheme} {bits}"] = _root_share((rows_OI - rounded_OI).double().square().sum(), total)
    return errors


def _root_share(missed: Tensor, total: Tensor) -> float:
    return float((missed / total).sqrt()) if total > 0 else 0.0

"""From measured numbers to advice: a few rules, resting on what arXiv 2503.01359 found and on arithmetic."""

import statistics
from collections.abc import Iterator

from ders.compression.findings import BaseChoice, LayerFindings, MatrixFindings, Verdict

# Upcycled experts lie above 0.999 (figure 1) and independent ones near 0. At 0.9 a delta is half as long as its base,
# and whatever holds for small deltas is no longer known to hold.
RELATED_COSINE, RELATED_RATIO = 0.9, 0.5
# A cosine of 0.999 with a delta at right angles to its base: the experts of figure 1 were closer.
CLOSE_RATIO = 0.045
# A grid from a row's smallest to its largest entry wastes its levels on outliers. At a Laplace distribution's kurtosis
# (6; a Gaussian has 3) 2 bits per row miss more of a delta than leaving it out does.
HEAVY_TAILS, USELESS = 6.0, 1.0
# At little or no loss in tables S13–S18. One step further, every model lost at 1 bit, and most at 0.99.
BOLD_SPARSITY, BOLD_BITS = 0.9, 2
# At no loss even where the paper's code model had its universal FFN compressed too, and 2 bits broke it (S9, S10).
CAREFUL_SPARSITY, CAREFUL_BITS = 0.4, 4

_SCORE = "Compress, then score the result to be sure"


def judge(layers: list[LayerFindings], base: BaseChoice, delta: str | None, universal: bool) -> Verdict:
    """The verdict on a whole model; `delta` names the class of deltas the file holds, if it does."""
    matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
    pairs = [m.min_expert_cosine for m in matrices] if base.kind == "mean" else [m.min_base_cosine for m in matrices]
    cosine = min(c for c in pairs if c is not None)
    ratio = max(max(m.ratios) for m in matrices)
    known = [k for m in matrices for k in m.kurtoses if k is not None]
    kurtosis = statistics.median(known) if known else None
    upcycled = cosine >= RELATED_COSINE and ratio <= RELATED_RATIO
    far = ratio > CLOSE_RATIO
    error_at_2 = _worst_error(matrices, f"uniform {BOLD_BITS}")
    # Outliers spoil a grid, but not a random choice of entries: they count against few bits only.
    heavy = (kurtosis or 0) > HEAVY_TAILS or (error_at_2 or 0) > USELESS
    sparsity = bits = None
    if upcycled and delta is None:
        sparsity = CAREFUL_SPARSITY if far else BOLD_SPARSITY
        bits = CAREFUL_BITS if far or heavy else BOLD_BITS
    told = Verdict(upcycled, sparsity, bits, cosine, ratio, kurtosis, [])
    told.sentences.extend(_sentences(told, base, delta, universal, far, heavy, error_at_2))
    return told


def _worst_error(matrices: list[MatrixFindings], compression: str) -> float | None:
    return max((max(m.errors[compression]) for m in matrices if m.errors is not None), default=None)


def _sentences(
    told: Verdict,
    base: BaseChoice,
    delta: str | None,
    universal: bool,
    far: bool,
    heavy: bool,
    error_at_2: float | None,
) -> Iterator[str]:
    pair = "expert–expert" if base.kind == "mean" else "FFN–expert"
    source = "one common FFN" if base.kind == "mean" else "this base"
    numbers = (
        f"the smallest {pair} cosine is {told.smallest_cosine:.6g}, and the largest delta is "
        f"{100 * told.largest_ratio:.3g} % of its base"
    )
    yield f"Compared with {base}."
    if not told.upcycled:
        other = "" if base.kind == "mean" else " If they were upcycled from another model, name it: base=DIR."
        yield (
            f"The experts do not look upcycled from {source}: {numbers} (upcycled ones: above {RELATED_COSINE} and at "
            f"most {100 * RELATED_RATIO:.0f} %)."
        )
        yield f"A shared base would explain little of them, and compression would cost quality.{other}"
        return
    yield f"The experts look upcycled from {source}: {numbers}."
    if delta is not None:
        yield (
            f"They are stored as {delta} over a shared base already: nothing is left to compress. To compress them in "
            "another way, export full experts first (layout=vanilla)."
        )
        return
    if told.largest_ratio == 0:
        yield "Every expert still equals the base, bit for bit: any compression is without loss."
        return
    yield f"A sparsity of {told.sparsity} or {told.bits} bits look safe. {_SCORE}."
    if far:
        yield (
            f"Careful, because the largest deltas exceed {100 * CLOSE_RATIO:.2g} % of their base: the experts of the "
            f"paper's figure 1, for which {BOLD_SPARSITY} and {BOLD_BITS} bits cost nothing, were closer."
        )
    if heavy:
        kurtosis = "–" if told.typical_kurtosis is None else f"{told.typical_kurtosis:.3g}"
        missed = "" if error_at_2 is None else f"; {BOLD_BITS} bits per row miss up to {100 * error_at_2:.0f} % of one"
        yield (
            f"Careful with bits: outliers among the deltas stretch a grid (kurtosis typically {kurtosis}, a Gaussian's "
            f"is 3{missed}). A grid per group of columns (granularity=group) suffers less."
        )
    yield "1 bit on a uniform grid and a sparsity of 0.99 lost quality in the paper: expect the same here."
    if universal:
        yield (
            f"Compressing the universal FFN too (extended=true) broke the paper's code model at {BOLD_BITS} bits: use "
            f"{CAREFUL_BITS} bits or a sparsity of {CAREFUL_SPARSITY} there."
        )

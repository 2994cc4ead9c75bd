"""Compression of a model in memory: decompose, replace, synthesise for use."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ders.deltas import Delta
from ders.kernels import row_blocks
from ders.moe import SharedBaseMoE, VanillaMoE, moe_layers
from ders.upcycling import Upcycling, delta_maker, describe_delta, find_decoder

# Where a base explains an expert, their difference is far smaller than the expert.
UNRELATED = 1.0


@dataclass(frozen=True)
class CompressionSummary:
    """What a compression did, in bytes as they lie in a file. `str()` is the one line it reports.

    Attributes:
        upcycling: what the compressed model is.
        expert_bytes: of the experts before, universal FFNs included where they were compressed.
        base_bytes, delta_bytes: of what took their place: shared bases; deltas and biases.
        relative_delta: the largest ‖W_e − W_base‖ / ‖W_base‖ met.
    """

    upcycling: Upcycling
    expert_bytes: int
    base_bytes: int
    delta_bytes: int
    relative_delta: float

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before."""
        return (self.base_bytes + self.delta_bytes) / self.expert_bytes

    def __str__(self) -> str:
        u = self.upcycling
        assert u.delta is not None
        dials = "".join(f" {key} {value}" for key, value in u.delta.items() if key != "name" and value is not None)
        return (
            f"{len(u.layers)} MoE layers of {u.num_experts} experts → {u.delta['name']}{dials}: experts "
            f"{_mb(self.expert_bytes)} → {_mb(self.base_bytes + self.delta_bytes)} ({100 * self.ratio:.1f} %), of "
            f"which shared bases {_mb(self.base_bytes)}; a delta is at most {self.relative_delta:.2g} of its base"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def compressed_form(upcycling: Upcycling, delta: Callable[..., Delta], extended: bool) -> Upcycling:
    """How a compressed model is described, given how the vanilla one is.

    Raises:
        ValueError: its experts are not full copies, or `extended` where no FFN is universal.
    """
    if upcycling.delta is not None:
        raise ValueError(
            f"the experts are {upcycling.delta['name']} over a shared base already: compression takes full experts "
            "(method=vanilla, or a folder exported with layout=vanilla)"
        )
    return dataclasses.replace(upcycling, delta=describe_delta(delta), extended=extended)


def compress(
    model: nn.Module, base: nn.Module | str, *, delta: Callable[..., Delta], extended: bool = False
) -> CompressionSummary:
    """Turn the full experts of a trained MoE into deltas over one base, in place (section 3.2 of arXiv 2503.01359).

    Biases stay dense, one set per expert. `compress_folder` does the same from disk to disk, to the same bits.

    Args:
        model: an upcycled model whose experts are full copies.
        base: the dense model it was upcycled from, the paper's choice; or `"mean"`, the mean of each layer's experts,
            where that model is lost.
        delta: a `Delta` subclass with its dials bound: `functools.partial(QuantizedDelta, bits=2)`.
        extended: the universal FFN becomes one more expert over the same base.

    Raises:
        ValueError: nothing to compress, experts compressed before, or a base they did not come from.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no MoE layers: nothing to compress")
    vanilla = Upcycling.from_section(section_of(model))
    upcycling = compressed_form(vanilla, delta, extended)
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    bases = _base_weights(model, base, upcycling)
    new_layers, sizes = {}, [0, 0, 0]
    largest = 0.0
    for index in upcycling.layers:
        old = getattr(blocks[index], family.mlp)
        assert isinstance(old, VanillaMoE)
        stacks = {name: list(old.experts.weights_EOI[name].detach()) for name in family.ffn.projections}
        biases = {name: bias.detach() for name, bias in old.experts.biases_EO.items()}
        if extended:
            universal = family.ffn.linears(old.universal)  # type: ignore[arg-type]
            for name, linear in universal.items():
                stacks[name].append(linear.weight.detach())
                if name in biases:
                    biases[name] = torch.cat([biases[name], linear.bias.detach()[None]])
        weights = bases[index]
        dense = family.ffn.module(weights, {n: b[0].clone() for n, b in biases.items()}, old.experts.activation)
        dtype = next(iter(weights.values())).dtype
        with torch.device(next(iter(weights.values())).device):
            make = delta_maker(upcycling, index, dtype)
            new = SharedBaseMoE(
                dense,
                family.ffn,
                old.router,
                make,
                universal=vanilla.universal,
                universal_weight=vanilla.universal_weight,
                extended=extended,
            )
        if old.universal is not None and not extended:
            new.universal = old.universal
        for name, bias in biases.items():
            new.experts.biases_EO[name] = nn.Parameter(bias.clone())
        for name, stack in stacks.items():
            compressed = new.experts.deltas[name]
            assert isinstance(compressed, Delta)
            largest = max(largest, fit(compressed, stack, weights[name], f"layer {index} {name}", base))
        _add_sizes(sizes, new, stacks)
        new_layers[index] = new.train(old.training)
    for index, layer in new_layers.items():  # put in only when all are built: an error leaves the model as it was
        setattr(blocks[index], family.mlp, layer)
    _describe(model, upcycling)
    return CompressionSummary(upcycling, sizes[0], sizes[1], sizes[2], largest)


def section_of(model: nn.Module) -> dict[str, Any]:
    """The `ders` section of a model's configuration as plain data; empty for a dense one."""
    section: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    plain: dict[str, Any] = section.to_dict() if hasattr(section, "to_dict") else dict(section or {})
    return plain


def fit(delta: Delta, experts: Iterable[Tensor], base_OI: Tensor, where: str, base: object) -> float:
    """Fit a delta to experts (O, I) over a base, one by one; returns the largest ‖W_e − W_base‖ / ‖W_base‖.

    Raises:
        ValueError: shapes differ, a weight is not finite, or the base has nothing to do with an expert.
    """
    wide_OI = base_OI.to(torch.promote_types(base_OI.dtype, torch.float32))
    difference_OI = torch.empty_like(wide_OI)
    largest, scale = 0.0, float(wide_OI.norm())
    for expert, weight_OI in enumerate(experts):
        if weight_OI.shape != base_OI.shape:
            raise ValueError(
                f"{where}: the base has a {tuple(base_OI.shape)} matrix and the experts {tuple(weight_OI.shape)}: it "
                "is not the dense model they came from"
            )
        # Block by block, so that what was widened is still in the cache when it is subtracted from.
        for rows in row_blocks(*base_OI.shape):
            difference_OI[rows].copy_(weight_OI[rows]).sub_(wide_OI[rows])
        relative = float(difference_OI.norm()) / scale if scale else math.inf
        _refuse_unrelated(relative, f"{where}, expert {expert}", base)
        largest = max(largest, relative)
        delta.fit_expert_(expert, difference_OI)
    return largest


def _refuse_unrelated(relative: float, where: str, base: object) -> None:
    if math.isnan(relative):
        raise ValueError(f"{where}: holds weights that are not finite. The folder, or its base, is damaged")
    if relative < UNRELATED:
        return
    if base == "mean":
        warnings.warn(
            f"{where}: differs from the experts' mean by {relative:.2g} times its norm: they have little in common, "
            "and compression will cost quality",
            stacklevel=2,
        )
        return
    raise ValueError(
        f"{where}: differs from the base by {relative:.2g} times the base's norm: it did not come from this base. Give "
        "the dense model it was upcycled from, or base=mean"
    )


def mean_of(stack: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The mean of experts, summed in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    total = stack[0].to(wide, copy=True)
    for weight in stack[1:]:
        total += weight
    return (total / len(stack)).to(dtype)


def _base_weights(model: nn.Module, base: nn.Module | str, upcycling: Upcycling) -> dict[int, dict[str, Tensor]]:
    """Of each compressed layer, the base's matrices by projection: fresh tensors."""
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    if isinstance(base, str):
        if base != "mean":
            raise ValueError(f'base must be the dense model or "mean": got {base!r}')
        warn_of_mean()
        experts = {index: getattr(blocks[index], family.mlp).experts for index in upcycling.layers}
        return {
            index: {n: mean_of(list(w.detach()), w.dtype) for n, w in vanilla.weights_EOI.items()}
            for index, vanilla in experts.items()
        }
    _, base_decoder, base_family = find_decoder(base)
    base_blocks = getattr(base_decoder, base_family.layers)
    if base_family != family or len(base_blocks) != len(blocks) or moe_layers(base):
        raise ValueError("base is not the dense model this one was upcycled from: another architecture, or an MoE")
    found = {}
    for index in upcycling.layers:
        like = next(iter(getattr(blocks[index], family.mlp).experts.weights_EOI.values()))
        linears = family.ffn.linears(getattr(base_blocks[index], family.mlp))
        found[index] = {n: linear.weight.detach().to(like, copy=True) for n, linear in linears.items()}
    return found


def warn_of_mean() -> None:
    warnings.warn(
        "base=mean: deltas are taken from the mean of each layer's experts, not from the dense model the paper uses. "
        "Name that model where you have it",
        stacklevel=3,
    )


def _add_sizes(sizes: list[int], layer: SharedBaseMoE, stacks: dict[str, list[Tensor]]) -> None:
    sizes[0] += sum(weight.nbytes for stack in stacks.values() for weight in stack)
    sizes[1] += sum(weight.nbytes for weight in layer.shared_parameters())
    sizes[2] += sum(delta.storage_bits() for delta in layer.experts.deltas.values()) // 8  # type: ignore[operator]
    biases = sum(bias.nbytes for bias in layer.experts.biases_EO.values())
    sizes[0] += biases
    sizes[2] += biases


def _describe(model: nn.Module, upcycling: Upcycling) -> None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    described = copy.copy(config)
    described.quantization_config = upcycling.to_section(section_of(model).get("provenance"))
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = described

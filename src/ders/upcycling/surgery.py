"""Replacing dense FFNs by MoE layers."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ders.deltas import Delta, Place
from ders.kernels import stable_hash
from ders.moe import MoELayer, Router, SharedBaseMoE, TopKRouter, VanillaMoE, moe_layers
from ders.upcycling.description import Upcycling, bind, describe, describe_delta
from ders.upcycling.families import Family, find_decoder, hidden_side
from ders.upcycling.routers import load_router, read_routers

LAYER_CHOICES = ("every_other", "all", "first_half", "second_half")


@dataclass(frozen=True)
class UpcyclingSummary:
    """What upcycling did, in numbers. `str()` is the one line it reports."""

    upcycling: Upcycling
    model_type: str
    num_layers: int
    added_params: int
    added_params_universal: int
    added_params_vanilla: int

    def __str__(self) -> str:
        u = self.upcycling
        if u.delta is None:
            what = "full copies"
        else:
            dials = "".join(f" {key} {value}" for key, value in u.delta.items() if key != "name")
            what = f"{u.delta['name']}{dials}"
        versus = "" if u.delta is None else f" (vanilla +{readable(self.added_params_vanilla)})"
        return (
            f"{len(u.layers)} of {self.num_layers} FFNs → {u.num_experts} experts, top-{u.top_k}"
            f"{' + universal FFN' if u.universal else ''}{' over the same base' if u.extended else ''}, {what}: "
            f"+{readable(self.added_params)} parameters{versus}"
        )


def readable(count: int) -> str:
    """A parameter count: `1,234`, `0.26 M`, `1,246 M`."""
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:,.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def choose_layers(layers: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layer indices by name (`every_other` is 0, 2, 4, …, the paper's; `all`; `first_half`; `second_half`) or list.

    Raises:
        ValueError: an unknown name, an index out of range, a repeated index, or nothing chosen.
    """
    if isinstance(layers, str):
        named = {
            "every_other": range(0, num_layers, 2),
            "all": range(num_layers),
            "first_half": range(num_layers // 2),
            "second_half": range(num_layers // 2, num_layers),
        }
        if layers not in named:
            raise ValueError(f"layers must be one of {', '.join(LAYER_CHOICES)} or a list of indices: got {layers!r}")
        chosen = tuple(named[layers])
    else:
        if not isinstance(layers, Sequence) or not all(isinstance(i, int) for i in layers):
            raise ValueError(f"layers must be one of {', '.join(LAYER_CHOICES)} or a list of indices: got {layers!r}")
        chosen = tuple(sorted(int(i) for i in layers))
        outside = [i for i in chosen if not 0 <= i < num_layers]
        if outside or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"layers must be distinct indices from 0 to {num_layers - 1}, for this model has {num_layers} "
                f"decoder layers: got {list(layers)}"
            )
    if not chosen:
        raise ValueError(f"layers={layers!r} chooses none of the {num_layers} decoder layers: nothing to upcycle")
    return chosen


def upcycle(
    model: nn.Module,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    delta: Callable[..., Delta] | None = None,
    router: Callable[..., Router] = TopKRouter,
    layers: str | Sequence[int] = "every_other",
    universal: bool = False,
    universal_weight: str = "one",
    extended: bool = False,
    router_weights: str | Path | None = None,
    seed: int = 0,
    gathered: Callable[[nn.Module], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> UpcyclingSummary:
    """Turn chosen FFNs of a dense model into MoE layers, in place.

    Every expert starts as exactly the FFN it came from, so with a renormalised top-2 router the model computes what it
    computed before (`certify` proves it).

    Args:
        model: any module that holds a decoder of a known family, a LLaVA included.
        num_experts: E.
        top_k: K.
        delta: a `Delta` subclass with its dials bound (`functools.partial(SparseDelta, sparsity=0.9999)`): the experts
            share the FFN as base. None: vanilla upcycling, E full copies.
        router: a `Router` subclass, its options bound likewise.
        layers: see `choose_layers`.
        universal: keep a copy of the FFN that serves every token beside the experts.
        universal_weight: what multiplies that FFN's output: `one`, or `complement`, one minus the token's gate weights.
        extended: let that FFN be one more delta over the shared base.
        router_weights: a file of `save_routers`: routers that were trained beforehand.
        seed: root of everything random.
        gathered: context in which the weights of the FFN it is given are whole, where they are divided among processes.

    Returns:
        A summary; its `str()` is one line.

    Raises:
        ValueError: an unknown family, a dial out of range, a layer list out of range, a model upcycled before, or
            router weights that do not fit.
        TypeError: an FFN of a form the family does not have.
    """
    _, decoder, family = find_decoder(model)
    chosen = choose_layers(layers, len(getattr(decoder, family.layers)))
    upcycling = Upcycling(
        num_experts=num_experts,
        top_k=top_k,
        layers=chosen,
        delta=None if delta is None else describe_delta(delta),
        router=describe(router, Router),
        universal=universal,
        universal_weight=universal_weight,
        extended=extended,
        seed=seed,
    )
    # Read before anything is replaced: a file that does not fit leaves the model as it was.
    trained = None if router_weights is None else read_routers(router_weights, upcycling.layers)
    return apply(model, upcycling, trained, gathered)


def apply(
    model: nn.Module,
    upcycling: Upcycling,
    router_weights: dict[int, dict[str, Tensor]] | None = None,
    gathered: Callable[[nn.Module], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> UpcyclingSummary:
    """Do to a dense model what an `Upcycling` says; on the meta device only shapes are built.

    Args:
        router_weights: each layer's router as trained beforehand, by layer index.
        gathered: as of `upcycle`.
    """
    if moe_layers(model):
        raise ValueError("this model has MoE layers already: upcycle the dense model it came from")
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    # All new layers are built before the first is put in: an error leaves the model as it was.
    replaced = {}
    for index in upcycling.layers:
        with gathered(getattr(blocks[index], family.mlp)):
            replaced[index] = _build_layer(blocks[index], family, upcycling, index)
    for index, weights in (router_weights or {}).items():
        with gathered(replaced[index].router):
            load_router(replaced[index].router, weights, index)
    for index, layer in replaced.items():
        setattr(blocks[index], family.mlp, layer)
    config: Any = getattr(model, "config", None)
    if config is not None:
        # A shallow copy: the configuration may be shared with models that stay dense.
        upcycled = copy.copy(config)
        upcycled.quantization_config = upcycling.to_section()
        for module in model.modules():
            if getattr(module, "config", None) is config:
                module.config = upcycled
    return _summarize(upcycling, decoder, len(blocks), list(replaced.values()))


def _build_layer(block: nn.Module, family: Family, upcycling: Upcycling, index: int) -> MoELayer:
    dense = getattr(block, family.mlp)
    # The layer takes over the dense module's linear layers: work on a copy that shares their tensors.
    dense = copy.copy(dense)
    dense._modules = {name: copy.copy(child) for name, child in dense._modules.items()}
    for child in dense._modules.values():
        if child is not None:
            child._parameters = dict(child._parameters)
    weight = next(iter(family.ffn.linears(dense).values())).weight
    bound_router = bind(upcycling.router, Router.known, "router")
    with torch.device(weight.device):
        router = bound_router(
            weight.shape[1], upcycling.num_experts, upcycling.top_k, seed=stable_hash(upcycling.seed, index)
        )
        if weight.dtype == torch.float64:
            router = router.double()
        layer: MoELayer
        if upcycling.delta is None:
            layer = VanillaMoE(
                dense,
                family.ffn,
                router,
                universal=upcycling.universal,
                universal_weight=upcycling.universal_weight,
            )
        else:
            layer = SharedBaseMoE(
                dense,
                family.ffn,
                router,
                delta_maker(upcycling, index, weight.dtype),
                universal=upcycling.universal,
                universal_weight=upcycling.universal_weight,
                extended=upcycling.extended,
            )
    return layer.train(dense.training)


def delta_maker(upcycling: Upcycling, index: int, dtype: torch.dtype) -> Callable[[str, int, int, int], Delta]:
    """Makes the deltas of layer `index`: (projection, E, O, I) → Delta, each told its place in the model."""
    assert upcycling.delta is not None
    bound = bind(upcycling.delta, Delta.known, "delta")
    kind: Any = bound.func

    def make(name: str, num_experts: int, out_features: int, in_features: int) -> Delta:
        hidden, blocks = hidden_side(name.rpartition(".")[2])
        place = Place(
            seed=stable_hash(upcycling.seed, index, name),
            ffn_seed=stable_hash(upcycling.seed, index, "ffn"),
            hidden=hidden,
            blocks=blocks,
            layer=upcycling.layers.index(index),
            num_layers=len(upcycling.layers),
        )
        delta: Delta = kind.at(place, num_experts, out_features, in_features, **bound.keywords).to(dtype)
        return delta

    return make


def _summarize(upcycling: Upcycling, decoder: nn.Module, num_layers: int, replaced: list[MoELayer]) -> UpcyclingSummary:
    held = sum(p.numel() for layer in replaced for p in layer.parameters())
    dense = sum(layer.num_dense_params for layer in replaced)
    routers = sum(p.numel() for layer in replaced for p in layer.router.parameters())
    copied = dense if upcycling.universal else 0
    return UpcyclingSummary(
        upcycling=upcycling,
        model_type=decoder.config.model_type,  # type: ignore[union-attr, arg-type]
        num_layers=num_layers,
        added_params=held - dense,
        added_params_universal=0 if upcycling.extended else copied,
        added_params_vanilla=(upcycling.num_experts - 1) * dense + routers + copied,
    )

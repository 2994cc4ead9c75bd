"""Export with proof: the new folder, loaded by transformers, computes what the checkpoint computes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ders.checkpoint import ModelFolderError, TensorFolder
from ders.compression import MoESource
from ders.compression.export import export_folder
from ders.compression.layouts import Layout
from ders.compression.moe_llava import is_moe_llava
from ders.compression.source import Progress
from ders.moe import FFN, MoELayer, SharedBaseMoE, VanillaMoE, moe_layers
from ders.upcycling import find_decoder

# Of the largest logit, in fp32: another order of the same sums stays below a tenth of it, another rotary base or
# another epsilon of a norm is far above.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is. `str()` is the one line it reports.

    Attributes:
        layout: of the new folder.
        num_bytes: of its tensors.
        scale: the largest logit met.
        difference: the largest difference of a logit between the new folder and the checkpoint with the very same
            weights; None where transformers cannot load the checkpoint, so that there was nothing to compare with.
        rounding: the largest difference of a logit that those weights make against the checkpoint's own: experts are
            rounded to the folder's type when they are synthesised, and the router too in a stock layout.
    """

    layout: str
    num_bytes: int
    scale: float
    difference: float | None
    rounding: float | None

    def __str__(self) -> str:
        size = f"layout {self.layout}, {self.num_bytes / 1e6:,.2f} MB"
        if self.difference is None:
            return f"{size}; not compared: transformers cannot load the checkpoint"
        return (
            f"{size}; logits up to {self.scale:.2f} differ by at most {self.difference:.1e} in fp32, and by "
            f"{self.rounding:.1e} from rounding weights to the folder's type"
        )


def export(
    checkpoint: Path | str,
    output: Path | str,
    *,
    layout: str,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """`export_folder`, and a proof before the folder gets its name: logits of random tokens, on the CPU in fp32.

    The proof loads both models whole, in fp32: it needs memory for twice the parameters, four bytes each.

    A folder in half precision is loaded in fp32 too, so that the conversion is judged by itself; what rounding costs
    is reported beside it. Every synthesised matrix is held against the model's own W_base + Δ_e as well.

    Raises:
        ModelFolderError: as for `export_folder`, or the new folder computes something else; then nothing is left of it.
    """
    found: list[tuple[float, float | None, float | None]] = []

    def check(source: MoESource, planned: Layout, folder: Path) -> None:
        found.append(_compare(source, planned, folder))

    num_bytes = export_folder(checkpoint, output, layout=layout, check=check, overwrite=overwrite, progress=progress)
    scale, difference, rounding = found[0]
    return ExportReport(layout, num_bytes, scale, difference, rounding)


def _compare(source: MoESource, planned: Layout, folder: Path) -> tuple[float, float | None, float | None]:
    """Scale, difference and rounding of an `ExportReport`, of a folder that is written but not yet named."""
    before, expected = _expected_logits(source, stock=planned.section is None)
    logits = _logits(_load(folder))
    scale = float(logits.abs().max())
    if expected is None or before is None:
        if not logits.isfinite().all():
            raise ModelFolderError(f"{source.folder}: in the new layout it computes no finite logits. Nothing was kept")
        return scale, None, None
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * scale:
        raise ModelFolderError(
            f"{source.folder}: in the new layout its logits (up to {scale:.3g}) differ by {difference:.3g}, more than "
            f"{TOLERANCE:.0e} of that. Nothing was kept. This is a fault of ders: please report it"
        )
    return scale, difference, float((expected - before).abs().max())


def _expected_logits(source: MoESource, stock: bool) -> tuple[Tensor | None, Tensor | None]:
    """The checkpoint's logits with its own weights, and with those that an export writes."""
    if is_moe_llava(TensorFolder(source.folder)):
        return None, None
    model = _load(source.folder)
    before = _logits(model)
    if not moe_layers(model):  # a stock class: its weights are copied as they are
        return before, before
    _, decoder, family = find_decoder(model)
    blocks = getattr(decoder, family.layers)
    for index in source.upcycling.layers:
        layer = getattr(blocks[index], family.mlp)
        if isinstance(layer, SharedBaseMoE):
            layer = _with_full_experts(layer, source, index)
            setattr(blocks[index], family.mlp, layer)
        if stock:
            layer.router.weight.data = layer.router.weight.data.to(source.dtype).float()
    return before, _logits(model)


@torch.no_grad()
def _with_full_experts(layer: SharedBaseMoE, source: MoESource, index: int) -> MoELayer:
    """The layer with the weights that an export writes, each held against the layer's own."""
    form, count, stored = source.family.ffn, source.upcycling.num_experts, source.layers[index]
    stacks = {
        name: torch.stack([_checked(piece.read(), layer, name, e) for e, piece in enumerate(stack)])
        for name, stack in stored.experts.items()
    }
    biases = {name: torch.stack([piece.read().float() for piece in stack]) for name, stack in stored.biases.items()}
    last = {name: stack[-1] for name, stack in stacks.items()}, {name: bias[-1] for name, bias in biases.items()}
    dense = form.module(*last, getattr(layer, form.activation))
    full = VanillaMoE(dense, form, layer.router)
    full.universal = _DenseFFN(dense, form) if layer.extended else layer.universal
    for name, stack in stacks.items():
        full.experts.weights_EOI[name].copy_(stack[:count])
    for name, bias in biases.items():
        full.experts.biases_EO[name].copy_(bias[:count])
    return full.eval()


class _DenseFFN(nn.Module):
    """The universal FFN of a layer where it was one more expert."""

    def __init__(self, dense: nn.Module, form: FFN) -> None:
        super().__init__()
        self.dense, self.form = dense, form

    def forward(self, hidden_states: Tensor) -> Tensor:
        pre = [getattr(self.dense, name)(hidden_states) for name in self.form.inputs]
        hidden = self.form.hidden(pre, getattr(self.dense, self.form.activation))
        output: Tensor = getattr(self.dense, self.form.output)(hidden)
        return output


def _checked(weight_OI: Tensor, layer: SharedBaseMoE, name: str, expert: int) -> Tensor:
    """A synthesised matrix in fp32, if it is W_base + Δ_e but for rounding."""
    own_OI = layer.effective_weight(name, expert)
    relative = float((weight_OI - own_OI).norm() / own_OI.norm())
    # One rounding is half of eps at most; a low-rank product in half precision adds less than another.
    if not relative <= torch.finfo(weight_OI.dtype).eps:
        raise ModelFolderError(
            f"expert {expert} of {name} was synthesised with a relative error of {relative:.2g}, more than rounding to "
            f"{weight_OI.dtype} explains. Nothing was kept. This is a fault of ders: please report it"
        )
    return weight_OI.float()


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """(B, S, vocabulary) of two random sequences, the same for every model of one vocabulary."""
    config: Any = model.config
    text = config.get_text_config()
    length = min(64, text.max_position_embeddings)
    ids_BS = torch.randint(text.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids_BS[ids_BS == getattr(config, "image_token_index", -1)] = 0  # no picture goes with it
    with torch.random.fork_rng():  # a router may draw its second choices, the same for both
        torch.manual_seed(0)
        logits: Tensor = model(input_ids=ids_BS).logits
    return logits


def _load(folder: Path) -> nn.Module:
    """A model on the CPU in fp32, stock experts one after the other: their fused kernels sum in other orders."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stock = config.get_text_config().model_type in ("mixtral", "qwen2_moe")
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **({"experts_implementation": "eager"} if stock else {}),
    )
    lost = [f"{what} {sorted(report[what])[:3]}" for what in ("missing_keys", "unexpected_keys") if report[what]]
    if lost:
        raise ModelFolderError(f"{folder}: the weights do not fit config.json: {'; '.join(lost)}")
    return model.eval()

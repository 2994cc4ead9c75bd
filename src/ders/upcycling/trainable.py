"""What trains: the `trainable` dial, as a table of roles."""

from torch import nn

from ders.moe import SharedBaseMoE, moe_layers
from ders.upcycling.families import find_decoder

# Every parameter has one role: the vision tower, the projector, the shared base of an MoE layer, what makes experts
# differ (deltas, expert biases, or whole experts of a vanilla layer), the router (or a frozen one), any other FFN, or
# the rest of the language model.
ROLES = ("tower", "projector", "base", "experts", "router", "frozen", "ffn", "rest")

TRAINABLE: dict[str, set[str]] = {
    "tower": {"tower"},
    "projector": {"projector"},
    # The paper's stage 3 (from MoE-LLaVA): FFNs of every layer, dense ones too, routers and projector.
    "paper": {"projector", "base", "experts", "router", "ffn"},
    # Table 5: the same with the shared base frozen.
    "frozen_shared": {"projector", "experts", "router", "ffn"},
    "adapter": {"experts", "router"},
    # The tower is frozen in every recipe of the paper, and its last layer may not be read at all.
    "all": set(ROLES) - {"tower", "frozen"},
}

# What an MoE stage may train; the other rows are for the stages before it.
MOE_TRAINABLE = ("paper", "frozen_shared", "adapter", "all")


def roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by name."""
    decoder_name, decoder, family = find_decoder(model)
    of: dict[str, str] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        of[name] = "tower" if "vision_tower" in parts else "projector" if "multi_modal_projector" in parts else "rest"
    prefix = f"{decoder_name}." if decoder_name else ""
    for index, block in enumerate(getattr(decoder, family.layers)):
        for name, _ in getattr(block, family.mlp).named_parameters():
            of[f"{prefix}{family.layers}.{index}.{family.mlp}.{name}"] = "ffn"
    for layer_name, layer in moe_layers(model).items():
        shared = {id(p) for p in layer.shared_parameters()}
        for name, parameter in layer.named_parameters():
            head = name.split(".")[0]
            router = "frozen" if layer.router.frozen else "router"
            role = "base" if id(parameter) in shared else {"experts": "experts", "router": router}.get(head, "ffn")
            of[f"{layer_name}.{name}" if layer_name else name] = role
    return of


def set_trainable(model: nn.Module, trainable: str, *, rest: bool = False) -> int:
    """Make exactly the parameters of one row of `TRAINABLE` trainable; returns how many parameters that is.

    Args:
        rest: also what a language model has beside its FFNs, as the paper's code recipe does.

    Raises:
        ValueError: an unknown name, a choice that needs what the model lacks, or nothing left to train.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {', '.join(TRAINABLE)}: got {trainable!r}")
    shares = any(isinstance(layer, SharedBaseMoE) for layer in moe_layers(model).values())
    if trainable in ("frozen_shared", "adapter") and not shares:
        raise ValueError(
            f"trainable={trainable} needs experts over a shared base, and this model has none: "
            "use a method with deltas, or trainable=paper"
        )
    wanted = TRAINABLE[trainable] | ({"rest"} if rest else set())
    of = roles(model)
    total = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(of[name] in wanted)
        total += parameter.numel() * parameter.requires_grad
    if total == 0:
        raise ValueError(f"trainable={trainable} trains nothing in this model: it has no {' or '.join(sorted(wanted))}")
    return total

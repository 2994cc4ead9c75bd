"""What training holds in memory: model states by ZeRO stage, and an estimate of activations.

Model states in bytes, bf16 mixed precision with AdamW (ZeRO, arXiv 1910.02054, section 3, as DeepSpeed 0.19 does it,
measured): a parameter is 2 in bf16; a trainable one also has a gradient, 2, its fp32 copy at the step, 4, an fp32
master weight, 4, and two fp32 moments, 8; and while the copy is made, ZeRO has the process' share of the gradients
twice, 2 more. On each of N GPUs, with P trainable and Q frozen parameters:

    DDP, ZeRO 0   2 (P + Q) + 18 P
    ZeRO 1        2 (P + Q) + max(2 P + 12 P / N, 20 P / N)     after the backward pass, or at the step
    ZeRO 2        2 (P + Q) + 20 P / N                          no process has all gradients
    ZeRO 3        max((16 P + 2 Q) / N + 4 × largest, (22 P + 2 Q) / N)     nor all weights: in the backward pass a
                                                                layer's are gathered, with their gradients

DeepSpeed's own estimators leave the copies at the step out. Offloading moves to the CPU what a stage divides among
GPUs; then the CPU of a node holds 16 P (stages 1 and 2) or 18 P + 2 Q (stage 3, weights too), and the GPU keeps the
rest: 2 (P + Q), and in stage 1 the gradients, 2 P; in stage 3 only what is gathered.

Left out: communication buckets, fragmentation, what CUDA itself takes, and pinned buffers on the CPU (DeepSpeed's own
estimators multiply CPU bytes by 1.5 for those).
"""

from dataclasses import dataclass

from torch import nn

from ders.moe import moe_layers
from ders.upcycling import find_decoder

STAGES = (0, 1, 2, 3)
# Master weight and moments; the fp32 copy of a gradient at the step.
_WEIGHT, _GRADIENT, _STATES, _COPY = 2, 2, 12, 4


@dataclass(frozen=True)
class StateBytes:
    """Model states: bytes of one GPU, and of the CPU of one node."""

    gpu: int
    cpu: int = 0


@dataclass(frozen=True)
class TrainedParams:
    """How many parameters train, how many do not, and how many the largest module has of its own."""

    trainable: int
    frozen: int
    largest: int

    @classmethod
    def of(cls, model: nn.Module) -> "TrainedParams":
        """Read off a model on any device by its `requires_grad` flags; tied parameters count once."""
        parameters = list(model.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return cls(
            trainable=trainable,
            frozen=sum(p.numel() for p in parameters) - trainable,
            largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        )


def model_state_bytes(params: TrainedParams, *, stage: int, num_gpus: int = 1, offload: bool = False) -> StateBytes:
    """Bytes of weights, gradients and optimizer states, by the table above, on one node.

    Raises:
        ValueError: there is no such stage, no GPU, or nothing divided that could be offloaded.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}: got {stage}")
    if num_gpus < 1:
        raise ValueError(f"num_gpus must be at least 1: got {num_gpus}")
    if offload and stage == 0:
        raise ValueError("offload moves what ZeRO divides among GPUs, and stage 0 (DDP) divides nothing")
    trained = params.trainable
    weights, gradients, states = _WEIGHT * (trained + params.frozen), _GRADIENT * trained, _STATES * trained
    # A process' share of it all, with its gradients once more, as they are copied to fp32.
    at_the_step = (2 * gradients + _COPY * trained + states) // num_gpus
    gathered = (_WEIGHT + _GRADIENT) * params.largest
    if offload:
        on_cpu = _COPY * trained + states
        if stage == 3:
            return StateBytes(gathered, weights + on_cpu)
        return StateBytes(weights + (gradients if stage == 1 else 0), on_cpu)
    if stage == 3:
        in_backward = gathered + (weights + gradients + states) // num_gpus
        return StateBytes(max(in_backward, weights // num_gpus + at_the_step))
    if stage == 2:
        return StateBytes(weights + at_the_step)
    if stage == 1:
        return StateBytes(weights + max(gradients + states // num_gpus, at_the_step))
    return StateBytes(weights + gradients + _COPY * trained + states)


def activation_bytes(model: nn.Module, tokens: int) -> int:
    """An estimate of what one GPU keeps of its tokens in bf16 with gradient checkpointing of every decoder layer.

    Per token: the input of every layer (2 D bytes); inside the one layer that is computed again, eight vectors of
    width D (norms, queries, keys, values, attention, residuals) and three of width F per FFN that the token meets;
    the logits in bf16 and, for the loss, in fp32 with their gradient (10 V bytes). Attention scores are never held
    (FlashAttention), vision towers and temporary copies are left out: read it as an order of magnitude.
    """
    _, decoder, family = find_decoder(model)
    config = decoder.config
    hidden, ffn = int(config.hidden_size), int(config.intermediate_size)  # type: ignore[union-attr, arg-type]
    met = max(
        [1, *(layer.router.top_k + layer.has_universal for layer in moe_layers(model).values())],
    )
    inputs = 2 * hidden * len(getattr(decoder, family.layers))
    recomputed = 2 * (8 * hidden + 3 * ffn * met)
    logits = 10 * int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    return tokens * (inputs + recomputed + logits)

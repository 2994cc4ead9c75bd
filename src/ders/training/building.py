"""Models that are built where they train: whole, or in pieces that no process ever holds together."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.initialization import no_init_weights

from ders.models.bundle import dense_from_config, load_bundle, read_config
from ders.training.strategies import FSDP2, DeepSpeed

Gathering = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Blueprint:
    """A model that is not built yet.

    Attributes:
        parent: folder of the dense model.
        upcycle: does to it what the method says, in place; makes an FFN's weights whole by the context it is given.
    """

    parent: Path
    upcycle: Callable[[nn.Module, Gathering], Any]

    def build(self, strategy: Strategy) -> nn.Module:
        """The model in fp32, its weights whole or divided as the strategy wants them."""
        with torch.device("cpu"):  # Lightning's choice of a device would make transformers ask for accelerate
            if isinstance(strategy, DeepSpeed) and strategy.zero_stage_3:
                return self._partitioned(strategy)
            model = load_bundle(self.parent, dtype=torch.float32).model
            self.upcycle(model, contextlib.nullcontext)
            return strategy.shard(model) if isinstance(strategy, FSDP2) else model

    def _partitioned(self, strategy: DeepSpeed) -> nn.Module:
        # transformers would read all weights on every process; here the first one alone reads, and hands them on.
        whole = load_bundle(self.parent, dtype=torch.float32).model if strategy.is_global_zero else None
        with strategy.partitioned(), no_init_weights():
            model = dense_from_config(read_config(self.parent), "cpu")
        model.tie_weights()  # which comes with the initialisation that is left out here
        fill(model, whole)
        del whole
        with strategy.partitioned():
            self.upcycle(model, functools.partial(gathered, modified=True))
        return model


def fill(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy the first process' whole model into a partitioned one of the same class, a module at a time.

    Args:
        whole: on the first process; None on the others.
    """
    theirs = {} if whole is None else dict(whole.named_modules())
    for name, module in model.named_modules():
        source = theirs.get(name)
        with gathered(module, recurse=False, modified=True):
            for key, parameter in module.named_parameters(recurse=False):
                if source is not None:
                    parameter.data.copy_(source.get_parameter(key))
        for key, buffer in module.named_buffers(recurse=False):
            if source is not None:
                buffer.copy_(source.get_buffer(key))
            torch.distributed.broadcast(buffer, 0)


@contextlib.contextmanager
def gathered(module: nn.Module, *, recurse: bool = True, modified: bool = False) -> Iterator[None]:
    """A partitioned module's weights are whole in here, on every process; what the first one `modified` stays."""
    import deepspeed

    parameters = list(module.parameters(recurse))
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modified else None):
        yield


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with whole tensors in the first process' own memory; None on the others.

    All processes must call it. Divided tensors are gathered one at a time.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    gathered_before: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered_before:  # tied weights stay tied
            gathered_before[id(tensor)] = _whole_tensor(tensor, first)
        state[name] = gathered_before[id(tensor)]
    return state if first else None


def _whole_tensor(tensor: Tensor, first: bool) -> Tensor:
    if isinstance(tensor, DTensor):
        whole = tensor.full_tensor()
        return whole.cpu() if first else torch.empty(0)
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone() if first else torch.empty(0)


def local_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What this very process holds of each trainable parameter, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            piece = getattr(parameter, "ds_tensor", parameter)
            yield name, piece.to_local() if isinstance(piece, DTensor) else piece

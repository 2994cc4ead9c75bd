"""How a model is spread over processes: DeepSpeed's ZeRO and torch's FSDP2, on GPUs or, over gloo, on a CPU.

No expert parallelism: deltas are small and every process has all of them, so every process touches the same tensors in
every step, and none waits for experts that its tokens did not choose.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ders.moe import MoELayer, Router
from ders.upcycling import find_decoder

# Frozen weights are the parent's: whoever resumes has them, and a step's safetensors model holds them besides.
_TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, cpu_offload=True, strict=False)


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3 (arXiv 1910.02054), also on a CPU.

    Args:
        stage: optimizer states (1), gradients too (2), weights too (3) are divided among the processes.
        offload: what is divided lives on the CPU of its node.
        bucket_elements: gradients are reduced, and weights gathered, so many elements at a time.
        least_elements: smaller parameters stay whole on every process, under ZeRO-3.
        live_elements: so many others may be whole at a time, under ZeRO-3: less is slower, and takes less memory.
    """

    def __init__(
        self,
        stage: int,
        *,
        offload: bool = False,
        bucket_elements: int = 50_000_000,
        least_elements: int = 100_000,
        live_elements: int = 1_000_000_000,
        **others: Any,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            # A write that frozen weights do not need: they are the parent's.
            exclude_frozen_parameters=True,
            allgather_bucket_size=bucket_elements,
            reduce_bucket_size=bucket_elements,
            **others,
        )
        self.stage, self.offload = stage, offload
        zero: dict[str, Any] = self.config["zero_optimization"]  # type: ignore[index]
        zero["stage3_param_persistence_threshold"] = least_elements
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live_elements
        zero["stage3_prefetch_bucket_size"] = min(bucket_elements, live_elements)
        # A torch optimizer, on the CPU too: one for all strategies, so that runs can be compared.
        self.config["zero_force_ds_cpu_optimizer"] = False  # type: ignore[index]
        # Used for DeepSpeed's own throughput figures alone; Lightning would look for it in the loader.
        self.config["train_micro_batch_size_per_gpu"] = 1  # type: ignore[index]

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            # Lightning refuses a CPU here, and only here; DeepSpeed then asks for the index of a device.
            self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or []))]
            self.accelerator.setup_device(torch.device("cpu"))
            self.setup_distributed()
        else:
            super().setup_environment()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield  # the model is partitioned where it is built, not in all of `configure_model`

    @contextlib.contextmanager
    def partitioned(self) -> Iterator[None]:
        """Parameters created in here are divided among the processes at once, under ZeRO-3."""
        import deepspeed

        self._init_config_if_needed()
        with deepspeed.zero.Init(enabled=self.zero_stage_3, config_dict_or_path=self.config):
            yield

    def setup(self, trainer: Any) -> None:
        self._init_config_if_needed()
        if "bf16" in self.config or "fp16" in self.config:  # type: ignore[operator]
            # ZeRO keeps all weights in one half-precision type, and each router's fp32 master among the optimizer's
            # states; logits are computed in fp32 whatever the weight's type is.
            for module in self.lightning_module.modules():  # type: ignore[union-attr]
                if isinstance(module, Router):
                    module.keeps_fp32 = False
        if self.zero_stage_3:
            import deepspeed

            # All of a layer's experts are gathered before it runs and after: no expert's tokens decide who waits.
            layers = [m for m in self.lightning_module.modules() if isinstance(m, MoELayer)]  # type: ignore[union-attr]
            if layers:
                deepspeed.utils.set_z3_leaf_modules(self.lightning_module, list({type(layer) for layer in layers}))
            for layer in layers:
                layer.register_forward_pre_hook(_ask_for_the_inputs_gradient)
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided the loss by the number of micro-batches already; DeepSpeed would do it again.
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def _ask_for_the_inputs_gradient(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # DeepSpeed takes a layer's weights away once it has the gradient of its input, and where nobody asked for that (the
    # first layer over frozen embeddings) before it has the weights' own.
    x, *others = inputs
    asks = torch.is_grad_enabled() and not x.requires_grad
    return (x.detach().requires_grad_() if asks else x, *others)


class FSDP2(ModelParallelStrategy):
    """torch's `fully_shard`, decoder layer by decoder layer: weights, gradients and optimizer states are divided."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, model: nn.Module) -> nn.Module:
        """Divide a whole model, in place."""
        half = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        mesh = self.device_mesh["data_parallel"]
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=half)}
        _, decoder, family = find_decoder(model)
        for block in getattr(decoder, family.layers):
            fully_shard(block, **options)
        return fully_shard(model, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder with each process' pieces; the weights that do not train are left out."""
        folder = Path(self.broadcast(filepath))
        for key in ("state_dict", "optimizer_states"):
            checkpoint.pop(key, None)
        dcp.save(self._states(), checkpoint_id=folder)
        if self.is_global_zero:
            torch.save(checkpoint, folder / "trainer.pt")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(checkpoint_path)
        states = self._states()
        dcp.load(states, checkpoint_id=folder)
        set_model_state_dict(self.model, states["model"], options=_TRAINABLE_ONLY)  # type: ignore[arg-type]
        set_optimizer_state_dict(
            self.model,  # type: ignore[arg-type]
            self.optimizers,
            states["optimizer"],
            options=_TRAINABLE_ONLY,
        )
        loaded: dict[str, Any] = torch.load(folder / "trainer.pt", weights_only=True)
        return loaded

    def _states(self) -> dict[str, Any]:
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in self.optimizers]
        return {
            "model": get_model_state_dict(self.model, options=_TRAINABLE_ONLY),  # type: ignore[arg-type]
            "optimizer": get_optimizer_state_dict(self.model, optimizers, options=_TRAINABLE_ONLY),  # type: ignore[arg-type]
        }

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` asks for the pieces itself, and for those that train alone

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}


def is_sharded(strategy: Strategy) -> bool:
    """Whether no process holds the whole model: then training validates by loss, not by answers."""
    return isinstance(strategy, FSDP2) or (isinstance(strategy, DeepSpeed) and strategy.zero_stage_3)


def state_format(strategy: Strategy) -> str:
    """What a strategy's checkpoints can be continued by: `whole`, `zero1` … `zero3`, or `fsdp2`."""
    if isinstance(strategy, DeepSpeed):
        return f"zero{strategy.stage}"
    return "fsdp2" if isinstance(strategy, FSDP2) else "whole"


def refuse_other_state(saved: dict[str, Any], state: str, world_size: int) -> None:
    """Whether training can go on from a checkpoint with other processes than it was written with.

    Args:
        saved: `state` and `world_size` of the checkpoint.

    Raises:
        ValueError: it cannot; says from what it can.
    """
    there, here = (saved["state"], saved["world_size"]), (state, world_size)
    if there == here or (there[0] == here[0] and state in ("whole", "fsdp2")):
        return
    raise ValueError(
        f"the checkpoint's optimizer states are divided otherwise (there {there[0]} × {there[1]} processes, here "
        f"{here[0]} × {here[1]}). ZeRO shards continue with the same stage "
        "on the same number of processes only; one process, DDP and FSDP2 also on another number. Its model/ folder is "
        "whole: it can be scored, compressed and exported as it is"
    )


def make_trainer(strategy: str, *, devices: int = 1, precision: str = "32-true", **options: Any) -> lightning.Trainer:
    """A trainer on CPUs.

    Args:
        strategy: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp2`.
    """
    chosen: Any = {"single": "auto"}.get(strategy, strategy)
    if strategy.startswith("zero"):
        chosen = DeepSpeed(int(strategy[-1]), bucket_elements=4_000_000, least_elements=0, live_elements=4_000_000)
    elif strategy == "fsdp2":
        chosen = FSDP2()
    return lightning.Trainer(
        accelerator="cpu", devices=devices, strategy=chosen, precision=precision, log_every_n_steps=1, **options
    )

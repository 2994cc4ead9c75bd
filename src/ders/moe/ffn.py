"""What the layer must know about a dense feed-forward network: its matrices, its activation, its gate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class FFN:
    """The form of a dense FFN module, by the names of its children.

    Attributes:
        inputs: the linear layers that read the hidden state: `(gate, up)`, one fused `gate_up` (gate rows first), or
            one plain layer.
        output: the linear layer that writes it back.
        activation: the child (module or function) between them.
        gated: the activation of the gate half multiplies the other half.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str
    gated: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    def hidden(self, pre: list[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
        """What the output layer reads, from the input layers' results."""
        if not self.gated:
            return activation(pre[0])
        gate, up = pre if len(pre) == 2 else pre[0].chunk(2, dim=-1)
        return activation(gate) * up

    def linears(self, module: nn.Module) -> Mapping[str, nn.Linear]:
        """The linear layers of a dense FFN module, by name.

        Raises:
            TypeError: the module is not of this form; nothing is guessed, for a wrong guess would train silently.
        """
        found = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        owners = {name.rsplit(".", 1)[0] for name, _ in module.named_parameters()}
        if owners != set(self.projections) or set(found) != owners or not hasattr(module, self.activation):
            raise TypeError(
                f"{type(module).__name__} is not an FFN of the expected form: it has parameters in "
                f"{sorted(owners)}, expected linear layers {list(self.projections)} and {self.activation!r}"
            )
        return {name: found[name] for name in self.projections}

    def module(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], activation: Any) -> nn.Module:
        """A dense FFN module of this form, its linear layers holding the given tensors themselves, not copies."""
        dense = nn.Module()
        for name in self.projections:
            out_features, in_features = weights[name].shape
            linear = nn.Linear(in_features, out_features, bias=name in biases, device="meta")
            linear.weight = nn.Parameter(weights[name])
            if name in biases:
                linear.bias = nn.Parameter(biases[name])
            dense.add_module(name, linear)
        setattr(dense, self.activation, activation)
        return dense

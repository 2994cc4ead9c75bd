"""One cell of a layer benchmark: a shape, a number of tokens, a direction; every method and peer against dense.

T tokens, D model width, E experts, K top-k.
"""

import gc
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ders.evaluation.layers import (
    METHODS,
    SM,
    Mixture,
    Shape,
    in_float64,
    oracle,
    relative_error,
    shared_layer,
    tokens_and_gradient,
    vanilla_layer,
)
from ders.evaluation.peers import (
    MAX_GATHERED_BYTES,
    OURS,
    WAITING,
    Rebuilt,
    gathered_bytes,
    vanilla_peers,
)
from ders.evaluation.roofline import Ceilings, Work, dense_work, shared_work, vanilla_work
from ders.evaluation.timing import Run, Series, Variant, paired, replayed, significant, spread, stopwatch_of
from ders.moe import MoELayer, SharedBaseMoE

DENSE, REBUILT = "dense", "rebuilt W_e"
# A peer whose result is further off does something else. In half precision a router's near ties may fall otherwise.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Rebuilding takes tens of times as long: so few rounds tell it.
REBUILT_ROUNDS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        methods: a subset of `METHODS`.
    """

    shape: Shape
    mixture: Mixture
    tokens: int
    backward: bool
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.mixture.name}, T {self.tokens}, {self.direction}"

    @property
    def weight(self) -> float:
        """Its share of the time: the root of its work, so that cheap cells get more rounds, not most of the time."""
        work = max(self.tokens, 16) * self.shape.hidden * self.shape.ffn * (3 if self.backward else 1)
        return work**0.5

    def labels(self) -> Row:
        return {
            "shape": self.shape.name,
            "experts": self.mixture.experts,
            "top_k": self.mixture.top_k,
            "tokens": self.tokens,
            "direction": self.direction,
        }


class Stand:
    """All layers of one shape and mixture, built once: dense, methods, rebuilding, and the vanilla layers there are."""

    def __init__(self, shape: Shape, mixture: Mixture, device: str, dtype: torch.dtype, *, peers: bool = True) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.dense = shape.dense().to(dtype)
            self.methods = {name: shared_layer(self.dense, shape, mixture, make) for name, make in METHODS.items()}
            self.peers: dict[str, nn.Module] = {}
            self.missing: dict[str, str] = {}
            if peers:
                vanilla = vanilla_layer(self.dense, shape, mixture)
                self.peers, self.missing = vanilla_peers(self.dense, vanilla, shape, mixture)
        self.shape, self.mixture, self.device, self.dtype = shape, mixture, device, dtype
        self.activation: Callable[[Tensor], Tensor] = getattr(self.dense, shape.form.activation)

    def data(self, tokens: int) -> tuple[Tensor, Tensor]:
        return tokens_and_gradient(tokens, self.shape.hidden, next(self.dense.parameters()))

    def index(self, x_TD: Tensor) -> Tensor:
        """The choices (T, K) that every layer of the stand makes: their routers are equal."""
        with torch.no_grad():
            return self.methods[SM].router(x_TD).top_k_index_TK

    def hit(self, tokens: int) -> int:
        """How many experts so many tokens meet."""
        return len(self.index(self.data(tokens)[0]).unique())

    def cast(self, dtype: torch.dtype) -> "Stand":
        """The same dense FFN and methods in another dtype, in place; vanilla layers are let go of."""
        self.peers, self.missing, self.dtype = {}, {}, dtype
        for layer in (self.dense, *self.methods.values()):
            layer.to(dtype)
        return self

    def exact(self, tokens: Iterable[int]) -> dict[int, Tensor]:
        """By number of tokens, what the vanilla layers should give: ours on built weights in float64."""
        given = {count: self.data(count)[0] for count in tokens}
        twin = in_float64(self.peers[OURS])
        return _each(given, lambda x_TD: self._oracle(twin, x_TD.double(), self.index(x_TD)))

    def errors(self, cells: list[Cell]) -> dict[Cell, dict[str, float]]:
        """Of dense, methods and rebuilding: relative errors to float64 on built weights W_e.

        Of the outputs, or with `backward` of all gradients. All cells at once, for the oracle's weights are built once.
        """
        found: dict[Cell, dict[str, float]] = {cell: {} for cell in cells}
        layers: dict[str, nn.Module] = {DENSE: self.dense, **self.methods, REBUILT: Rebuilt(self.methods[SM])}
        for name, layer in layers.items():
            mine = [c for c in cells if name in (DENSE, *c.methods) or (name == REBUILT and not c.backward)]
            twin = in_float64(layer)
            given = {cell.tokens: self.data(cell.tokens)[0] for cell in mine if not cell.backward}
            outputs = _each(given, lambda x, name=name, twin=twin: self._run_exact(name, twin, x.double(), x))
            for cell in mine:
                if cell.backward:
                    found[cell][name] = self._gradient_error(name, layer, twin, cell)
                else:
                    with torch.no_grad():
                        y_TD = layer(given[cell.tokens])
                    found[cell][name] = relative_error([y_TD], [outputs[cell.tokens]])
        return found

    def _run_exact(self, name: str, twin: Any, x64_TD: Tensor, x_TD: Tensor) -> Tensor:
        """The choices are those made for `x_TD`: in float64 a near tie may fall otherwise."""
        if name == DENSE:
            y_TD: Tensor = twin(x64_TD)
            return y_TD
        return self._oracle(twin.layer if name == REBUILT else twin, x64_TD, self.index(x_TD))

    def _oracle(self, twin: MoELayer, x_TD: Tensor, index_TK: Tensor) -> Tensor:
        return oracle(twin, x_TD, index_TK, self.activation)

    def _gradient_error(self, name: str, layer: nn.Module, twin: nn.Module, cell: Cell) -> float:
        x_TD, grad_TD = self.data(cell.tokens)
        given = gradients(layer, layer, x_TD, grad_TD)
        exact = gradients(twin, lambda x: self._run_exact(name, twin, x, x_TD), x_TD.double(), grad_TD.double())
        return relative_error(given, exact)

    def check_peers(
        self, tokens: int, exact_TD: Tensor
    ) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, float]]:
        """The vanilla layers that give what they should on so many tokens; why others are left out; their errors."""
        x_TD, _ = self.data(tokens)
        good, why, errors = {}, dict(self.missing), {}
        for name, peer in self.peers.items():
            gathered = gathered_bytes(self.shape, self.mixture, tokens, self.dtype)
            if name == "vanilla: HF batched_mm" and gathered > MAX_GATHERED_BYTES:
                why[name] = f"gathers the weights of every slot: {gathered / 1e9:.1f} GB"
                continue
            try:
                with torch.no_grad():
                    errors[name] = relative_error([peer(x_TD)], [exact_TD])
            except Exception as error:  # another library's own failure is a finding, not ours
                if name == OURS:
                    raise
                why[name] = f"{type(error).__name__}: {error}"
                continue
            if errors[name] <= WRONG[self.dtype]:
                good[name] = peer
            else:
                why[name] = f"computes something else: relative error {errors[name]:.1e}"
        return good, why, errors


@torch.no_grad()
def _each(given: dict[int, Tensor], run: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """What a function of tokens gives for each entry, in one call."""
    if not given:
        return {}
    parts = run(torch.cat(list(given.values()))).split([len(x_TD) for x_TD in given.values()])
    return dict(zip(given, parts, strict=True))


def gradients(layer: nn.Module, run: Callable[[Tensor], Tensor], x_TD: Tensor, grad_TD: Tensor) -> list[Tensor]:
    """Of the input and of every parameter; zeros where there is none."""
    wanted = [x_TD.requires_grad_(), *layer.parameters()]
    found = torch.autograd.grad(run(x_TD), wanted, grad_TD, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def runner(layer: nn.Module, cell: Cell, x_TD: Tensor, grad_TD: Tensor) -> Run:
    """One pass: what a decoding step does, or what a training step asks of a layer."""
    layer.train(cell.backward)
    if not cell.backward:

        def forward() -> None:
            with torch.no_grad():
                layer(x_TD)

        return forward
    wanted = [x_TD.requires_grad_(), *layer.parameters()]

    def both() -> None:
        torch.autograd.grad(layer(x_TD), wanted, grad_TD, allow_unused=True)

    return both


def measure_cell(
    stand: Stand, cell: Cell, errors: dict[str, float], exact_TD: Tensor, limits: Ceilings, budget: float
) -> tuple[list[Row], dict[str, str]]:
    """One row for dense, each method, each peer and rebuilding; and the peers left out, with the reason.

    Args:
        errors: of this cell, from `Stand.errors`.
        exact_TD: for its number of tokens, from `Stand.exact`.
    """
    gc.collect()
    peers, why, peer_errors = stand.check_peers(cell.tokens, exact_TD)
    layers: dict[str, nn.Module] = {**peers, **{name: stand.methods[name] for name in cell.methods}}
    layers[REBUILT] = Rebuilt(stand.methods[SM])
    x_TD, grad_TD = stand.data(cell.tokens)
    runs = {name: runner(layer, cell, x_TD, grad_TD) for name, layer in {DENSE: stand.dense, **layers}.items()}
    graphs = _capture(runs) if stand.device == "cuda" else set()
    variants = [
        Variant(name, runs[name], REBUILT_ROUNDS if name == REBUILT else None, peer=name in peers) for name in layers
    ]
    base, series = paired(runs[DENSE], variants, stopwatch_of(stand.device), budget)
    best = fastest({name: series[name] for name in peers})
    rows = [{**cell.labels(), "method": DENSE, "role": "dense", **_times(base)}]
    for name, one in series.items():
        role = "vanilla" if name in peers else "rebuilt" if name == REBUILT else "method"
        row = {**cell.labels(), "method": name, "role": role, **_times(one), "to_dense": spread(one.to_reference)}
        row["to_vanilla"] = compared(one, series[best])
        row["to_rebuilt"] = compared(one, series[REBUILT])
        if role == "vanilla":
            row["best"] = name == best
        if role == "method":
            row["execution"] = stand.methods[name].experts.execution
        rows.append(row)
    hit = stand.hit(cell.tokens)
    for row in rows:
        name = row["method"]
        row["error"] = significant(e) if (e := {**peer_errors, **errors}.get(name)) is not None else None
        if cell.backward and row["role"] == "vanilla":
            row["error"] = None  # theirs was taken of the outputs
        row["graph_replay"] = name in graphs
        row["of_roofline"] = significant(_least_seconds(stand, cell, name, row["role"], hit, limits) / row["ms"] * 1e3)
    return rows, why


def _capture(runs: dict[str, Run]) -> set[str]:
    """Replace what can be captured by the replay of its graph; returns what was."""
    graphs = set()
    for name, run in runs.items():
        if name in (*WAITING, REBUILT):
            continue
        try:
            runs[name] = replayed(run)
            graphs.add(name)
        except Exception as error:  # measured as it is then, and its row says so
            torch.cuda.synchronize()
            print(f"  {name} cannot be captured: {error}", file=sys.stderr)
    return graphs


def fastest(peers: dict[str, Series]) -> str:
    """The one with the least median ratio to the reference."""
    return min(peers, key=lambda name: statistics.median(peers[name].to_reference))


def compared(one: Series, other: Series) -> dict[str, float]:
    """Spread of the ratio of two variants, over the rounds in which both ran."""
    return spread([a / b for a, b in zip(one.to_reference, other.to_reference, strict=False)])


def _times(series: Series) -> Row:
    return {
        "ms": significant(series.wall * 1e3),
        "cpu_ms": significant(series.cpu * 1e3),
        "rounds": len(series.samples),
    }


def _least_seconds(stand: Stand, cell: Cell, name: str, role: str, hit: int, limits: Ceilings) -> float:
    shape, mixture, tokens = cell.shape, cell.mixture, cell.tokens
    layer = stand.methods.get(SM if role == "rebuilt" else name)
    work: Work
    if role == "dense":
        work = dense_work(shape, tokens, stand.dtype, backward=cell.backward)
    elif isinstance(layer, SharedBaseMoE):
        work = shared_work(layer, shape, mixture, tokens, stand.dtype, hit, backward=cell.backward)
    else:
        work = vanilla_work(shape, mixture, tokens, stand.dtype, hit, backward=cell.backward)
    return work.seconds(limits, 2 * tokens * shape.hidden * stand.dtype.itemsize)

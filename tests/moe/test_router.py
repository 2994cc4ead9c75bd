import pytest
import torch

from ders.moe import Router, Routing, TopKRouter, load_balancing_loss


def router(top_k: int = 2, num_experts: int = 4, seed: int = 1, **options: object) -> TopKRouter:
    return TopKRouter(16, num_experts, top_k, seed=seed, **options).double()


@pytest.fixture(name="x_TD")
def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 16, dtype=torch.float64) + torch.linspace(0, 1, 16, dtype=torch.float64)


def test_top_2_is_renormalised_and_top_1_is_not(x_TD: torch.Tensor) -> None:
    probs = torch.softmax(x_TD @ router().weight.T, -1)
    two, one = router(2)(x_TD), router(1)(x_TD)
    best = probs.topk(2)
    torch.testing.assert_close(two.top_k_weights_TK, best.values / best.values.sum(-1, keepdim=True))
    assert torch.equal(two.top_k_index_TK, best.indices)
    torch.testing.assert_close(one.top_k_weights_TK, best.values[:, :1])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("renormalize", [None, True, False])
def test_renormalisation_can_be_chosen(top_k: int, renormalize: bool | None, x_TD: torch.Tensor) -> None:
    gate = router(top_k, renormalize=renormalize)
    best = torch.softmax(x_TD @ gate.weight.T, -1).topk(top_k)
    sums_to_one = top_k == 2 if renormalize is None else renormalize
    expected = best.values / best.values.sum(-1, keepdim=True) if sums_to_one else best.values
    routing = gate(x_TD)
    torch.testing.assert_close(routing.top_k_weights_TK, expected)
    assert torch.equal(routing.top_k_index_TK, best.indices)
    assert gate.preserves_function == sums_to_one


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_choice_over_capacity_has_weight_zero_however_renormalised(top_k: int, x_TD: torch.Tensor) -> None:
    gates = {r: router(top_k, renormalize=r, capacity_factor=0.5) for r in (True, False)}
    weights = {r: gate(x_TD).top_k_weights_TK for r, gate in gates.items()}
    assert torch.equal(weights[True] == 0, weights[False] == 0)
    assert (weights[True] == 0).any()
    served = (weights[True] > 0).any(-1)
    torch.testing.assert_close(weights[True].sum(-1), served.double())
    assert not gates[True].preserves_function
    assert gates[True].eval().preserves_function


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_task_reaches_the_router(top_k: int, x_TD: torch.Tensor) -> None:
    gate = router(top_k)
    (gate(x_TD).top_k_weights_TK * torch.randn(64, top_k, dtype=torch.float64)).sum().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("top_k", "factor"), [(1, 0.5), (1, 1.0), (2, 0.5), (2, 0.75), (2, 1.5)])
def test_capacity_drops_what_deepspeed_drops(top_k: int, factor: float, x_TD: torch.Tensor) -> None:
    sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    gate, x_TD = router(top_k, capacity_factor=factor).float(), x_TD.float()  # DeepSpeed's gates are fp32 only
    routing = gate(x_TD)
    logits = (x_TD @ gate.weight.T).detach()
    if top_k == 1:
        loss, combine, *_ = sharded_moe.top1gating(logits, factor, 0, use_rts=False)
    else:
        loss, combine, *_ = sharded_moe.top2gating(logits, factor, 0, top2_2nd_expert_sampling=False)
    theirs_TE = combine.sum(-1)
    ours_TE = torch.zeros_like(theirs_TE).scatter(1, routing.top_k_index_TK, routing.top_k_weights_TK.detach())
    if top_k == 1:  # which of an expert's first choices stay is left to ties there, and to token order here
        assert torch.equal((ours_TE > 0).sum(0), (theirs_TE > 0).sum(0))
    else:
        torch.testing.assert_close(ours_TE, theirs_TE.to(ours_TE))
    torch.testing.assert_close(gate.loss(routing).detach(), loss.to(ours_TE))
    assert (theirs_TE.count_nonzero(1) < top_k).any() or factor == 1.5


def test_capacity_is_off_unless_asked_for_and_differs_in_evaluation(x_TD: torch.Tensor) -> None:
    assert (router()(x_TD).top_k_weights_TK > 0).all()
    gate = router(capacity_factor=0.25)
    assert (gate(x_TD).top_k_weights_TK == 0).any()
    assert (gate.eval()(x_TD).top_k_weights_TK > 0).all()


def test_noise_moves_second_choices_only_and_leaves_weights_noise_free(x_TD: torch.Tensor) -> None:
    plain, noisy = router(), router(second_choice_noise=True)
    first, second = plain(x_TD), noisy(x_TD)
    assert torch.equal(first.top_k_index_TK[:, 0], second.top_k_index_TK[:, 0])
    assert not torch.equal(first.top_k_index_TK[:, 1], second.top_k_index_TK[:, 1])
    assert (second.top_k_index_TK[:, 0] != second.top_k_index_TK[:, 1]).all()
    chosen = second.probs_TE.gather(1, second.top_k_index_TK)
    torch.testing.assert_close(second.top_k_weights_TK, chosen / chosen.sum(-1, keepdim=True))


def test_noise_is_gumbel() -> None:
    # With Gumbel noise the argmax over the rest is a draw from their softmax.
    gate = TopKRouter(3, 3, 2, second_choice_noise=True)
    with torch.no_grad():
        gate.weight.copy_(torch.diag(torch.tensor([5.0, 1.0, 0.0])))
    torch.manual_seed(0)
    second = gate(torch.ones(20_000, 3)).top_k_index_TK[:, 1]
    expected = torch.softmax(torch.tensor([1.0, 0.0]), 0)[0]
    assert abs((second == 1).double().mean() - expected) < 0.015


def test_balanced_loss_is_one_and_collapse_costs() -> None:
    even = torch.full((8, 4), 0.25)
    spread = torch.arange(8)[:, None] % 4
    assert load_balancing_loss(Routing(even, spread, torch.ones(8, 1))).item() == pytest.approx(1)
    collapsed = torch.eye(4)[torch.zeros(8, dtype=torch.int64)]
    assert load_balancing_loss(Routing(collapsed, spread * 0, torch.ones(8, 1))).item() == pytest.approx(4)


def test_padding_has_no_part_in_the_loss(x_TD: torch.Tensor) -> None:
    gate = router()
    mask = torch.arange(64) < 40
    torch.testing.assert_close(gate.loss(gate(x_TD), mask), gate.loss(gate(x_TD[:40])))


def test_weights_stay_in_fp32(x_TD: torch.Tensor) -> None:
    gate = TopKRouter(16, 4, 2)
    before = gate.weight.clone()
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.float32
    assert torch.equal(gate.weight, before)
    routing = gate(x_TD.bfloat16())
    assert routing.probs_TE.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x_TD.bfloat16()).probs_TE, routing.probs_TE)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 4, 5), {}, "top_k must be between 1 and num_experts=4: got 5"),
        ((8, 4, 0), {}, "top_k must be between 1"),
        ((8, 0, 1), {}, "num_experts must be at least 1"),
        ((8, 4, 1), {"second_choice_noise": True}, "top_k=2 only"),
        ((8, 4, 2), {"capacity_factor": 0}, "capacity_factor must be positive"),
    ],
)
def test_bad_dials(arguments: tuple[int, int, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(*arguments, **options)


def test_the_seam_registers_by_name() -> None:
    class FirstExperts(Router):
        def forward(self, x_TD: torch.Tensor) -> Routing:
            index = torch.arange(self.top_k).expand(len(x_TD), -1)
            return Routing(x_TD.new_ones(len(x_TD), self.num_experts), index, torch.ones_like(index).to(x_TD))

    assert Router.known.pop("FirstExperts") is FirstExperts

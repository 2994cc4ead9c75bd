import math

import pytest
import torch

from ders.moe import NoisyMLPRouter, Routing
from ders.moe.noisy import chance_of_choice, squared_variation

E, D, T = 4, 16, 64


@pytest.fixture(name="x_TD")
def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def test_the_code_models_gate_has_the_parameters_its_paper_counts() -> None:
    with torch.device("meta"):
        router = NoisyMLPRouter(2048, 4, 1)
    assert sum(p.numel() for p in router.parameters()) == 16_400  # two of 2048 × 4, one of 4 × 4, no biases


def test_evaluation_is_a_tanh_mlp_and_raw_probabilities(x_TD: torch.Tensor) -> None:
    router = NoisyMLPRouter(D, E, 1, seed=3).eval()
    routing = router(x_TD)
    logits_TE = torch.tanh(x_TD @ router.weight_in.T) @ router.weight_out.T
    torch.testing.assert_close(routing.probs_TE, logits_TE.softmax(-1))
    torch.testing.assert_close(routing.top_k_weights_TK[:, 0], logits_TE.softmax(-1).max(-1).values)
    assert routing.load_TE is None
    assert not router.preserves_function
    assert torch.equal(router(x_TD).probs_TE, routing.probs_TE)


def test_noise_in_training_has_the_learned_size(x_TD: torch.Tensor) -> None:
    router = NoisyMLPRouter(D, E, 1, seed=3)
    clean_TE = router.eval()(x_TD).probs_TE.log()
    router.train()
    torch.manual_seed(0)
    drawn = torch.stack([router(x_TD).probs_TE.log() for _ in range(400)])
    # Log-probabilities are logits up to a constant of the token: differences of two experts have the noise of two.
    noise = (drawn[..., 0] - drawn[..., 1]) - (clean_TE[:, 0] - clean_TE[:, 1])
    assert noise.std().item() == pytest.approx(math.sqrt(2) * (math.log(2) + 1e-2), rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_chance_is_that_of_drawing_one_noise_again(top_k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    clean, deviation = torch.randn(3, E, generator=generator), torch.rand(3, E, generator=generator) + 0.1
    noisy = clean + deviation * torch.randn(3, E, generator=generator)
    chance = chance_of_choice(clean, noisy, deviation, top_k)
    for token in range(3):
        for expert in range(E):
            others = sorted((noisy[token, e].item() for e in range(E) if e != expert), reverse=True)
            again = clean[token, expert] + deviation[token, expert] * torch.randn(40_000, generator=generator)
            chosen = (again > others[top_k - 1]).float().mean()
            assert chance[token, expert].item() == pytest.approx(chosen.item(), abs=0.01)


def test_the_loss_by_hand() -> None:
    # Importance 0.6, 0.2, 0, 0.8 + loads 1, 1, 0, 2 of four tokens; the last token is padding.
    index = torch.tensor([[0], [1], [3], [3], [2]])
    weights = torch.tensor([[0.6], [0.2], [0.5], [0.3], [0.9]])
    routing = Routing(torch.full((5, E), 0.25), index, weights)
    mask = torch.tensor([1, 1, 1, 1, 0])
    importance = torch.tensor([0.6, 0.2, 0.0, 0.8])
    load = torch.tensor([1.0, 1.0, 0.0, 2.0])
    expected = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    loss = NoisyMLPRouter(D, E, 1).loss(routing, mask)
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert squared_variation(torch.ones(E)).item() == 0
    assert squared_variation(torch.ones(1)).item() == 0


def test_task_and_loss_reach_every_weight(x_TD: torch.Tensor) -> None:
    router = NoisyMLPRouter(D, E, 1, seed=3).train()
    routing = router(x_TD)
    (router.loss(routing) + routing.top_k_weights_TK.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


def test_gradients_in_float64() -> None:
    router = NoisyMLPRouter(5, 3, 1, seed=2).double().train()
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        routing = router(x)
        return router.loss(routing) + (routing.probs_TE**2).sum()

    assert torch.autograd.gradcheck(loss, (x, *router.parameters()))


def test_weights_stay_in_fp32_and_follow_the_seed_alone() -> None:
    router = NoisyMLPRouter(D, E, 1, seed=3)
    before = [p.clone() for p in router.parameters()]
    router.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(before, router.parameters(), strict=True))
    torch.manual_seed(99)
    assert torch.equal(NoisyMLPRouter(D, E, 1, seed=3).weight_in, before[0])
    assert not torch.equal(NoisyMLPRouter(D, E, 1, seed=4).weight_in, before[0])

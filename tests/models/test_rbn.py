"""The penalty of regularized batch norm; all else it shares with batch norm, whose tests it passes."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from gptexp.models.batchnorms import RegularizedBatchNorm
from gptexp.models.registry import NormShape, RegularizedBatchNormSettings

N, L, C, BLOCK = 4, 5, 6, 7
EPS, MEAN, STD = 1e-2, 0.3, 0.2  # eps and the weights of the two penalties
BATCH_TIME, BATCH = ["batch", "time"], ["batch"]
both_stats = pytest.mark.parametrize("stats", [BATCH_TIME, BATCH], ids=["batch-time", "batch"])
# Four sequences reach the first two positions, three the third, one the fourth, none the fifth.
MASK = torch.arange(L) < torch.tensor([[4], [3], [3], [2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def rbn(stats: list[str], mean: float = MEAN, std: float = STD) -> RegularizedBatchNorm:
    norm = RegularizedBatchNorm(RegularizedBatchNormSettings(EPS, 0.1, stats, mean, std), NormShape(C, BLOCK)).double()
    norm.running_mean.copy_(random(*norm.running_mean.shape, seed=21))
    norm.running_var.copy_(random(*norm.running_var.shape, seed=22).abs() + 0.1)
    return norm.train()


def penalty_and_gradient(
    x: np.ndarray, mask: np.ndarray, stats: list[str], mean: np.ndarray, var: np.ndarray
) -> tuple[float, np.ndarray]:
    """With the running mean and var of before the step; one group of numbers (a channel, or a position's) at a time."""
    penalty, gradient = 0.0, np.zeros_like(x)
    for c in range(C):
        for t in range(L) if stats == BATCH else [slice(None)]:
            keep = mask[:, t]
            v, r, s = x[:, t, c][keep], *((mean[t, c], var[t, c]) if stats == BATCH else (mean[c], var[c]))
            if v.size < 2:
                continue
            m, deviation, running = v.sum() / v.size, np.sqrt(v.var() + EPS), np.sqrt(s + EPS)
            penalty += MEAN * (m - r) ** 2 + STD * (deviation - running) ** 2
            slope = 2 * MEAN * (m - r) / v.size + 2 * STD * (deviation - running) * (v - m) / (v.size * deviation)
            gradient[:, t, c][keep] = slope
    return penalty, gradient


@both_stats
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_the_penalty_and_its_gradient_are_their_formulas(stats: list[str], mask: Tensor | None) -> None:
    norm, kept = rbn(stats), np.ones((N, L), dtype=bool) if mask is None else mask.numpy()
    for step in range(3):
        before = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
        x = random(N, L, C, seed=step).requires_grad_()
        norm(x, mask)
        norm.penalty.backward()
        penalty, gradient = penalty_and_gradient(x.detach().numpy(), kept, stats, *before)
        assert penalty > 1
        np.testing.assert_allclose(float(norm.penalty.detach()), penalty, rtol=1e-9)
        np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-8, atol=1e-12)
        assert norm.weight.grad is None  # the gain and the bias come after the statistics


def test_positions_without_a_variance_pay_nothing() -> None:
    norm, x = rbn(BATCH), random(N, L, C).requires_grad_()
    norm(x, MASK)
    norm.penalty.backward()
    assert (x.grad.abs().amax((0, 2)) > 0).tolist() == [True, True, True, False, False]
    first = float(norm.penalty.detach())
    norm = rbn(BATCH)
    norm.running_mean[3:] += 100
    norm.running_var[3:] += 100
    norm(x, MASK)
    assert float(norm.penalty.detach()) == first


@both_stats
def test_the_penalty_of_padding_is_nothing(stats: list[str]) -> None:
    x, penalties = random(N, L, C), []
    for content in (0.0, 1e3, float("nan")):
        norm = rbn(stats)
        norm(x.masked_fill(~MASK.unsqueeze(-1), content), MASK)
        penalties.append(float(norm.penalty.detach()))
    assert penalties[0] == penalties[1] == penalties[2]


@both_stats
def test_each_weight_scales_its_own_part(stats: list[str]) -> None:
    x, found = random(N, L, C), {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.25, 4.0), (0.0, 0.0)):
        norm = rbn(stats, *weights)
        y = norm(x)
        torch.testing.assert_close(y, rbn(stats)(x), rtol=0, atol=0)  # the output knows nothing of it
        found[weights] = float(norm.penalty.detach())
    assert found[0.0, 0.0] == 0
    assert found[0.25, 4.0] == pytest.approx(found[1.0, 0.0] / 4 + found[0.0, 1.0] * 4, rel=1e-12)
    assert min(found[1.0, 0.0], found[0.0, 1.0]) > 1


def test_a_batch_with_the_running_statistics_pays_nothing() -> None:
    norm, x = rbn(BATCH_TIME), random(N, L, C)
    norm.running_mean.copy_(x.mean((0, 1)))
    norm.running_var.copy_(x.var((0, 1), unbiased=False))
    norm(x)
    assert float(norm.penalty.detach()) == pytest.approx(0, abs=1e-24)


@both_stats
def test_evaluation_pays_nothing(stats: list[str]) -> None:
    norm = rbn(stats).eval()
    norm(random(N, L, C))
    assert norm.penalty is None
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_a_trained_layer_can_be_copied() -> None:
    norm, x = rbn(BATCH_TIME), random(N, L, C).requires_grad_()
    norm(x)
    other = copy.deepcopy(norm)
    assert other.penalty is None
    assert norm.penalty is not None
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in norm.state_dict().items())
    assert torch.equal(other(x), norm(x))
    assert float(other.penalty.detach()) == float(norm.penalty.detach())

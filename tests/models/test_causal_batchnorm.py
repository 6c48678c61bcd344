"""Causal batch norm against a loop over positions, each of which sees the sequences up to itself alone."""

import pytest
import torch
from torch import Tensor

from gptexp.models.batchnorms import CausalBatchNorm
from gptexp.models.registry import NormShape, RunningSettings

N, L, C, BLOCK = 4, 5, 6, 7
EPS, MOMENTUM = 1e-2, 0.3
MASKS = {
    "unmasked": None,
    "all true": torch.ones(N, L, dtype=torch.bool),
    "rows of many lengths": torch.arange(L) < torch.tensor([[4], [4], [3], [2]]),  # none reaches the last position
    "empty rows": torch.arange(L) < torch.tensor([[5], [0], [0], [3]]),
    "one row": torch.arange(L) < torch.tensor([[5], [0], [0], [0]]),  # the first position has a single value
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def causal() -> CausalBatchNorm:
    """With all of its values away from where they start."""
    norm = CausalBatchNorm(RunningSettings(EPS, MOMENTUM), NormShape(C, BLOCK)).double()
    with torch.no_grad():
        norm.weight.copy_(random(C, seed=11))
        norm.bias.copy_(random(C, seed=12))
        norm.running_mean.copy_(random(BLOCK, C, seed=13))
        norm.running_var.copy_(random(BLOCK, C, seed=14).abs() + 0.1)
    return norm.train()


class Naive(torch.nn.Module):
    """One position and one channel at a time, the numbers it sees gathered one by one."""

    def __init__(self, norm: CausalBatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(p.detach().clone()) for p in (norm.weight, norm.bias))
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = []
        for t in range(x.shape[1]):
            columns = []
            for c in range(C):
                seen = [x[n, s, c] for n in range(len(x)) for s in range(t + 1) if mask is None or mask[n, s]]
                mean, var = self.mean[t, c].clone(), self.var[t, c].clone()
                if len(seen) > 1:
                    mean = sum(seen) / len(seen)
                    var = sum((v - mean) ** 2 for v in seen) / len(seen)
                    self.mean[t, c] = (1 - MOMENTUM) * self.mean[t, c] + MOMENTUM * mean.detach()
                    unbiased = sum((v - mean) ** 2 for v in seen).detach() / (len(seen) - 1)
                    self.var[t, c] = (1 - MOMENTUM) * self.var[t, c] + MOMENTUM * unbiased
                columns.append((x[:, t, c] - mean) / torch.sqrt(var + EPS) * self.weight[c] + self.bias[c])
            rows.append(torch.stack(columns, -1))
        return torch.stack(rows, 1)


@every_mask
def test_training_is_the_loop(mask: Tensor | None) -> None:
    ours = causal()
    theirs = Naive(ours)
    keep = torch.ones(N, L, dtype=torch.bool) if mask is None else mask
    for step in range(3):
        x, g, results = random(N, L, C, seed=step), random(N, L, C, seed=50 + step)[keep], []
        for norm in (ours, theirs):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            y = norm(leaf, mask)[keep]
            (y * g).sum().backward()
            results.append([y, leaf.grad, norm.weight.grad, norm.bias.grad])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.running_mean, theirs.mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.var, rtol=1e-10, atol=1e-12)
    fresh = causal()  # positions beyond the batch have learned nothing
    assert torch.equal(ours.running_mean[L:], fresh.running_mean[L:])
    assert torch.equal(ours.running_var[L:], fresh.running_var[L:])


@pytest.mark.parametrize("length", [1, 3, BLOCK])
def test_evaluation_uses_the_running_averages_of_each_position(length: int) -> None:
    norm, x = causal().eval(), random(N, length, C)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    y = norm(x)
    for t in range(length):
        scale = torch.sqrt(norm.running_var[t] + EPS)
        torch.testing.assert_close(y[:, t], (x[:, t] - norm.running_mean[t]) / scale * norm.weight + norm.bias)
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    assert state["running_mean"].shape == state["running_var"].shape == (BLOCK, C)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_later_positions_never_change_earlier_outputs(mode: str) -> None:
    x = random(N, L, C)
    base = causal().train(mode == "train")(x)
    for t in range(L - 1):
        for change in (random(N, L - t - 1, C, seed=7), 1e6):
            other = x.clone()
            other[:, t + 1 :] += change
            assert torch.equal(causal().train(mode == "train")(other)[:, : t + 1], base[:, : t + 1])
        assert not torch.allclose(causal().train(mode == "train")(other)[:, t + 1 :], base[:, t + 1 :])


def test_no_gradient_reaches_later_positions() -> None:
    for t in range(L):
        x = random(N, L, C).requires_grad_()
        causal()(x)[0, t].square().sum().backward()
        reached = x.grad.abs().amax(-1) > 0
        assert not bool(reached[:, t + 1 :].any())
        assert bool(reached[:, : t + 1].all())  # but all sequences, at all positions so far


def test_the_last_position_has_the_statistics_of_batch_norm() -> None:
    norm, x = causal(), random(N, L, C)
    theirs = torch.nn.BatchNorm1d(C, eps=EPS).double()
    theirs.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    torch.testing.assert_close(norm(x)[:, -1], theirs(x.transpose(1, 2))[..., -1])


def test_a_batch_of_one_works() -> None:
    """Its first position has a single value, so it is normalised as in evaluation."""
    norm, x = causal(), random(1, L, C).requires_grad_()
    before = norm.running_mean.clone(), norm.running_var.clone()
    expected = norm.eval()(x)[:, 0]
    y = norm.train()(x)
    torch.testing.assert_close(y[:, 0], expected)
    for buffer, old in zip((norm.running_mean, norm.running_var), before, strict=True):
        assert torch.equal(buffer[0], old[0])
        assert bool((buffer[1:L] != old[1:L]).all())
    y.square().sum().backward()
    assert bool(x.grad.isfinite().all())
    torch.testing.assert_close(causal()(x), Naive(causal())(x))


def test_a_single_value_has_no_variance() -> None:
    for mask in (None, torch.ones(1, 1, dtype=torch.bool)):
        norm = causal()
        before = norm.running_mean.clone()
        with pytest.raises(ValueError, match="no variance over fewer than two values: use a larger batch_size"):
            norm(random(1, 1, C), mask)
        assert torch.equal(norm.running_mean, before)
        assert norm.eval()(random(1, 1, C), mask).isfinite().all()


@pytest.mark.parametrize("content", [0.0, 1e3, 1e300, float("inf"), float("nan")])
def test_the_content_of_padding_changes_nothing(content: float) -> None:
    mask, results = MASKS["rows of many lengths"], []
    for fill in (5.0, content):
        norm = causal()
        x = random(N, L, C).masked_fill(~mask.unsqueeze(-1), fill).requires_grad_()
        y = norm(x, mask)[mask]
        y.square().sum().backward()
        results.append([y, x.grad, norm.weight.grad, norm.running_mean, norm.running_var])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_large_mean_does_not_cost_the_variance_in_float32() -> None:
    """The variance of 1 around 1000, where float32 has squares to within 0.06, once the running mean is near."""
    norm = CausalBatchNorm(RunningSettings(), NormShape(C, L))
    for step in range(100):
        x = torch.randn(8, L, C, generator=torch.Generator().manual_seed(step)) + 1000
        y = norm(x).detach()
    wide = x.double()
    for t in range(L):
        seen = wide[:, : t + 1].flatten(0, 1)
        expected = (wide[:, t] - seen.mean(0)) / torch.sqrt(seen.var(0, unbiased=False) + 1e-5)
        torch.testing.assert_close(y[:, t].double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.running_mean, torch.full((L, C), 1000.0), rtol=0, atol=1.0)
    assert float((norm.running_var[-1] - 1).abs().max()) < 1  # a hundred batches have forgotten the first, bad ones

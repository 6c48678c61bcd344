"""The bigram table and the MLP, against loops and counts that can be checked by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gptexp.models.baselines import MLP, Bigram, BigramConfig, MLPConfig
from gptexp.models.settings import build_model
from gptexp.registry import NORMS
from tests.models.conftest import assert_close, moved, norm_settings

V, BLOCK, L, K = 11, 8, 7, 3
NAMES = {"vocab_size": 27, "context": 3, "n_embd": 16, "n_hidden": 256}
MASK = torch.arange(L) < torch.tensor([[7], [5], [3], [2]])


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def mlp(**changes: Any) -> MLP:
    sizes = {"vocab_size": V, "block_size": BLOCK, "context": K, "n_embd": 4, "n_hidden": 12}
    return moved(MLP(MLPConfig(**{**sizes, **changes}))).double()


def bigram() -> Bigram:
    return moved(Bigram(BigramConfig(vocab_size=V, block_size=BLOCK))).double()


# --- bigram ------------------------------------------------------------------------------------------------------


def test_bigram_logits_are_rows_of_its_table() -> None:
    model, ids = bigram(), random_ids(3, L)
    logits = model(ids, torch.ones(3, L, dtype=torch.bool))
    assert model.n_params == V * V
    assert all(torch.equal(logits[n, t], model.wte.weight[ids[n, t]]) for n in range(3) for t in range(L))


@pytest.mark.parametrize(("init", "deviation"), [("gpt2", 0.02), ("torch", 1.0)])
def test_bigram_initial_values(init: str, deviation: float) -> None:
    first, again, other = (Bigram(BigramConfig(vocab_size=80, init=init), seed).wte.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert float(first.detach().std()) == pytest.approx(deviation, rel=0.04)
    assert abs(float(first.detach().mean())) < 4 * deviation / 80


# --- MLP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "count"),
    [
        ("none", 19_915),  # 27·16 + (48·256 + 256) + (256·27 + 27)
        ("batchnorm", 20_427),  # and a gain and a bias for each hidden unit
        ("layernorm", 20_427),
        ("rmsnorm", 20_171),
    ],
)
def test_published_parameter_counts(norm: str, count: int) -> None:
    model = MLP(MLPConfig(**NAMES, norm=norm))
    assert model.n_params == count == sum(p.numel() for p in model.parameters())


def naive(model: MLP, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The logits, with the symbols before each position gathered one by one."""
    c = model.config
    past = [[[int(row[t - k]) if t >= k else 0 for k in reversed(range(c.context))] for t in range(L)] for row in ids]
    h = model.wte.weight[torch.tensor(past)].flatten(2)  # symbol 0 comes before the first
    for i, (linear, norm) in enumerate(zip(model.hidden, model.norms, strict=True)):
        y = torch.tanh(norm(h @ linear.weight.T + linear.bias, mask))
        h = h + y if c.residual and i > 0 else y
    return h @ model.head.weight.T + model.head.bias


def test_parameters_of_the_lecture_makemore() -> None:
    sizes = {"vocab_size": 27, "block_size": 3, "n_embd": 10, "n_hidden": 200}
    assert MLP(MLPConfig(**sizes)).n_params == 11_897  # 27·10 + (30·200 + 200) + (200·27 + 27)
    assert MLP(MLPConfig(**sizes, norm="batchnorm", bias=False)).n_params == 12_097


def test_mlp_initial_values_that_are_chosen() -> None:
    config = MLPConfig(vocab_size=200, context=4, n_embd=32, n_hidden=400, hidden_std=0.5, head_std=2.0, bias_std=0.3)
    found = {name: float(p.detach().std()) for name, p in MLP(config, 3).named_parameters()}
    assert found == pytest.approx({"wte.weight": 1.0, "hidden.0.weight": 0.5, "hidden.0.bias": 0.3, "head.weight": 2.0,
                                   "head.bias": 0.3}, rel=0.12)  # fmt: skip


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize(
    "changes",
    [
        {"context": 1}, {"context": 5}, {"n_layer": 3}, {"n_layer": 3, "residual": True},
        {"n_layer": 2, "norm": "batchnorm"}, {"n_layer": 2, "norm": "batchnorm[batch]", "residual": True},
    ],
    ids=str,
)  # fmt: skip
def test_mlp_is_its_formula(changes: dict, mask: Tensor | None) -> None:
    ids, name = random_ids(4, L), changes.get("norm", "none")
    model, same = (mlp(**changes | dict(zip(("norm", "norms"), norm_settings(name), strict=True))) for _ in range(2))
    keep = torch.ones(4, L, dtype=torch.bool) if mask is None else mask
    for training in (True, False):
        mine, other = model.train(training)(ids, mask), naive(same.train(training), ids, mask)
        torch.testing.assert_close(mine[keep], other[keep])
    assert_close(dict(model.named_buffers()), dict(same.named_buffers()))


def test_mlp_initial_values() -> None:
    """Embeddings of deviation 1, hidden layers of 5/3 over the root of their inputs, a head of 0.01."""
    config = MLPConfig(vocab_size=200, context=4, n_embd=32, n_hidden=256, n_layer=2, norm="batchnorm")
    first, again, other = (dict(MLP(config, seed).named_parameters()) for seed in (3, 3, 4))
    deviations = {
        "wte.weight": 1.0, "head.weight": 0.01,
        "hidden.0.weight": 5 / 3 / math.sqrt(4 * 32), "hidden.1.weight": 5 / 3 / math.sqrt(256),
    }  # fmt: skip
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(deviations[name], rel=0.03), name
            assert not torch.equal(p, other[name])
        else:
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name
    assert deviations.keys() == {name for name, p in first.items() if p.ndim == 2}
    shared = dict(MLP(MLPConfig(vocab_size=200, context=4, n_embd=32, n_hidden=256), 3).named_parameters())
    assert all(torch.equal(p, first[name]) for name, p in shared.items())  # whatever the norm and the depth


# --- both --------------------------------------------------------------------------------------------------------

MODELS = {
    "bigram": bigram,
    "mlp": mlp,
    "mlp-deep": lambda: mlp(n_layer=3, residual=True, norm="layernorm"),
    "mlp-causal_batchnorm": lambda: mlp(norm="causal_batchnorm"),
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_generate_is_a_loop_of_argmax(name: str) -> None:
    """Also past the block; and each prompt as if alone."""
    model, expected = MODELS[name](), []
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4, 5]]  # the last is longer than the block
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids[-BLOCK:]]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert model.generate(prompts, 12, temperature=0) == expected
    assert model.train().generate(prompts, 12, temperature=0) == expected


@pytest.mark.parametrize(
    ("config", "kind", "label"),
    [(BigramConfig(vocab_size=V), Bigram, "bigram"), (MLPConfig(vocab_size=V, norm="rmsnorm"), MLP, "mlp-rmsnorm")],
    ids=["bigram", "mlp"],
)
def test_a_configuration_builds_its_model(config: BigramConfig | MLPConfig, kind: type, label: str) -> None:
    model = build_model(config, 5)
    assert type(model) is kind
    assert model.config == config
    assert (config.label, config.tags) == (label, label.split("-"))
    again = kind(config, 5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@every_model
def test_flops_per_token_is_what_torch_counts(name: str) -> None:
    model, ids = MODELS[name](), random_ids(4, L)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert model.flops_per_token() == counter.get_total_flops() / ids.numel()
    assert (model.flops_per_token() == 0) == (name == "bigram")


@pytest.mark.parametrize("norm", NORMS.defaults())
def test_every_norm_learns_with_every_parameter(norm: str) -> None:
    model, ids = mlp(norm=norm, n_layer=2).train(), random_ids(4, L)
    F.cross_entropy(model(ids, MASK)[MASK], ids[MASK]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name  # noqa: PT018

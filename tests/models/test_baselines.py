"""The bigram table and the MLP, against loops and counts that can be checked by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gptexp.models.baselines import MLP, Bigram
from gptexp.models.language_model import LanguageModel
from gptexp.models.registry import default_norms
from gptexp.models.settings import BigramConfig, MLPConfig, build_model

V, BLOCK, L, K = 11, 8, 7, 3
NAMES = {"vocab_size": 27, "context": 3, "n_embd": 16, "n_hidden": 256}
MASK = torch.arange(L) < torch.tensor([[7], [5], [3], [2]])


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def lively(model: LanguageModel) -> Any:
    """In float64 and eval mode, with every value away from where it starts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0.0, 0.3, generator=generator))
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(torch.empty(b.shape).uniform_(0.0, 0.5, generator=generator))
    return model.double().eval()


def mlp(**changes: Any) -> MLP:
    sizes = {"vocab_size": V, "block_size": BLOCK, "context": K, "n_embd": 4, "n_hidden": 12}
    return lively(MLP(MLPConfig(**{**sizes, **changes})))


def bigram() -> Bigram:
    return lively(Bigram(BigramConfig(vocab_size=V, block_size=BLOCK)))


# --- bigram ------------------------------------------------------------------------------------------------------


def test_bigram_logits_are_rows_of_its_table() -> None:
    model, ids = bigram(), random_ids(3, L)
    logits = model(ids, torch.ones(3, L, dtype=torch.bool))
    assert logits.shape == (3, L, V)
    assert model.n_params == V * V
    for n in range(3):
        for t in range(L):
            assert logits[n, t].tolist() == model.wte.weight[ids[n, t]].tolist()


@pytest.mark.parametrize(("init", "deviation"), [("gpt2", 0.02), ("torch", 1.0)])
def test_bigram_initial_values(init: str, deviation: float) -> None:
    first, again, other = (Bigram(BigramConfig(vocab_size=80, init=init), seed).wte.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert float(first.detach().std()) == pytest.approx(deviation, rel=0.04)
    assert abs(float(first.detach().mean())) < 4 * deviation / 80


def test_the_best_bigram_has_the_frequencies_of_pairs() -> None:
    """Where softmax of a row is the distribution of what follows its symbol, the loss is at its minimum."""
    ids = torch.tensor([[0, 1, 0, 1, 0, 2, 0, 1, 0, 2]])
    model = Bigram(BigramConfig(vocab_size=3)).double()
    frequencies = torch.tensor([[0, 3 / 5, 2 / 5], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    model.wte.weight.data.copy_((frequencies + 1e-30).log())
    loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(3 * math.log(3 / 5) + 2 * math.log(2 / 5)) / 9)
    assert float(model.wte.weight.grad.abs().max()) < 1e-15


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


def naive(model: MLP, ids: Tensor, n: int, t: int) -> Tensor:
    """The logits after one position, without a norm."""
    c, symbols = model.config, []
    for back in reversed(range(c.context)):
        symbols.append(int(ids[n, t - back]) if t - back >= 0 else 0)  # symbol 0 before the first
    h = torch.cat([model.wte.weight[s] for s in symbols])
    for i, linear in enumerate(model.hidden):
        y = torch.tanh(linear.weight @ h + linear.bias)
        h = h + y if c.residual and i > 0 else y
    return model.head.weight @ h + model.head.bias


@pytest.mark.parametrize("context", [1, 3, 5])
@pytest.mark.parametrize(("n_layer", "residual"), [(1, False), (3, False), (3, True)])
def test_mlp_is_its_formula_at_every_position(context: int, n_layer: int, residual: bool) -> None:
    model = mlp(context=context, n_layer=n_layer, residual=residual)
    ids = random_ids(2, L)
    logits = model(ids)
    assert logits.shape == (2, L, V)
    for n in range(2):
        for t in range(L):
            torch.testing.assert_close(logits[n, t], naive(model, ids, n, t))


def test_before_the_first_symbol_stands_symbol_0() -> None:
    model, ids = mlp(), random_ids(2, L)
    torch.testing.assert_close(model(F.pad(ids, (K, 0)))[:, K:], model(ids))


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("residual", [False, True])
def test_batch_norm_stands_before_the_tanh_and_knows_no_padding(mask: Tensor | None, residual: bool) -> None:
    """Against nn.BatchNorm1d on the positions that are no padding."""
    model, ids = mlp(norm="batchnorm", n_layer=2, residual=residual).train(), random_ids(4, L)
    keep = torch.ones(4, L, dtype=torch.bool) if mask is None else mask
    theirs = [nn.BatchNorm1d(12).double() for _ in range(2)]
    for norm, other in zip(model.norms, theirs, strict=True):
        other.load_state_dict(norm.state_dict(), strict=False)

    def expected(train: bool) -> Tensor:
        past = torch.stack([F.pad(ids, (K - 1, 0))[:, i : i + L] for i in range(K)], -1)  # (N, L, K)
        h = model.wte.weight[past][keep].flatten(1)  # (rows, K C)
        for i, (linear, norm) in enumerate(zip(model.hidden, theirs, strict=True)):
            y = torch.tanh(norm.train(train)(h @ linear.weight.T + linear.bias))
            h = h + y if residual and i else y
        return h @ model.head.weight.T + model.head.bias

    torch.testing.assert_close(model(ids, mask)[keep], expected(train=True))
    for norm, other in zip(model.norms, theirs, strict=True):
        torch.testing.assert_close(norm.running_mean, other.running_mean)
        torch.testing.assert_close(norm.running_var, other.running_var)
    torch.testing.assert_close(model.eval()(ids, mask)[keep], expected(train=False))


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
    "mlp-batchnorm": lambda: mlp(norm="batchnorm"),
    "mlp-causal_batchnorm": lambda: mlp(norm="causal_batchnorm"),
    "mlp-powernorm": lambda: mlp(norm="powernorm"),
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_an_output_depends_on_the_last_symbols_alone(name: str) -> None:
    model, ids, context = MODELS[name](), random_ids(2, L), 1 if name == "bigram" else K
    base = model(ids)
    for t in range(L):
        for change in range(L):
            other = ids.clone()
            other[0, change] = (ids[0, change] + 3) % V
            seen = t - context < change <= t
            assert bool((model(other)[0, t] != base[0, t]).any()) == seen
        (grad,) = torch.autograd.grad(model(ids)[0, t].square().sum(), model.wte.weight)
        used = set(ids[0, max(t - context + 1, 0) : t + 1].tolist()) | ({0} if t < context - 1 else set())
        assert set(grad.abs().sum(-1).nonzero().flatten().tolist()) == used


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
    sample = model.generate(prompts, 12, seed=3)
    assert model.generate(prompts[:1], 12, seed=3)[0] == sample[0]
    assert model.generate(prompts, 12, seed=4) != sample


@pytest.mark.parametrize(
    ("config", "kind", "label"),
    [
        (BigramConfig(vocab_size=V), Bigram, "bigram"),
        (MLPConfig(vocab_size=V, norm="rmsnorm"), MLP, "mlp-rmsnorm"),
    ],
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


@pytest.mark.parametrize("norm", default_norms())
def test_every_norm_learns_with_every_parameter(norm: str) -> None:
    model, ids = mlp(norm=norm, n_layer=2).train(), random_ids(4, L)
    F.cross_entropy(model(ids, MASK)[MASK], ids[MASK]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name  # noqa: PT018

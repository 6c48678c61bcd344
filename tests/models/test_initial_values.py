"""The initial values of the parameters: their sizes, and what they depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.positions import NOTHING
from gptexp.registry import ACTIVATIONS, PLACEMENTS, POSITIONS
from tests.models.conftest import NORM_VARIANTS

Small = Callable[..., GPTConfig]
CHANGES = [
    *({"norm": norm} for norm in NORM_VARIANTS),
    *({"position": position} for position in POSITIONS),
    *({"activation": activation} for activation in ACTIVATIONS),
    *({"placement": placement} for placement in PLACEMENTS if placement != "deepnorm"),
    {"final_norm": False}, {"qk_norm": "head"}, {"qk_norm": "full"}, {"attention_scale": False}, {"residual": False},
    {"n_inner": 32}, {"n_layer": 5}, {"n_head": 8}, {"bias": True}, {"qkv_bias": True}, {"tie_weights": False},
    {"ngram": 3}, {"dropout": 0.3}, {"vocab_size": 12}, {"block_size": 9},
]  # fmt: skip


def values(config: GPTConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in GPT(config, seed).named_parameters()}


@pytest.mark.parametrize("init", ["gpt2", "torch"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_variant_shares_every_initial_value_that_it_can(small: Small, changes: dict, init: str) -> None:
    """Whatever the state of torch's own random numbers."""
    torch.manual_seed(1)
    base = values(small(init=init))
    torch.manual_seed(2)
    other = values(small(init=init, **changes))
    shared = [n for n in base if n in other and base[n].shape == other[n].shape]
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight"} <= set(shared)
    for name in shared:
        depth = changes.get("n_layer", 2) / 2 if name.endswith("proj.weight") and init == "gpt2" else 1.0
        torch.testing.assert_close(other[name] * math.sqrt(depth), base[name], rtol=1e-6, atol=0.0, msg=name)


@pytest.mark.parametrize("changes", [{"init": "xavier"}, {"placement": "deepnorm"}], ids=str)
def test_other_sizes_are_of_the_same_numbers(small: Small, changes: dict) -> None:
    first, second = values(small(), 3), values(small(**changes), 3)
    for name, p in first.items():
        if p.ndim == 2:
            for ours, theirs in zip(p.split(16), second[name].split(16), strict=True):  # queries, keys, values
                torch.testing.assert_close(theirs / ours, (theirs / ours)[:1, :1].expand_as(ours))


@pytest.mark.parametrize("init", ["gpt2", "torch", "xavier"])
def test_initial_values_follow_the_seed_and_the_name(small: Small, init: str) -> None:
    first, other = values(small(init=init), seed=5), values(small(init=init), seed=6)
    for name in [name for name, p in first.items() if p.ndim == 2]:
        assert not torch.isclose(first[name], other[name]).all()
    a, b = first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"]
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.15


C, V = 192, 400
SIZES = {
    # residual: the two projections of each block back to the residual stream; fan: Glorot and Bengio's
    "gpt2": lambda fan, residual, n: 0.02 / math.sqrt(2 * n) if residual else 0.02,
    "xavier": lambda fan, residual, n: math.sqrt(2 / fan),
    "deepnorm": lambda fan, residual, n: math.sqrt(2 / fan) * (8 * n) ** -0.25,
}
OUTSIDE = {"gpt2": (0.02, 0.02), "xavier": (C**-0.5, math.sqrt(2 / (C + V))), "deepnorm": (0.02, 0.02)}


@pytest.mark.parametrize("n_layer", [1, 4])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", SIZES)
def test_the_size_of_initial_values(kind: str, activation: str, n_layer: int) -> None:
    """Of GPT-2, of Glorot and Bengio, and of DeepNet, whose gain is (8 n_layer)^(-1/4), but 1 for queries and keys."""
    changes = {"placement": "deepnorm"} if kind == "deepnorm" else {"init": kind}
    config = GPTConfig(n_layer=n_layer, n_embd=C, n_inner=4 * C, vocab_size=V, bias=True, tie_weights=False,
                       activation=activation, **changes)  # fmt: skip
    parameters, (embedding, head) = values(config, 3), OUTSIDE[kind]
    expected = {"wte.weight": embedding, "wpe.weight": embedding, "head.weight": head}
    for i in range(n_layer):
        qkv = parameters.pop(f"blocks.{i}.attn.qkv.weight")
        parameters |= {f"blocks.{i}.{name}": part for name, part in zip("qkv", qkv.split(C), strict=True)}
        for name, fan in {"q": 2, "k": 2, "v": 2, "attn.proj.weight": 2, "mlp.fc.weight": 5, "mlp.gate.weight": 5,
                          "mlp.proj.weight": 5}.items():  # fmt: skip
            size = SIZES["xavier" if kind == "deepnorm" and name in "qk" else kind]
            expected[f"blocks.{i}.{name}"] = size(fan * C, "proj" in name, n_layer)
    for name, p in parameters.items():
        if p.ndim == 2:
            assert float(p.std()) == pytest.approx(expected[name], rel=0.03), name
            assert abs(float(p.mean())) < 5 * expected[name] / math.sqrt(p.numel()), name
            assert float(p.abs().max()) > 3.5 * expected[name]  # normal, not uniform
        else:
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name


def test_init_torch_has_the_distributions_of_torch() -> None:
    """Uniform between -1/sqrt(inputs) and 1/sqrt(inputs), weights and biases; embeddings are standard normal."""
    config = GPTConfig(n_layer=2, n_embd=C, vocab_size=100, block_size=128, bias=True, tie_weights=False, init="torch")
    model, seen = GPT(config), set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for key, p in module.named_parameters(recurse=False):
                seen.add(f"{prefix}.{key}")
                ours = p.detach().flatten()
                enough = 4 / math.sqrt(len(ours))
                bound = module.in_features**-0.5 if isinstance(module, nn.Linear) else math.inf
                deviation = 1.0 if bound == math.inf else bound / math.sqrt(3)
                assert float(ours.std()) == pytest.approx(deviation, rel=enough), prefix
                assert abs(float(ours.mean())) < deviation * enough
                largest = float(ours.abs().max())
                assert largest > 3.5 if bound == math.inf else bound * (1 - 10 / len(ours)) < largest <= bound
    for name, p in model.named_parameters():
        assert name in seen or bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name


def test_with_init_torch_a_tied_head_is_the_normal_embedding(small: Small) -> None:
    tied, untied = (GPT(small(init="torch", tie_weights=tie, vocab_size=500)) for tie in (True, False))
    assert tied.head.weight is tied.wte.weight
    assert torch.equal(tied.wte.weight, untied.wte.weight)


def test_an_untrained_model_guesses_evenly() -> None:
    model, ids = GPT(GPTConfig()), torch.arange(128).view(2, 64) % 65
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    assert float(loss.detach()) == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("init", ["gpt2", "torch", "xavier"])
def test_with_zero_init_each_block_is_at_first_the_identity(small: Small, init: str) -> None:
    plain, zeroed = values(small(init=init)), values(small(init=init, zero_init=True))
    for name, p in zeroed.items():
        assert torch.equal(p, torch.zeros_like(p) if name.endswith("proj.weight") else plain[name]), name
    model, x = GPT(small(init=init, zero_init=True)), torch.randn(2, 8, 16)
    assert all(torch.equal(block(x, None, NOTHING), x) for block in model.blocks)

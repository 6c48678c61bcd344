"""The initial values of the parameters: their sizes, and what they depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.gpt import GPT
from gptexp.models.registry import NORMS, PLACEMENTS
from gptexp.models.settings import ACTIVATIONS, POSITIONS, GPTConfig

NORM_VARIANTS = [*NORMS, "batchnorm[batch]", "rbn[batch]", "powernorm[batch]"]
Small = Callable[..., GPTConfig]


def values(config: GPTConfig, seed: int = 0) -> dict[str, Tensor]:
    return dict(GPT(config, seed).named_parameters())


VARIANTS = [
    *({"norm": norm} for norm in NORM_VARIANTS),
    *({"position": position} for position in POSITIONS),
    *({"activation": activation} for activation in ACTIVATIONS),
    *({"placement": placement} for placement in PLACEMENTS if placement != "deepnorm"),
    {"final_norm": False},
    {"qk_norm": "head"},
    {"qk_norm": "full"},
    {"attention_scale": False},
    {"residual": False},
    {"n_inner": 32},
    {"n_layer": 5},
    {"n_head": 8},
    {"bias": True},
    {"qkv_bias": True},
    {"tie_weights": False},
    {"ngram": 3},
    {"dropout": 0.3},
    {"vocab_size": 12},
    {"block_size": 9},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_variant_shares_every_initial_value_that_it_can(small: Small, changes: dict) -> None:
    base, other = values(small()), values(small(**changes))
    shared = [n for n in base if n in other and base[n].shape == other[n].shape]
    matrices = [n for n in shared if base[n].ndim == 2]
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight"} <= set(matrices)
    for name in shared:
        depth = math.sqrt(changes.get("n_layer", 2) / 2) if name.endswith("proj.weight") else 1.0
        torch.testing.assert_close(other[name] * depth, base[name], rtol=1e-6, atol=0.0, msg=name)


def test_initial_values_follow_the_seed_and_the_name_and_nothing_else(small: Small) -> None:
    torch.manual_seed(1)
    first = values(small(), seed=5)
    torch.manual_seed(2)
    again, other = values(small(), seed=5), values(small(), seed=6)
    matrices = [name for name, p in first.items() if p.ndim == 2]
    for name in first:
        assert torch.equal(first[name], again[name])
    for name in matrices:
        assert not torch.isclose(first[name], other[name]).all()
    a, b = first["blocks.0.attn.qkv.weight"].detach(), first["blocks.1.attn.qkv.weight"].detach()
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.15


@pytest.mark.parametrize("n_layer", [1, 3, 8])
def test_the_size_of_initial_values(n_layer: int) -> None:
    """GPT-2: 0.02, and 0.02 / sqrt(2 n_layer) for the two projections of each block back to the residual stream."""
    config = GPTConfig(n_layer=n_layer, n_embd=192, vocab_size=100, bias=True, tie_weights=False)
    seen = 0
    for name, p in values(config).items():
        if p.ndim == 2:
            residual = name.endswith(("attn.proj.weight", "mlp.proj.weight"))
            seen += residual
            std = 0.02 / math.sqrt(2 * n_layer) if residual else 0.02
            assert float(p.detach().std()) == pytest.approx(std, rel=0.03), name
            assert abs(float(p.detach().mean())) < 5 * std / math.sqrt(p.numel()), name
        else:
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name
    assert seen == 2 * n_layer


def test_an_untrained_model_guesses_evenly() -> None:
    model, ids = GPT(GPTConfig()), torch.arange(128).view(2, 64) % 65
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    assert float(loss.detach()) == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("init", ["gpt2", "torch", "xavier"])
def test_with_zero_init_each_block_is_at_first_the_identity(small: Small, init: str) -> None:
    plain, zeroed = values(small(init=init)), values(small(init=init, zero_init=True))
    for name, p in zeroed.items():
        expected = torch.zeros_like(p) if name.endswith("proj.weight") else plain[name]
        assert torch.equal(p, expected), name
    model, x = GPT(small(init=init, zero_init=True)), torch.randn(2, 8, 16)
    assert all(torch.equal(block(x, None, None), x) for block in model.blocks)


# --- where two placements have the same parameters ----------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm", "dyt"])
@pytest.mark.parametrize("init", ["gpt2", "torch"])
def test_parameters_shared_by_two_placements_start_equal(small: Small, norm: str, init: str) -> None:
    models = {p: values(small(norm=norm, placement=p, init=init), 3) for p in PLACEMENTS if p != "deepnorm"}
    for name, first in models.items():
        for second in models.values():
            shared = first.keys() & second.keys()
            assert len([key for key in shared if first[key].ndim == 2]) == 2 + 4 * 2  # all embeddings and matrices
            assert all(torch.equal(first[key], second[key]) for key in shared), name


def test_deepnorm_draws_the_same_numbers_in_other_sizes(small: Small) -> None:
    first, second = values(small(), 3), values(small(placement="deepnorm"), 3)
    for key in first:
        if key in ("wte.weight", "wpe.weight"):
            assert torch.equal(first[key], second[key])
        elif key.endswith("qkv.weight"):
            for i in range(3):
                ratio = second[key][16 * i : 16 * (i + 1)] / first[key][16 * i : 16 * (i + 1)]
                torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
        elif first[key].ndim == 2:
            ratio = second[key] / first[key]
            torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


@pytest.mark.parametrize("n_layer", [1, 4])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_deepnorm_has_the_initial_values_of_deepnet(n_layer: int, activation: str) -> None:
    """Xavier normal with a gain of (8 n_layer)^(-1/4), but 1 for queries and keys; all else is GPT-2's."""
    C, beta = 192, (8 * n_layer) ** -0.25
    config = GPTConfig(n_layer=n_layer, n_embd=C, n_inner=4 * C, vocab_size=100, bias=True, tie_weights=False,
                       placement="deepnorm", activation=activation)  # fmt: skip
    parameters = {name: p.detach() for name, p in values(config).items()}
    stds = {"wte.weight": 0.02, "wpe.weight": 0.02, "head.weight": 0.02}
    for i in range(n_layer):
        qkv = parameters.pop(f"blocks.{i}.attn.qkv.weight")
        parameters |= {f"blocks.{i}.{name}": part for name, part in zip("qkv", qkv.split(C), strict=True)}
        square, wide = math.sqrt(2 / (C + C)), math.sqrt(2 / (C + 4 * C))
        stds |= {f"blocks.{i}.{name}": std for name, std in {
            "q": square, "k": square, "v": beta * square, "attn.proj.weight": beta * square,
            "mlp.fc.weight": beta * wide, "mlp.gate.weight": beta * wide, "mlp.proj.weight": beta * wide,
        }.items() if activation == "swiglu" or "gate" not in name}  # fmt: skip
    assert stds.keys() == {name for name, p in parameters.items() if p.ndim == 2}
    for name, p in parameters.items():
        if name in stds:
            assert float(p.std()) == pytest.approx(stds[name], rel=0.02), name
            assert abs(float(p.mean())) < 5 * stds[name] / math.sqrt(p.numel()), name
            assert float(p.abs().max()) > 3.5 * stds[name]  # normal, not uniform
        else:
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name


# --- init=torch --------------------------------------------------------------------------------------------------


def test_init_torch_has_the_distributions_of_torch() -> None:
    """Uniform between -1/sqrt(inputs) and 1/sqrt(inputs), weights and biases; embeddings are standard normal."""
    C = 192
    config = GPTConfig(n_layer=2, n_embd=C, vocab_size=100, block_size=128, bias=True, tie_weights=False, init="torch")
    model, seen = GPT(config), set()
    torch.manual_seed(0)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            theirs = dict(type(module)(*module.weight.T.shape if isinstance(module, nn.Linear) else module.weight.shape)
                          .named_parameters())  # fmt: skip
            for key, p in module.named_parameters(recurse=False):
                seen.add(f"{prefix}.{key}")
                ours, other = p.detach().flatten(), theirs[key].detach().flatten()
                enough = 4 / math.sqrt(len(ours))  # of two samples' deviations
                assert float(ours.std() / other.std()) == pytest.approx(1, abs=enough), prefix
                assert abs(float(ours.mean())) < float(other.std()) * enough
                if isinstance(module, nn.Linear):
                    bound = module.in_features**-0.5
                    assert float(ours.std()) == pytest.approx(bound / math.sqrt(3), rel=enough)
                    assert bound * (1 - 10 / len(ours)) < float(ours.abs().max()) <= bound
                else:
                    assert float(ours.std()) == pytest.approx(1, rel=enough)
                    assert float(ours.abs().max()) > 3.5
    vectors = {name for name, p in model.named_parameters() if name not in seen}
    assert len(vectors) == (2 * 2 + 1) * 2
    for name in vectors:
        assert bool((model.get_parameter(name) == (0.0 if name.endswith("bias") else 1.0)).all()), name


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_init_torch_follows_the_seed_and_the_name_and_nothing_else(small: Small, changes: dict) -> None:
    torch.manual_seed(1)
    first = values(small(init="torch"), seed=5)
    torch.manual_seed(2)
    second, other = values(small(init="torch", **changes), seed=5), values(small(init="torch"), seed=6)
    gpt2 = values(small(), seed=5)
    shared = [name for name in first if name in second and first[name].shape == second[name].shape]
    assert len(shared) > 5
    for name in shared:
        assert torch.equal(first[name], second[name]), name
        if first[name].ndim == 2:
            assert not torch.isclose(first[name], other[name]).all()
            assert not torch.isclose(first[name], gpt2[name]).all()


def test_with_init_torch_a_tied_head_is_the_normal_embedding(small: Small) -> None:
    tied, untied = (GPT(small(init="torch", tie_weights=tie, vocab_size=500)) for tie in (True, False))
    assert tied.head.weight is tied.wte.weight
    assert torch.equal(tied.wte.weight, untied.wte.weight)
    assert float(tied.wte.weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert float(untied.head.weight.detach().abs().max()) <= 0.25  # 1/sqrt(16)


def test_init_xavier_has_the_deviations_of_glorot_and_bengio() -> None:
    C, V, n = 192, 400, 2
    config = GPTConfig(n_layer=n, n_embd=C, vocab_size=V, n_head=4, init="xavier", bias=True, tie_weights=False)
    deviations = {
        "attn.qkv.weight": (1 / C) ** 0.5, "attn.proj.weight": (1 / C) ** 0.5,  # each of q, k and v is C x C
        "mlp.fc.weight": (2 / (5 * C)) ** 0.5, "mlp.proj.weight": (2 / (5 * C)) ** 0.5,
        "head.weight": (2 / (C + V)) ** 0.5, "wte.weight": C**-0.5, "wpe.weight": C**-0.5,
    }  # fmt: skip
    seen = set()
    for name, p in GPT(config, seed=3).requires_grad_(False).named_parameters():
        for end, deviation in deviations.items():
            if name.endswith(end):
                seen.add(end)
                assert float(p.std()) == pytest.approx(deviation, rel=0.03), name
                assert float(p.mean().abs()) < 0.05 * deviation, name
    assert seen == set(deviations)

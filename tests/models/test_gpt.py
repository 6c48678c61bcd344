"""The GPT as a whole: its size, its parts, its initial values and its cost."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptexp.models.attention import rope_table, sinusoidal_table
from gptexp.models.gpt import _ACTIVATIONS, GPT, FeedForward
from gptexp.models.settings import ACTIVATIONS, NORMS, PLACEMENTS, POSITIONS, GPTConfig, check_gpt

NORM_VARIANTS = [*NORMS, "batchnorm[batch]"]
BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
Small = Callable[..., GPTConfig]
Lively = Callable[..., GPT]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GPTConfig(), 804_096),  # nanoGPT's CPU recipe
        (GPTConfig(**BABY), 10_745_088),  # nanoGPT's baby GPT
        (GPTConfig(**BABY, activation="relu", tie_weights=False, bias=True, qkv_bias=False), 10_788_929),  # lecture
    ],
    ids=["nanoGPT CPU", "baby GPT", "lecture"],
)
def test_published_parameter_counts(config: GPTConfig, count: int) -> None:
    model = GPT(config)
    assert model.n_params == count == sum(p.numel() for p in set(model.parameters()))


def test_batchnorm_has_the_layernorm_parameters_and_rmsnorm_no_bias(small: Small) -> None:
    norms, channels = 2 * 2 + 1, 16
    size = {norm: GPT(small(norm=norm, bias=True)).n_params for norm in NORM_VARIANTS}
    assert size["batchnorm"] == size["batchnorm[batch]"] == size["layernorm"]
    assert size["layernorm"] - size["rmsnorm"] == size["rmsnorm"] - size["none"] == norms * channels


# --- the parts ---------------------------------------------------------------------------------------------------


def test_the_registries_name_what_can_be_built() -> None:
    assert tuple(_ACTIVATIONS) == ACTIVATIONS


@pytest.mark.parametrize("norm", NORM_VARIANTS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_variant_learns_with_every_parameter(small: Small, norm: str, placement: str, bias: bool) -> None:
    for activation in ACTIVATIONS:
        for position in POSITIONS:
            model = GPT(small(norm=norm, placement=placement, activation=activation, position=position, bias=bias))
            ids = torch.arange(24).view(3, 8) % 11
            logits = model(ids)
            assert logits.shape == (3, 8, 11)
            F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), name  # noqa: PT018
                assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_their_formulas(activation: str) -> None:
    mlp = FeedForward(GPTConfig(n_embd=16, bias=True, activation=activation)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    h = x @ mlp.fc.weight.T + mlp.fc.bias
    if activation == "swiglu":
        gate = x @ mlp.gate.weight.T + mlp.gate.bias
        h = gate / (1 + torch.exp(-gate)) * h
    else:
        h = {
            "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
            "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
            "relu": lambda v: torch.where(v > 0, v, 0),
            "relu_squared": lambda v: torch.where(v > 0, v * v, 0),
        }[activation](h)
    torch.testing.assert_close(mlp(x), h @ mlp.proj.weight.T + mlp.proj.bias)


@pytest.mark.parametrize("n_embd", [48, 96, 384])
def test_swiglu_keeps_the_number_of_parameters(n_embd: int) -> None:
    gated, plain = (
        sum(p.numel() for p in FeedForward(GPTConfig(n_embd=n_embd, activation=name)).parameters())
        for name in ("swiglu", "gelu")
    )
    assert gated == plain
    assert FeedForward(GPTConfig(n_embd=16, activation="swiglu")).fc.out_features == 48  # 42.7 rounded up to 8s


@pytest.mark.parametrize("norm", NORM_VARIANTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_placements_are_their_formulas(lively: Lively, norm: str, position: str) -> None:
    """pre: x + f(norm(x)) and a final norm; post: norm(x + f(x)) and none."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    for placement in PLACEMENTS:
        model = lively(norm=norm, placement=placement, position=position, bias=True, tie_weights=False)
        rope = rope_table(5, 8) if position == "rope" else None
        x = model.wte.weight[ids]
        if position == "learned":
            x = x + model.wpe.weight[:5]
        elif position == "sinusoidal":
            x = x * 4.0 + sinusoidal_table(5, 16)  # sqrt(16): the table must not drown the tokens
        for block in model.blocks:
            if placement == "pre":
                x = x + block.attn(block.norm1(x), rope)
                x = x + block.mlp(block.norm2(x))
            else:
                x = block.norm1(x + block.attn(x, rope))
                x = block.norm2(x + block.mlp(x))
        x = model.norm_f(x) if placement == "pre" else x
        torch.testing.assert_close(model(ids), x @ model.head.weight.T + model.head.bias)
        assert (model.norm_f is None) == (placement == "post")


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_head_is_the_embedding(lively: Lively, tie: bool) -> None:
    model = lively(tie_weights=tie, bias=True)
    assert (model.head.weight is model.wte.weight) == tie
    assert (model.head.bias is None) == tie
    before = model(torch.tensor([[3, 4]]))
    with torch.no_grad():
        model.wte.weight[9] += 1.0  # not in the input
    assert torch.equal(model(torch.tensor([[3, 4]]))[..., 9], before[..., 9]) != tie


# --- initial values ----------------------------------------------------------------------------------------------


def values(config: GPTConfig, seed: int = 0) -> dict[str, Tensor]:
    return dict(GPT(config, seed).named_parameters())


VARIANTS = [
    *({"norm": norm} for norm in NORM_VARIANTS),
    *({"position": position} for position in POSITIONS),
    *({"activation": activation} for activation in ACTIVATIONS),
    {"placement": "post"},
    {"n_layer": 5},
    {"n_head": 8},
    {"bias": True},
    {"qkv_bias": True},
    {"tie_weights": False},
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


# --- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_weights": False, "norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
        {"bias": True, "norm": "batchnorm", "position": "none", "n_head": 2},
    ],
    ids=str,
)
def test_flops_per_token_is_what_torch_counts(changes: dict) -> None:
    """Equal to the multiplications of matrices that torch counts, plus 6 for each entry of a norm or a bias.

    Torch counts matrix multiplications alone, while the estimate takes every parameter that is not looked up. The
    attention is run in its plain form because torch does not count the fused one on a CPU; both count all of the
    L x L scores, although half are masked.
    """
    config = GPTConfig(**changes)
    model, ids = GPT(config), torch.arange(128).view(2, 64) % 65
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids).sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert model.flops_per_token() == counter.get_total_flops() / ids.numel() + 6 * vectors
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.02)


# --- settings that are each valid alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_head": 3}, "model.n_head=3: must divide model.n_embd=16; nearest: 1, 2, 4"),
        ({"n_head": 16, "position": "rope"}, "model.position=rope: needs an even head size"),
        ({"n_embd": 15, "n_head": 3, "position": "sinusoidal"}, "model.position=sinusoidal: needs an even"),
        ({"norm": "batchnorm", "norms": {"batchnorm": {"stats": ["time"]}}}, "model.norms.batchnorm.stats=[time]"),
    ],
)
def test_combinations_that_cannot_work_are_named(small: Small, changes: dict, problem: str) -> None:
    (line,) = check_gpt(small(**changes))
    assert line.startswith(problem)


@pytest.mark.parametrize("norm", NORM_VARIANTS)
def test_combinations_that_work_pass(small: Small, norm: str) -> None:
    for position in POSITIONS:
        assert check_gpt(small(norm=norm, position=position)) == []

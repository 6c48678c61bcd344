"""The GPT as a whole: its size, its parts and its cost."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptexp.models.gpt import _ACTIVATIONS, GPT, FeedForward
from gptexp.models.registry import NORMS, PLACEMENTS
from gptexp.models.settings import ACTIVATIONS, POSITIONS, GPTConfig

NORM_VARIANTS = [*NORMS, "batchnorm[batch]", "rbn[batch]", "powernorm[batch]"]
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


@pytest.mark.parametrize(
    ("placement", "norms"), [("pre", 5), ("post", 4), ("sandwich", 9), ("output", 5), ("deepnorm", 4)]
)
def test_what_each_norm_adds_to_the_parameters(small: Small, placement: str, norms: int) -> None:
    """A weight and a bias for each of 16 channels, or a weight, or a single number; the placement sets how often."""
    for bias in (False, True):
        config = {norm: small(norm=norm, placement=placement, bias=bias) for norm in NORM_VARIANTS}
        size = {norm: GPT(config[norm]).n_params for norm in NORM_VARIANTS}
        added = {norm: (size[norm] - size["none"]) / norms for norm in NORM_VARIANTS}
        optional = 32 if bias else 16
        assert added == {
            "layernorm": optional, "rmsnorm": 16, "prmsnorm": 16, "scalenorm": 1, "dyt": 33, "groupnorm": optional,
            "batchnorm": 32, "batchnorm[batch]": 32, "rbn": 32, "rbn[batch]": 32, "causal_batchnorm": 32,
            "powernorm": 32, "powernorm[batch]": 32, "none": 0,
        }  # fmt: skip


# --- the parts ---------------------------------------------------------------------------------------------------


def test_the_registries_name_what_can_be_built() -> None:
    assert tuple(_ACTIVATIONS) == ACTIVATIONS


def check_that_every_parameter_learns(config: GPTConfig) -> None:
    model, ids = GPT(config), torch.arange(24).view(3, 8) % 11
    logits = model(ids)
    assert logits.shape == (3, 8, 11)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name  # noqa: PT018
        assert p.grad.abs().max() > 0, name


every_placement = pytest.mark.parametrize("placement", PLACEMENTS)
with_and_without_bias = pytest.mark.parametrize("bias", [False, True])


@pytest.mark.parametrize("norm", NORM_VARIANTS)
@every_placement
@with_and_without_bias
def test_every_norm_learns_with_every_parameter(small: Small, norm: str, placement: str, bias: bool) -> None:
    check_that_every_parameter_learns(small(norm=norm, placement=placement, bias=bias))


@every_placement
@with_and_without_bias
def test_every_variant_learns_with_every_parameter(small: Small, placement: str, bias: bool) -> None:
    for activation in ACTIVATIONS:
        for position in POSITIONS:
            config = small(placement=placement, activation=activation, position=position, bias=bias)
            check_that_every_parameter_learns(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head"},
        {"qk_norm": "full", "norm": "rmsnorm"},
        {"attention_scale": False},
        {"residual": False},
        {"projection": False},
        {"n_inner": 0},
        {"n_layer": 0},
        {"final_norm": False},
        {"final_norm": True, "placement": "post"},
        {"init": "torch"},
    ],
    ids=str,
)
def test_other_settings_learn_with_every_parameter(small: Small, changes: dict) -> None:
    check_that_every_parameter_learns(small(bias=True, **changes))


@pytest.mark.parametrize("norm", NORM_VARIANTS)
def test_a_model_of_half_precision_trains(small: Small, norm: str) -> None:
    for placement in PLACEMENTS:
        model = GPT(small(norm=norm, placement=placement, qk_norm="head")).bfloat16().train()
        logits = model(torch.arange(24).view(3, 8) % 11)
        assert logits.dtype == torch.bfloat16
        logits.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("tie", [False, True])
def test_a_tied_head_is_the_embedding(lively: Lively, tie: bool) -> None:
    model = lively(tie_weights=tie, bias=True)
    assert (model.head.weight is model.wte.weight) == tie
    assert (model.head.bias is None) == tie
    before = model(torch.tensor([[3, 4]]))
    with torch.no_grad():
        model.wte.weight[9] += 1.0  # not in the input
    assert torch.equal(model(torch.tensor([[3, 4]]))[..., 9], before[..., 9]) != tie


# --- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_weights": False, "norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
        {"bias": True, "norm": "batchnorm", "position": "none", "n_head": 2},
        {"placement": "sandwich", "norm": "dyt", "qk_norm": "full", "n_inner": 96},
        {"projection": False, "residual": False},
        {"n_inner": 0, "attention_scale": False},
        {"n_layer": 0},
    ],
    ids=str,
)
def test_flops_per_token_is_what_torch_counts(changes: dict) -> None:
    """Equal to the multiplications of matrices that torch counts, which are all that it counts.

    The attention is run in its plain form because torch does not count the fused one on a CPU; both count all of the
    L x L scores, although half are masked.
    """
    model, ids = GPT(GPTConfig(**changes)), torch.arange(128).view(2, 64) % 65
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids).sum().backward()
    assert model.flops_per_token() == counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_model_compiles_as_one_graph(small: Small, activation: str) -> None:
    model, ids = GPT(small(activation=activation)), torch.arange(16).view(2, 8) % 11
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # an error where a part cannot be compiled
    assert torch.equal(compiled(ids), model(ids))

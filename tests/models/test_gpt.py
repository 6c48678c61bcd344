"""The GPT as a whole: its size, its parts and its cost."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptexp.models.gpt import GPT, FeedForward
from gptexp.models.gpt_settings import GPTConfig
from gptexp.registry import ACTIVATIONS
from tests.models.conftest import VARIANTS, every_variant

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


# --- the parts ---------------------------------------------------------------------------------------------------


def check_that_every_parameter_learns(config: GPTConfig) -> None:
    ids = torch.arange(24).view(3, 8) % 11
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config).to(dtype)
        logits = model(ids)
        assert (logits.shape, logits.dtype) == ((3, 8, 11), dtype)
        F.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name  # noqa: PT018
            assert dtype == torch.bfloat16 or p.grad.abs().max() > 0, name


@every_variant
def test_every_variant_learns_with_every_parameter(
    small: Small, norm: str, placement: str, position: str, activation: str
) -> None:
    parts = {"norm": norm, "placement": placement, "position": position, "activation": activation}
    check_that_every_parameter_learns(small(**parts, bias=VARIANTS.index(tuple(parts.values())) % 2 == 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head"}, {"qk_norm": "full", "norm": "rmsnorm"}, {"attention_scale": False}, {"residual": False},
        {"projection": False}, {"n_inner": 0}, {"n_layer": 0}, {"final_norm": False},
        {"final_norm": True, "placement": "post"}, {"init": "torch"},
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_learn_with_every_parameter(small: Small, changes: dict) -> None:
    check_that_every_parameter_learns(small(bias=True, **changes))


ACTIVATION_FORMULAS = {
    "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: torch.where(v > 0, v, 0),
    "relu_squared": lambda v: torch.where(v > 0, v * v, 0),
    "swiglu": lambda v: v / (1 + torch.exp(-v)),
    "geglu": lambda v: v * torch.special.ndtr(v),
}
GATED = {"swiglu", "geglu"}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_their_formulas(activation: str, projection: bool) -> None:
    mlp = FeedForward(GPTConfig(n_embd=16, bias=True, activation=activation, projection=projection)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    h, act = x @ mlp.fc.weight.T + mlp.fc.bias, ACTIVATION_FORMULAS[activation]
    h = h * act(x @ mlp.gate.weight.T + mlp.gate.bias) if activation in GATED else act(h)
    torch.testing.assert_close(mlp(x), h @ mlp.proj.weight.T + mlp.proj.bias if projection else h)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 64), ({"activation": "swiglu"}, 48), ({"activation": "geglu"}, 48),  # 42.7, rounded up to 8s
        ({"n_inner": 24}, 24), ({"n_inner": 24, "activation": "swiglu"}, 24), ({"projection": False}, 16),
        ({"projection": False, "activation": "swiglu"}, 16), ({"projection": False, "n_inner": 16}, 16),
    ],
    ids=str,
)  # fmt: skip
def test_the_width_of_the_feed_forward_layer(small: Small, changes: dict, width: int) -> None:
    mlp = FeedForward(small(**changes))
    assert mlp.fc.weight.shape == (width, 16)
    assert mlp.gate is None or mlp.gate.weight.shape == (width, 16)
    assert mlp.proj is None or mlp.proj.weight.shape == (16, width)


@pytest.mark.parametrize("activation", sorted(GATED))
def test_a_gate_keeps_the_number_of_parameters(activation: str) -> None:
    gated, plain = (GPT(GPTConfig(n_embd=384, n_head=6, activation=name)).n_params for name in (activation, "gelu"))
    assert gated == plain


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


@pytest.mark.parametrize(("norm", "placement", "position", "activation"), [v for v in VARIANTS if v[0] == "rmsnorm"])
def test_a_model_compiles_as_one_graph(
    small: Small, norm: str, placement: str, position: str, activation: str
) -> None:
    model = GPT(small(norm=norm, placement=placement, position=position, activation=activation))
    ids = torch.arange(16).view(2, 8) % 11
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # an error where a part cannot be compiled
    assert torch.equal(compiled(ids), model(ids))

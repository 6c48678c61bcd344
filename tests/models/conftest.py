"""Small models for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.registry import ACTIVATIONS, NORMS, PLACEMENTS, POSITIONS

NORM_VARIANTS = [*NORMS, "batchnorm[batch]", "rbn[batch]", "powernorm[batch]"]
"""Every registered norm, and every other choice of `stats`."""

VERDICTS = {
    "batchnorm": (True, True),  # its statistics run over sequences and positions
    "batchnorm[batch]": (False, True),  # over sequences alone
    "rbn": (True, True),
    "rbn[batch]": (False, True),
    "causal_batchnorm": (False, True),  # over sequences and the positions so far
    "powernorm[batch]": (True, True),
}
"""Whether a norm's output in training depends on later positions, and on other sequences. No other norm's does."""


def norm_settings(variant: str) -> tuple[str, dict[str, Any]]:
    """`model.norm` and `model.norms` of a norm, such as `batchnorm` or `batchnorm[batch]`."""
    norms = NORMS.defaults()
    name, _, stats = variant.rstrip("]").partition("[")
    if stats:
        norms[name]["stats"] = stats.split(",") if isinstance(norms[name]["stats"], list) else stats
    return name, norms


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor], **tolerances: float) -> None:
    """Every tensor of mine is near the one of that name in other."""
    for key, value in mine.items():
        torch.testing.assert_close(value, other[key], msg=lambda text, key=key: f"{key}: {text}", **tolerances)


def small_config(**changes: Any) -> GPTConfig:
    name, norms = norm_settings(changes.pop("norm", "layernorm"))
    sizes = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "norm": name, "norms": norms}
    return GPTConfig(**{**sizes, **changes})


PAIRS = [(n, p) for n in NORM_VARIANTS for p in PLACEMENTS if not small_config(norm=n, placement=p).problems()]
"""Norms and placements that go together."""

VARIANTS = [
    (norm, placement, [*POSITIONS][i % len(POSITIONS)], [*ACTIVATIONS][NORM_VARIANTS.index(norm) % len(ACTIVATIONS)])
    for i, (norm, placement) in enumerate(PAIRS)
]
"""Norm, placement, position and activation: each pair of norm and placement, and both with every position."""

ATTENTIONS: list[dict[str, Any]] = [
    {"n_head": 4, "n_kv_head": 2, "position": "rope", "rope_theta": 50.0},
    {"n_head": 4, "n_kv_head": 1, "head_dim": 6, "qk_norm": "full"},
    {"window": 3},
    {"window": 2, "position": "alibi", "value_residual": True},
    {"attention_softcap": 0.5, "logit_softcap": 2.0, "attention_gate": "head"},
    {"attention_softcap": 1.0, "window": 4, "n_kv_head": 1, "attention_gate": "channel"},
    {"value_residual": True, "position": "rope"},
]  # fmt: skip
"""What attention can be besides."""

every_variant = pytest.mark.parametrize(("norm", "placement", "position", "activation"), VARIANTS)


@pytest.fixture(scope="session")
def small() -> Callable[..., GPTConfig]:
    """small(**changes): a tiny GPTConfig. norm="batchnorm[batch]" is batchnorm with stats=[batch], and so on."""
    return small_config


def moved(model: Any) -> Any:
    """The model in eval mode, every parameter and running statistic away from its initial value.

    Fresh weights are so small, and biases so zero, that a wrong formula could hide behind them.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0.0, 0.3, generator=generator))
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(torch.empty(b.shape).uniform_(0.0, 0.5, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def lively() -> Callable[..., GPT]:
    """lively(**changes): a tiny GPT whose every part matters."""
    return lambda **changes: moved(GPT(small_config(**changes)))

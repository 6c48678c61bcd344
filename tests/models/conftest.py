"""Small models for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptexp.models.gpt import GPT
from gptexp.models.registry import default_norms
from gptexp.models.settings import GPTConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_config(**changes: Any) -> GPTConfig:
    norms = default_norms()
    name, _, stats = changes.pop("norm", "layernorm").rstrip("]").partition("[")
    if stats:
        norms[name]["stats"] = stats.split(",") if isinstance(norms[name]["stats"], list) else stats
    sizes = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "norm": name, "norms": norms}
    return GPTConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def small() -> Callable[..., GPTConfig]:
    """small(**changes): a tiny GPTConfig. norm="batchnorm[batch]" is batchnorm with stats=[batch], and so on."""
    return small_config


@pytest.fixture(scope="session")
def lively() -> Callable[..., GPT]:
    """lively(**changes): a tiny GPT in eval mode whose every parameter and running statistic is off its initial value.

    Freshly initialised weights are so small, and biases so zero, that a wrong formula could hide behind them.
    """

    def build(**changes: Any) -> GPT:
        model = GPT(small_config(**changes)).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.empty(p.shape).normal_(0.0, 0.3, generator=generator))
            for name, b in model.named_buffers():
                if "running" in name:
                    b.add_(torch.empty(b.shape).uniform_(0.0, 0.5, generator=generator))
        return model

    return build

"""The LightningModule by itself: what it does to gradients, compared with torch's own functions."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptexp.config import Config
from gptexp.models.settings import GPTConfig, build_model
from gptexp.training.module import GPTModule


def _module(limit: float) -> GPTModule:
    model = GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)
    module = GPTModule(build_model(model, 1), Config(model=model, grad_clip=limit))
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(model=None))  # type: ignore[assignment]
    return module


@given(st.integers(0, 2**32), st.sampled_from([0.5, 1 - 2**-22, 1.0, 1 + 2**-23, 1 + 2**-21, 1.00001, 2.0]))
def test_gradients_are_clipped_as_torch_clips_them(seed: int, share: float) -> None:
    """Where the norm is just at the limit, too, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4), 1)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    limit = float(nn.utils.get_total_norm(gradients)) * share
    module = _module(limit)
    for own, other, gradient in zip(module.weights, model.parameters(), gradients, strict=True):
        own.grad, other.grad = gradient.clone(), gradient.clone()
    module.configure_gradient_clipping(None)
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert torch.equal(module.grad_norm, norm)
    for own, other in zip(module.weights, model.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_no_number_is_seen(value: float, limit: float) -> None:
    """And without clipping it stays what it was, for what looks at it afterwards."""
    module = _module(limit)
    for p in module.weights:
        p.grad = torch.ones_like(p)
    module.weights[0].grad[0, 0] = value  # type: ignore[index]
    module.configure_gradient_clipping(None)
    assert not torch.isfinite(module.grad_norm)
    assert limit or all(torch.equal(p.grad, torch.ones_like(p)) for p in module.weights[1:])  # type: ignore[arg-type]

"""The LightningModule in a stock Trainer: what it does to gradients and learning rates, compared with torch's own."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from gptexp.data.batches import Batch
from gptexp.errors import UserError
from gptexp.models.settings import build_model
from gptexp.training.module import GPTModule

MODEL = {"vocab_size": 5, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Gradients(Callback):
    """Puts gradients of its own in place of the loss's, and keeps what clipping makes of them."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.gradients, self.clipped = gradients, list[torch.Tensor]()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: GPTModule, optimizer: Any) -> None:
        for p, gradient in zip(pl_module.parameters(), self.gradients, strict=True):
            p.grad = gradient.clone()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: GPTModule, optimizer: Any) -> None:
        self.clipped = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None] or self.clipped

    def on_train_batch_end(self, trainer: Trainer, pl_module: GPTModule, *_: Any) -> None:
        self.clipped = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]


def batches(count: int) -> DataLoader[Batch]:
    ids = torch.arange(8).view(2, 4) % 5
    return DataLoader([Batch(ids, ids, None, 8.0)] * count, batch_size=None)  # type: ignore[arg-type]


def clipped(gradients: list[torch.Tensor], **trainer: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The gradients after a step of training, and the norm that was logged."""
    module, seen = GPTModule(MODEL), Gradients(gradients)
    made = Trainer(**QUIET, max_steps=1, callbacks=[seen], **trainer)
    made.fit(module, batches(1))
    return seen.clipped, made.callback_metrics["grad_norm"]


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 1 - 2**-22, 1.0, 1 + 2**-23, 1 + 2**-21, 1.00001, 2.0]))
def test_gradients_are_clipped_as_torch_clips_them(seed: int, share: float) -> None:
    """Where the norm is just at the limit, too, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(GPTModule(MODEL).model.config, 1)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    limit = float(nn.utils.get_total_norm(gradients)) * share
    found, logged = clipped(gradients, gradient_clip_val=limit)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert torch.equal(logged, norm)
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_the_trainers_other_way_of_clipping() -> None:
    gradients = [torch.full(p.shape, 3.0) for p in GPTModule(MODEL).parameters()]
    found, logged = clipped(gradients, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert all(bool((g == 0.5).all()) for g in found)
    assert float(logged) == pytest.approx(3 * math.sqrt(sum(g.numel() for g in gradients)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_gradient_that_is_no_number_is_seen(value: float, limit: float | None) -> None:
    """And without clipping it stays what it was, for what looks at it afterwards."""
    gradients = [torch.ones_like(p) for p in GPTModule(MODEL).parameters()]
    gradients[0][0, 0] = value
    found, logged = clipped(gradients, gradient_clip_val=limit)
    assert not torch.isfinite(logged)
    assert limit or all(bool((g == 1).all()) for g in found[1:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", [{}, {"name": "muon", "learning_rate": 0.02, "adam_learning_rate": 0.01}])
def test_the_learning_rate_follows_the_schedule(optimizer: dict[str, Any]) -> None:
    """In every group, from its own peak: a linear warmup over 2 steps, then a line down to 0 at step 6."""
    seen: list[list[float]] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    schedule = {"name": "linear", "warmup_steps": 2, "min_lr_ratio": 0.0}
    module = GPTModule(MODEL, optimizer, schedule)
    Trainer(**QUIET, max_steps=6, callbacks=[Rates()]).fit(module, batches(6))
    peaks = [0.02, 0.02, 0.01] if optimizer else [1e-3, 1e-3]
    shares = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    assert seen == [pytest.approx([peak * share for peak in peaks]) for share in shares]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 3.0])
def test_weights_decay_by_half_a_cosine(ratio: float) -> None:
    """Without a gradient, plain descent multiplies matrices by 1 - learning rate x weight decay, and nothing else."""
    optimizer = {"name": "sgd", "momentum": 0.0, "learning_rate": 0.5, "weight_decay": 0.1}
    module = GPTModule(MODEL, optimizer, {"name": "constant", "weight_decay_ratio": ratio})
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients = Gradients([torch.zeros_like(p) for p in module.parameters()])
    Trainer(**QUIET, max_steps=4, callbacks=[gradients]).fit(module, batches(4))
    shares = [ratio + (1 - ratio) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    left = math.prod(1 - 0.5 * 0.1 * share for share in shares)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (left if p.ndim > 1 else 1.0))


def test_mistakes_in_the_settings_are_all_told() -> None:
    with pytest.raises(UserError) as caught:
        GPTModule({"n_head": 3, "n_embd": 4})
    assert caught.value.problems[0].startswith("model.n_head=3: must divide model.n_embd=4")
    with pytest.raises(UserError, match=r"model\.n_heads=3: unknown key; did you mean n_head\?"):
        GPTModule({"n_heads": 3})
    with pytest.raises(UserError, match=r"optimizer\.name=adam: unknown"):
        GPTModule(MODEL, {"name": "adam"})

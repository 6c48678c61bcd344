"""Metrics against formulas, and their independence of how the data is cut into batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import Perplexity

from gptexp.tasks.metrics import LanguageModelMetrics, summed_loss


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5, 7), torch.randint(0, 7, (6, 5))
    targets[1, 3:] = -1
    targets[4] = -1
    return logits, targets


def test_against_formulas_and_torchmetrics() -> None:
    logits, targets = data()
    metric = LanguageModelMetrics(chars_per_token=0.5)
    metric.update(logits, targets)
    values = metric.compute()
    real = targets >= 0
    log_probs = logits.double().log_softmax(-1)[real].gather(-1, targets[real][:, None])
    loss = -log_probs.mean().item()
    assert values["loss"] == pytest.approx(loss, rel=1e-6)
    assert values["bpc"] == pytest.approx(loss / math.log(2) / 0.5, rel=1e-6)
    assert values["accuracy"] == pytest.approx((logits.argmax(-1) == targets)[real].float().mean().item())
    reference = Perplexity(ignore_index=-1)
    reference.update(logits, targets)
    assert values["perplexity"] == pytest.approx(reference.compute().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-6)])
def test_the_loss_is_as_exact_as_its_logits_but_never_less_than_float32(dtype: torch.dtype, off: float) -> None:
    logits, targets = data()
    logits = logits.to(dtype)
    real = targets >= 0
    exact = -logits.double().log_softmax(-1)[real].gather(-1, targets[real][:, None]).sum().item()
    assert summed_loss(logits, targets).item() == pytest.approx(exact, rel=off)


@given(st.integers(1, 5))
def test_cutting_the_data_changes_nothing(cut: int) -> None:
    logits, targets = data()
    whole, parts = LanguageModelMetrics(), LanguageModelMetrics()
    whole.update(logits, targets)
    parts.update(logits[:cut], targets[:cut])
    parts.update(logits[cut:], targets[cut:])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)

"""Loss, perplexity, accuracy and bits per character over any number of batches and processes."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gptexp.data.batches import IGNORED


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of targets (N, L) under logits (N, L, V), summed; padding is left out."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class ExactMatch(Metric):
    """The share of rows whose every target is the likeliest token: what the model writes there is right.

    A text that is written token by token, each the likeliest, equals the targets if and only if each of these is the
    likeliest one after the targets before it. So one pass over the targets tells, and nothing needs to be written.
    """

    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (N, L, V) and targets (N, L); rows without a target are left out."""
        asked = targets != IGNORED
        rows = asked.any(1)
        self.right += (((logits.argmax(-1) == targets) | ~asked).all(1) & rows).sum()
        self.count += rows.sum()

    def compute(self) -> float:
        """In 0..1; nan without a row."""
        return int(self.right) / int(self.count) if self.count else math.nan


class LanguageModelMetrics(Metric):
    """Counts that add up exactly over batches and ranks; padding is not counted.

    `wide` sums losses in float64, which not every device has.
    """

    full_state_update = False
    nll: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, chars_per_token: float = 1.0, wide: bool = True) -> None:
        super().__init__()
        self.chars_per_token = chars_per_token
        self.add_state("nll", torch.zeros((), dtype=torch.float64 if wide else torch.float32), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (N, L, V) and targets (N, L)."""
        self.nll += summed_loss(logits, targets).to(self.nll.dtype)
        self.correct += (logits.argmax(-1) == targets).sum()
        self.count += (targets != IGNORED).sum()

    def compute(self) -> dict[str, float]:
        """loss in nats per token, perplexity, accuracy in 0..1, and bpc in bits per character."""
        count = int(self.count)
        loss = float(self.nll) / count if count else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": int(self.correct) / max(1, count),
            "bpc": loss / math.log(2) / self.chars_per_token,
        }

"""Interpolated n-grams: counting what follows each context of the last few symbols, without gradients.

Jurafsky, Martin, "Speech and Language Processing", chapter 3, has all of this. A baseline for models that learn.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from gptexp.config.sections import ModelConfig
from gptexp.config.settings import settings
from gptexp.errors import UserError
from gptexp.inference.kv_cache import Decoder
from gptexp.models.language_model import LanguageModel
from gptexp.registry import MODELS

ROWS = 2**18  # positions whose probabilities are computed at a time


@settings
class CountsConfig(ModelConfig):
    """Interpolated n-grams, counted in one pass over the training split."""

    counted: ClassVar[bool] = True

    name: Literal["counts"] = "counts"
    block_size: Annotated[int, Ge(1)] = 4096
    """Positions L of a row of a batch; contexts do not reach beyond a row."""
    order: Annotated[int, Ge(1)] = 7
    """Symbols of the longest n-gram, the predicted one among them."""
    smoothing: Literal["kneser_ney", "witten_bell"] = "kneser_ney"
    """How much a context leaves to the next shorter one: modified Kneser-Ney (Chen, Goodman 1999), or Witten, Bell
    1991."""


class Table:
    """The n-grams of one length, in order of their codes: numbers in base V, of which the last digit is predicted.

    A context gives each of its symbols w (value(w) + mass p(w)) / total, with the probability p of the next shorter
    context, and sums of mass and total over the n-grams of the context.
    """

    def __init__(self, codes: Tensor, value: Tensor, mass: Tensor, total: Tensor) -> None:
        self.codes, self.value, self.mass, self.total = codes, value, mass, total

    def interpolate(self, contexts: Tensor, p: Tensor) -> Tensor:
        """Probabilities (n, V) after contexts (n,) of codes, from those p (n, V) of the next shorter ones."""
        n, V = p.shape
        first, end = (torch.searchsorted(self.codes, at) for at in (contexts * V, (contexts + 1) * V))
        lengths = end - first
        rows = torch.repeat_interleave(torch.arange(n, device=p.device), lengths)
        entries = torch.arange(len(rows), device=p.device) + (first - lengths.cumsum(0) + lengths)[rows]
        seen = torch.zeros_like(p)
        seen[rows, self.codes[entries] % V] = self.value[entries]
        mass, total = (torch.zeros(n, dtype=p.dtype, device=p.device).index_add_(0, rows, part[entries])
                       for part in (self.mass, self.total))  # fmt: skip
        known = lengths > 0
        return torch.where(known[:, None], (seen + mass[:, None] * p) / total.clamp(min=1)[:, None], p)


@MODELS.register("counts", CountsConfig)
class Counts(LanguageModel):
    """Token ids (N, L) to the logarithms of n-gram probabilities (N, L, V), which are all equal before it learns."""

    def __init__(self, config: CountsConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.tables = config, list[Table]()
        if config.vocab_size**config.order >= 2**63:
            most = int(63 / math.log2(config.vocab_size))
            raise UserError(f"model.order={config.order}: too long for {config.vocab_size} symbols; allowed: at most "
                            f"{most}")  # fmt: skip

    @property
    def n_params(self) -> int:
        """The number of counts."""
        return sum(len(table.codes) for table in self.tables)

    def learn(self, rows: Any) -> None:
        """Count the n-grams of rows, pairs of x and y (N, L) with -1 in y where there is no target."""
        V, found = self.config.vocab_size, [list[Tensor]() for _ in range(self.config.order)]
        for x, y in rows:
            for length, contexts, whole in _contexts(x, self.config.order, V):
                there = (y >= 0) & whole
                found[length].append(contexts[there] * V + y[there])
        raw = [torch.cat(codes).unique(return_counts=True) for codes in found]
        if self.config.smoothing == "witten_bell":
            self.tables = [_witten_bell(codes, counts.double()) for codes, counts in raw]
            return
        # Of a shorter n-gram it counts how many different symbols come before it.
        for length, (longer, _) in zip(range(len(raw) - 1), raw[1:], strict=True):
            raw[length] = (longer % V ** (length + 1)).unique(return_counts=True)
        self.tables = [_kneser_ney(codes, counts.double()) for codes, counts in raw]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L) to (N, L, V), in float64."""
        V = self.config.vocab_size
        parts = []
        for some in ids.split(max(1, ROWS // ids.shape[1])):
            p = torch.full((some.numel(), V), 1 / V, dtype=torch.float64, device=ids.device)
            contexts = _contexts(some, len(self.tables), V)
            for table, (_, codes, whole) in zip(self.tables, contexts, strict=True):
                at = whole.expand_as(some).flatten()
                p[at] = table.interpolate(codes.flatten()[at], p[at])
            parts.append(p.log().view(*some.shape, V))
        return torch.cat(parts)

    def decoder(self, n_rows: int) -> Decoder:
        """Reads the longest context alone."""
        most = max(1, self.config.order - 1)

        def logits(rows: Any) -> Tensor:
            return torch.cat([self(torch.tensor([row[-most:]]))[:, -1] for row in rows])

        return logits

    def get_extra_state(self) -> dict[str, Any]:
        """The tables, for a checkpoint."""
        return {"tables": [dict(vars(table)) for table in self.tables]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The tables of a checkpoint."""
        self.tables = [Table(**table) for table in state["tables"]]


def _contexts(ids: Tensor, order: int, V: int) -> Any:
    """For each length of a context: it, the codes (N, L) of those that end at each position, and which are whole."""
    codes, power = torch.zeros_like(ids), 1
    for length in range(order):
        if length:
            codes = codes + torch.nn.functional.pad(ids, (length - 1, 0))[:, : ids.shape[1]] * power
            power *= V
        yield length, codes, torch.arange(ids.shape[1], device=ids.device) >= length - 1


def _witten_bell(codes: Tensor, counts: Tensor) -> Table:
    """A context that was followed by T different symbols in n places leaves T / (n + T)."""
    return Table(codes, counts, torch.ones_like(counts), counts + 1)


def _kneser_ney(codes: Tensor, counts: Tensor) -> Table:
    """A discount of each count, one for 1, one for 2 and one for more, from how many counts there are of each."""
    n1, n2, n3, n4 = (float((counts == k).sum().clamp(min=1)) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = [max(0.0, k - (k + 1) * y * b / a) for k, a, b in ((1, n1, n2), (2, n2, n3), (3, n3, n4))]
    discount = torch.tensor([0.0, *discounts], dtype=torch.float64)[counts.clamp(max=3).long()]
    return Table(codes, counts - discount, discount, counts)

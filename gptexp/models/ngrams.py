"""Embeddings of the last few tokens together."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NGrams(nn.Embedding):
    """The sum of embeddings of the last 2, 3 .. n tokens, initialized to 0.

    Each length has its own table, with a row for each n-gram where there are `ngram_rows` or fewer; otherwise with that
    many rows, of which a hash chooses one. Positions before the first token count as a further symbol, V.
    Sources: Huang et al. 2025, "Over-Tokenized Transformer"; Pagnoni et al. 2024, "Byte Latent Transformer" (hashing).
    """

    def __init__(self, config: Any) -> None:
        base = config.vocab_size + 1
        sizes = [min(config.ngram_rows, base**k) for k in range(2, config.ngram + 1)]
        super().__init__(sum(sizes), config.n_embd)
        self.base, self.sizes = base, sizes

    def forward(self, ids: Tensor, preceding: Tensor | None = None) -> Tensor:
        """(N, L, C).

        Args:
            ids: (N, L) int64.
            preceding: the tokens before those, (N, n - 1), V where there are none; None where ids begin their rows.
        """
        (N, L), n = ids.shape, len(self.sizes) + 1
        if preceding is None:
            preceding = ids.new_full((N, n - 1), self.base - 1)
        tokens, number = torch.cat([preceding, ids], dim=1), ids
        found, offset = [], 0
        for k, size in enumerate(self.sizes, 2):
            power = (self.base ** (k - 1) + 2**63) % 2**64 - 2**63  # wrapped, as int64 products are
            number = number + tokens[:, n - k : n - k + L] * power  # one for each k-gram
            row = number if size == self.base**k else _hashed(number) % size
            found.append(row + offset)
            offset += size
        return F.embedding(torch.stack(found, dim=-1), self.weight).sum(-2)


def _hashed(number: Tensor) -> Tensor:
    """40-bit hashes of int64 numbers: Fibonacci hashing, Knuth 6.4."""
    return (number * -0x61C8864680B583EB >> 24) & (2**40 - 1)

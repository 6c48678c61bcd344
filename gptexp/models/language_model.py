"""The base class of all models, which samples text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gptexp.inference.kv_cache import Decoder, next_token_logits
from gptexp.inference.sampling import sample_tokens
from gptexp.models.initialization import seeded


class LanguageModel(nn.Module):
    """Token ids (N, L) to logits (N, L, V), called as model(ids, mask).

    Attributes:
        config: the architecture, with block_size, the longest L.
        wte: the token embedding.
    """

    config: Any
    wte: nn.Embedding

    @property
    def n_params(self) -> int:
        """The number of trainable parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        """The weights of all linear layers but the head, by name, each with the rows of the matrices stacked in it."""
        linear = {name: m for name, m in self.named_modules() if isinstance(m, nn.Linear) and name != "head"}
        return {f"{name}.weight": (m.out_features,) for name, m in linear.items()}

    def flops_per_token(self) -> float:
        """Floating-point operations per token of one training step (forward and backward).

        6 for each weight of a linear layer: Kaplan et al. 2020, section 2.1.
        """
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        return 6.0 * sum(m.weight.numel() for m in linear)

    @property
    def cache_bytes(self) -> int:
        """What a text takes to be continued, in float32: nothing where its last tokens are read anew each time."""
        return 0

    def decoder(self, n_rows: int) -> Decoder:
        """Computes the next-token logits of `n_rows` growing rows, each time from all of their last tokens."""
        return lambda rows: next_token_logits(self, [row[-self.config.block_size :] for row in rows])

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: object) -> list[list[int]]:
        """Continue every prompt; see `stream` for the options. Returns the new ids of each row, without its prompt."""
        steps = list(self.stream(prompts, max_new_tokens, **options))  # type: ignore[arg-type]
        return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]  # type: ignore[misc]

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, stop: Sequence[int] = (), seed: int = 0,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Sample one token per step for every prompt, in evaluation mode.

        A row's text depends on the seed, its index and its prompt, not on the other rows. Each token depends on the
        last `block_size` tokens of its row; in a GPT, on `block_size` / 2 of them or more: see `CachedDecoder`.

        Args:
            prompts: one or more prompts of one token or more.
            max_new_tokens: the most tokens to add to each.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: keep the k likeliest tokens.
            top_p: keep the fewest tokens whose probabilities add up to p (Holtzman et al. 2020).
            stop: a row ends once its new tokens end with this sequence.
            seed: of the random numbers.

        Yields:
            each row's new token; None for a row that has ended.

        Raises:
            ValueError: without a prompt, or for an empty one.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token")
        was_training = self.training
        self.eval()
        try:
            rows, decoder = [list(p) for p in prompts], self.decoder(len(prompts))
            starts = [len(r) for r in rows]
            done = [False] * len(rows)
            generators = [seeded(seed, f"row {i}") for i in range(len(rows))]
            numbers = [torch.rand(max_new_tokens, dtype=torch.float32, generator=g) for g in generators]
            for uniform in torch.stack(numbers, dim=1):  # (N,)
                logits = decoder(rows).float().cpu()  # (N, V)
                tokens = sample_tokens(logits, uniform, temperature, top_k, top_p).tolist()
                yield [None if done[i] else tokens[i] for i in range(len(rows))]
                for i, row in enumerate(rows):
                    row.append(tokens[i])
                    done[i] |= bool(stop) and row[starts[i] :][-len(stop) :] == list(stop)
                if all(done):
                    return
        finally:
            self.train(was_training)

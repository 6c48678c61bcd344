"""A decoder-only GPT, its parts in the order in which data meets them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.attention import CausalSelfAttention, rope_table, sinusoidal_table
from gptexp.models.norms import build_norm
from gptexp.models.settings import GPTConfig


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()  # So et al. 2021, "Primer"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """Two linear layers around a non-linearity, 4C wide.

    swiglu has a third, gating layer and is 8C/3 wide (rounded up to a multiple of 8), which keeps the number of
    parameters. Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.act, self.dropout = _ACTIVATIONS[config.activation], config.dropout
        gated = config.activation == "swiglu"
        width = math.ceil(config.n_embd / 3) * 8 if gated else 4 * config.n_embd
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias) if gated else None
        self.fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        h = self.act(self.fc(x)) if self.gate is None else self.act(self.gate(x)) * self.fc(x)  # (N, L, 4C)
        return F.dropout(self.proj(h), self.dropout, self.training)


class Block(nn.Module):
    """An attention and a feed-forward sub-layer, each with a residual connection and a norm.

    pre: x + f(norm(x)); post: norm(x + f(x)).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.post = config.placement == "post"
        self.norm1, self.attn = build_norm(config), CausalSelfAttention(config)
        self.norm2, self.mlp = build_norm(config), FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        if self.post:
            x = self.norm1(x + self.attn(x, rope), mask)
            x = self.norm2(x + self.mlp(x), mask)
        else:
            x = x + self.attn(self.norm1(x, mask), rope)
            x = x + self.mlp(self.norm2(x, mask))
        return x


class GPT(nn.Module):
    """Token ids (N, L) to logits (N, L, V).

    Args:
        config: the architecture.
        seed: every parameter's initial value is a function of this seed, the parameter's name and its shape alone.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        if config.position == "rope":
            tables = rope_table(config.block_size, config.head_dim)
            for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
                self.register_buffer(name, table, persistent=False)
        elif config.position == "sinusoidal":
            self.register_buffer("sinusoidal", sinusoidal_table(config.block_size, config.n_embd), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = build_norm(config) if config.placement == "pre" else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias and not config.tie_weights)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, seed)

    @property
    def n_params(self) -> int:
        """Number of trainable parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Floating-point operations of one training step (forward and backward) for each token.

        6 for each parameter that multiplies an activation, plus the attention scores: Chowdhery et al. 2022,
        "PaLM", appendix B.
        """
        c = self.config
        lookups = sum(e.weight.numel() for e in (self.wte, self.wpe) if e is not None)
        head = c.vocab_size * c.n_embd if c.tie_weights else 0  # a tied head multiplies with the embedding
        return 6.0 * (self.n_params - lookups + head) + 12.0 * c.n_layer * c.n_embd * c.block_size

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for the symbol after each position.

        Args:
            ids: (N, L) int64, L at most `block_size`.
            mask: None, or (N, L) bool that is False at padding. Padding must stand at the end of its row.

        Returns:
            (N, L, V).
        """
        L = ids.shape[1]
        x = self.wte(ids)  # (N, L, C)
        rope = None
        if self.wpe is not None:
            x = x + self.wpe.weight[:L]
        elif self.config.position == "sinusoidal":
            x = x * math.sqrt(self.config.n_embd) + self.get_buffer("sinusoidal")[:L]
        elif self.config.position == "rope":
            rope = self.get_buffer("rope_cos")[:L], self.get_buffer("rope_sin")[:L]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, mask, rope)
        if self.norm_f is not None:
            x = self.norm_f(x, mask)
        logits: Tensor = self.head(x)
        return logits

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: object) -> list[list[int]]:
        """Continue every prompt; see `stream` for the options. Returns the new ids of each, without the prompt."""
        rows: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **options):  # type: ignore[arg-type]
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """Sample one token a step for every prompt, in evaluation mode.

        A row's text depends on the seed, its index and its prompt, not on the other rows. Each step sees the last
        `block_size` tokens of its row.

        Args:
            prompts: one or more prompts of any lengths, at least one token each.
            max_new_tokens: tokens to add to each.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: keep the k likeliest tokens.
            top_p: keep the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020).
            stop: a row ends once its new tokens end with this sequence.

        Yields:
            a list with each row's new token, None for a row that has ended.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token")
        was_training, device = self.training, self.wte.weight.device
        self.eval()
        try:
            rows = [list(p) for p in prompts]
            starts = [len(r) for r in rows]
            done = [False] * len(rows)
            chances = torch.stack([torch.rand(max_new_tokens, generator=_generator(seed, f"row {i}"))
                                   for i in range(len(rows))])  # (N, max_new_tokens)
            for t in range(max_new_tokens):
                # Rows of unequal lengths are padded at the right, where causal attention never looks from the left.
                context = [r[-self.config.block_size:] for r in rows]
                lengths = torch.tensor([len(c) for c in context])
                ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
                for i, c in enumerate(context):
                    ids[i, : len(c)] = torch.tensor(c)
                logits = self(ids.to(device))[torch.arange(len(rows)), lengths - 1].float().cpu()  # (N, V)
                tokens = choose(logits, chances[:, t], temperature, top_k, top_p).tolist()
                yield [None if done[i] else tokens[i] for i in range(len(rows))]
                for i, row in enumerate(rows):
                    row.append(tokens[i])
                    tail = row[starts[i]:][-len(stop):] if stop else []
                    done[i] = done[i] or (bool(stop) and tail == list(stop))
                if all(done):
                    return
        finally:
            self.train(was_training)


def choose(logits: Tensor, chance: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Pick one id a row from logits (N, V) with the uniform numbers chance (N,) in [0, 1). Returns (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = torch.sort((logits / temperature).softmax(-1), dim=-1, descending=True, stable=True)
    total = probs.cumsum(-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        keep &= total - probs < top_p  # a token stays while those before it do not reach p
    keep[:, 0] = True
    total = (probs * keep).cumsum(-1)
    pick = torch.searchsorted(total, chance[:, None] * total[:, -1:], right=True)
    pick = torch.minimum(pick, keep.sum(-1, keepdim=True) - 1)
    return order.gather(-1, pick).squeeze(-1)


def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter its GPT-2 initial value, a pure function of (seed, name, shape).

    Matrices are normal with deviation 0.02, biases 0, norm weights 1; the projections back to the residual stream
    are scaled by 1/sqrt(2 n_layer). Source: Radford et al. 2019, section 2.3.
    """
    n_layer = model.config.n_layer if isinstance(model, GPT) else 1
    for name, p in model.named_parameters():  # a tied parameter appears once, under its first name
        if p.ndim < 2:
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
            continue
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02
        with torch.no_grad():
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=_generator(seed, name)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

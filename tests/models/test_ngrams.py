"""Embeddings of the last few tokens, against a loop over Python's own integers."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptexp.audits.influence import measure, train_mode
from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.ngrams import NGrams

V = 11
Lively = Callable[..., GPT]


def expected(layer: NGrams, row: list[int], base: int, rows: int, n: int) -> Tensor:
    """(L, C): for each position the sum over k of the row that the last k tokens have."""
    padded, out, offset = [base - 1] * (n - 1) + row, [], 0
    for k in range(2, n + 1):
        size, found = min(rows, base**k), []
        for i in range(len(row)):
            last = padded[n - 1 + i - k + 1 : n - 1 + i + 1]
            number = sum(token * base**back for back, token in enumerate(reversed(last)))
            if base**k > rows:
                wrapped = number * 0x9E3779B97F4A7C15 % 2**64
                signed = wrapped - 2**64 if wrapped >= 2**63 else wrapped
                number = (signed >> 24) % 2**40 % size
            found.append(offset + number)
        out.append(layer.weight[found])
        offset += size
    return torch.stack(out).sum(0)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 3, V, 257, 70_000]), n=st.integers(2, 5), rows=st.sampled_from([1, 7, 150, 2000]),
    draw=st.randoms(use_true_random=False), length=st.integers(1, 9),
)  # fmt: skip
def test_each_length_has_its_row(vocab: int, n: int, rows: int, draw, length: int) -> None:
    layer = NGrams(GPTConfig(vocab_size=vocab, n_embd=4, n_head=1, ngram=n, ngram_rows=rows))
    ids = [[draw.randrange(vocab) for _ in range(length)] for _ in range(2)]
    with torch.no_grad():
        found = layer(torch.tensor(ids))
        for row, got in zip(ids, found, strict=True):
            torch.testing.assert_close(got, expected(layer, row, vocab + 1, rows, n))


def test_given_the_tokens_before_a_part_is_embedded_as_in_the_whole() -> None:
    layer, ids = NGrams(GPTConfig(vocab_size=V, n_embd=4, n_head=1, ngram=4)), torch.arange(10)[None] % V
    whole = layer(ids)
    assert torch.equal(layer(ids[:, 6:], preceding=ids[:, 3:6]), whole[:, 6:])
    assert torch.equal(layer(ids[:, 1:], preceding=torch.tensor([[V, V, 0]])), whole[:, 1:])


def test_the_hash_spreads_sequences_evenly() -> None:
    rows, base = 4096, 66
    config = GPTConfig(vocab_size=base - 1, n_embd=1, n_head=1, ngram=3, ngram_rows=rows)
    layer = NGrams(config)
    with torch.no_grad():  # each row says its own number; those of pairs say 0
        layer.weight.copy_(torch.cat([torch.zeros(rows), torch.arange(float(rows))])[:, None])
        ids = torch.cartesian_prod(*[torch.arange(base - 1)] * 3)
        counts = Counter(layer(ids)[:, 2, 0].int().tolist())
    mean = len(ids) / rows  # 67
    assert len(counts) == rows
    assert max(counts.values()) < 2 * mean
    assert min(counts.values()) > mean / 3


@pytest.mark.parametrize("init", ["gpt2", "torch", "xavier"])
def test_at_first_they_change_nothing(small: Callable[..., GPTConfig], init: str) -> None:
    ids = torch.arange(8)[None]
    plain, with_ngrams = (GPT(small(init=init, ngram=n), seed=3).eval() for n in (1, 4))
    assert torch.equal(plain(ids), with_ngrams(ids))
    assert with_ngrams.n_params - plain.n_params == 16 * (12**2 + 12**3 + 16384)


@pytest.mark.parametrize("n", [2, 4])
def test_a_prediction_sees_the_tokens_so_far_alone(lively: Lively, n: int) -> None:
    model = lively(ngram=n, ngram_rows=50, n_layer=0, position="none")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    logits = model(ids)
    for t in range(8):
        other = ids.clone()
        other[0, t] = 0
        changed = (model(other) - logits).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [t <= i < t + n for i in range(8)]


def test_the_audit_looks_up_the_true_tokens(lively: Lively) -> None:
    """The map of influence is the gradient with respect to what wte gives, in a forward pass over the very tokens."""
    ids = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(1))
    model = lively(ngram=3, tie_weights=False)
    found = measure(model, ids, training=True)
    assert not found.model.looks_ahead
    assert not found.model.couples
    model.double().train()
    embedded: list[Tensor] = []
    model.wte.register_forward_hook(lambda layer, args, y: embedded.append(y))
    logits = model(ids)
    directions = torch.randn(8, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(8):
        (grad,) = torch.autograd.grad(logits[0, t] @ directions[t], embedded[0], retain_graph=True)
        torch.testing.assert_close(grad[0].norm(dim=-1), found.map[t])


def test_batch_norm_looks_ahead_with_ngrams_too() -> None:
    assert not train_mode(GPTConfig(ngram=4)).looks_ahead
    assert train_mode(GPTConfig(ngram=4, norm="batchnorm")).looks_ahead

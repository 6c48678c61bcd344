"""Attention against a loop that can be read off the paper, and the position encodings against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from gptexp.models.attention import CausalSelfAttention, apply_rope, rope_table, sinusoidal_table
from gptexp.models.gpt import GPT
from gptexp.models.settings import GPTConfig


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_attention(attn: CausalSelfAttention, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """One sequence, one head, one query and one key at a time."""
    N, L, C = x.shape
    D = C // attn.n_head
    w, b = attn.qkv.weight, attn.qkv.bias if attn.qkv.bias is not None else torch.zeros(3 * C, dtype=x.dtype)
    y = torch.zeros_like(x)
    for n in range(N):
        for h in range(attn.n_head):
            part = slice(h * D, (h + 1) * D)
            q, k, v = (x[n] @ w[i * C : (i + 1) * C][part].T + b[i * C : (i + 1) * C][part] for i in range(3))
            if rope is not None:
                q, k = apply_rope(q, *rope), apply_rope(k, *rope)
            for t in range(L):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(D) for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                y[n, t, part] = sum(weights[s] * v[s] for s in range(t + 1))
    return y @ attn.proj.weight.T + (attn.proj.bias if attn.proj.bias is not None else 0.0)


@pytest.mark.parametrize("n_head", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rope"])
def test_attention_is_its_formula(n_head: int, bias: bool, rotate: bool) -> None:
    N, L, C = 2, 5, 16
    attn = CausalSelfAttention(GPTConfig(n_head=n_head, n_embd=C, bias=bias)).double()
    with torch.no_grad():
        for i, p in enumerate(attn.parameters()):
            p.copy_(random(*p.shape, seed=i + 1))
    cos, sin = rope_table(L, C // n_head)
    rope = (cos.double(), sin.double()) if rotate else None
    x = random(N, L, C)
    torch.testing.assert_close(attn(x, rope), naive_attention(attn, x, rope))


@pytest.mark.parametrize(
    ("bias", "qkv_bias", "expected"),
    [
        (False, None, (False, False)),
        (True, None, (True, True)),
        (True, False, (False, True)),
        (False, True, (True, False)),
    ],
)
def test_qkv_bias_is_apart_from_bias(bias: bool, qkv_bias: bool | None, expected: tuple[bool, bool]) -> None:
    attn = CausalSelfAttention(GPTConfig(bias=bias, qkv_bias=qkv_bias))
    assert (attn.qkv.bias is not None, attn.proj.bias is not None) == expected


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_sinusoidal_table_is_the_published_formula(channels: int) -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d))."""
    table = sinusoidal_table(100, channels)
    assert table.shape == (100, channels)
    for pos in (0, 1, 7, 99):
        for i in range(channels // 2):
            angle = pos / 10000 ** (2 * i / channels)
            assert float(table[pos, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[pos, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("head_dim", [2, 8, 32])
def test_rope_turns_each_pair_of_channels_by_its_angle(head_dim: int) -> None:
    """Channels j and j + D/2 are the parts of a complex number, which is multiplied by exp(i pos / 10000^(2j/D))."""
    length, half = 50, head_dim // 2
    x = random(length, head_dim)
    cos, sin = rope_table(length, head_dim)
    rotated = apply_rope(x, cos.double(), sin.double())
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(half).double() * 2 / head_dim)
    expected = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angle)
    torch.testing.assert_close(rotated, torch.cat([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    length, D = 40, 16
    cos, sin = (t.double() for t in rope_table(length, D))
    q, k = (apply_rope(random(D, seed=i).expand(length, D), cos, sin) for i in (1, 2))
    scores = q @ k.T  # the same q and k at every pair of positions
    for distance in range(length):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert float(scores[:, 0].std()) > 0.1  # but they do depend on it


@pytest.mark.parametrize("position", ["rope", "none"])
def test_without_an_encoding_order_is_lost(position: str) -> None:
    """The last position of a single layer sees the earlier ones as a set, unless something marks their places."""
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16, position=position)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    first, second = model(torch.tensor([[1, 2, 3, 4]]))[0, -1], model(torch.tensor([[3, 1, 2, 4]]))[0, -1]
    assert torch.allclose(first, second) == (position == "none")

"""Attention against a loop that can be read off the paper, and the position encodings against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gptexp.models.attention import CausalSelfAttention
from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.positions import Relative, Rotation, rope_table, sinusoidal_table, within
from gptexp.registry import POSITIONS

EPS = 1e-2  # of the norm of queries and keys; large, so that it shows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_attention(config: GPTConfig, attn: CausalSelfAttention, x: Tensor, rope: Rotation | None) -> Tensor:
    """One sequence, one head, one query and one key at a time."""
    N, L, C = x.shape
    H, K = config.n_head, config.n_kv_head or config.n_head
    D = config.head_dim or C // H
    divisor = math.sqrt(D) if config.attention_scale else 1.0
    starts = (0, H * D, (H + K) * D, (H + 2 * K) * D)

    def projected(n: int, i: int) -> Tensor:
        part = slice(starts[i], starts[i + 1])
        return x[n] @ attn.qkv.weight[part].T + (attn.qkv.bias[part] if attn.qkv.bias is not None else 0.0)

    def normed(v: Tensor, weight: Tensor) -> Tensor:
        return v / torch.sqrt((v * v).sum(-1, keepdim=True) / v.shape[-1] + EPS) * weight

    def capped(score: Tensor) -> Tensor:
        c = config.attention_softcap
        return score if c is None else c * (1 - 2 / (1 + torch.exp(2 * score / c)))

    y = torch.zeros(N, L, H * D, dtype=x.dtype)
    for n in range(N):
        q_all, k_all, v_all = (projected(n, i) for i in range(3))
        if config.qk_norm == "full":
            q_all, k_all = normed(q_all, attn.q_norm.weight), normed(k_all, attn.k_norm.weight)
        for h in range(H):
            part, shared = slice(h * D, (h + 1) * D), slice(h * K // H * D, (h * K // H + 1) * D)
            q, k, v = q_all[:, part], k_all[:, shared], v_all[:, shared]
            if config.qk_norm == "head" or config.placement == "hybrid":
                q, k = normed(q, attn.q_norm.weight), normed(k, attn.k_norm.weight)
            if config.placement == "hybrid":
                v = normed(v, attn.v_norm.weight)
            if rope is not None:
                q, k = rope(q), rope(k)
            for t in range(L):
                seen = range(max(0, t + 1 - (config.window or L)), t + 1)
                scores = torch.stack([capped(q[t] @ k[s] / divisor) for s in seen])
                weights = scores.exp() / scores.exp().sum()
                y[n, t, part] = sum(w * v[s] for w, s in zip(weights, seen, strict=True))
            if attn.gate is not None:
                rows = slice(h, h + 1) if config.attention_gate == "head" else part
                y[n, :, part] /= 1 + torch.exp(-x[n] @ attn.gate.weight[rows].T)
    if not config.projection:
        return y
    return y @ attn.proj.weight.T + (attn.proj.bias if attn.proj.bias is not None else 0.0)


def random_attention(**settings: Any) -> tuple[GPTConfig, CausalSelfAttention]:
    config = GPTConfig(n_embd=16, norms={"rmsnorm": {"eps": EPS}}, **settings)
    attn = CausalSelfAttention(config).double()
    with torch.no_grad():
        for i, p in enumerate(attn.parameters()):
            p.copy_(random(*p.shape, seed=i + 1) / 2 + float(p.ndim == 1) / 2)
    return config, attn


def double_rope(length: int, head_dim: int) -> Rotation:
    return Rotation(*(part.double() for part in rope_table(length, head_dim)))


rotated = pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rope"])


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 1},
        {"n_head": 2, "bias": True},
        {"n_head": 4, "attention_scale": False},
        {"n_head": 2, "projection": False},
        {"n_head": 2, "qk_norm": "head"},
        {"n_head": 2, "qk_norm": "full", "bias": True},
        {"n_head": 2, "qk_norm": "full", "attention_scale": False, "projection": False},
        {"n_head": 2, "placement": "hybrid", "norm": "rmsnorm"},  # norms of each head's queries, keys and values
        {"n_head": 4, "placement": "hybrid", "norm_attention": "rmsnorm", "attention_scale": False},
        {"n_head": 4, "n_kv_head": 2, "qkv_bias": True},
        {"n_head": 4, "n_kv_head": 1, "head_dim": 6, "qk_norm": "head"},
        {"n_head": 4, "n_kv_head": 2, "qk_norm": "full", "window": 2},
        {"n_head": 2, "head_dim": 4, "window": 3, "attention_softcap": 0.7},
        {"n_head": 4, "n_kv_head": 2, "attention_softcap": 2.0, "attention_gate": "head"},
        {"n_head": 2, "attention_gate": "channel", "placement": "hybrid", "n_kv_head": 1, "norm": "rmsnorm"},
    ],
    ids=str,
)
@rotated
def test_attention_is_its_formula(changes: dict, rotate: bool) -> None:
    config, attn = random_attention(**changes)
    rope = double_rope(5, config.head_size) if rotate else None
    x, relative = random(2, 5, 16), Relative(rope)
    if config.window:
        relative = within(config.window, relative, slice(5), x.device)
    torch.testing.assert_close(attn(x, relative), naive_attention(config, attn, x, rope))
    assert (attn.proj is None) == (not config.projection)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "head"}, {"qk_norm": "full", "attention_scale": False},
                                     {"attention_softcap": 0.5}], ids=str)  # fmt: skip
@rotated
def test_logits_are_what_the_softmax_sees(changes: dict, rotate: bool) -> None:
    _, attn = random_attention(n_head=2, **changes)
    rope = double_rope(5, 8) if rotate else None
    x = random(3, 5, 16)
    logits, (_, _, v) = attn.logits(x, Relative(rope)), attn.heads(x, Relative(rope))
    assert logits.shape == (3, 2, 5, 5)
    later = torch.arange(5) > torch.arange(5)[:, None]
    assert bool((logits[..., later] == -math.inf).all())
    assert bool(logits[..., ~later].isfinite().all())
    y = torch.cat([(logits.softmax(-1) @ v)[:, h] for h in range(2)], -1)  # (N, L, C)
    torch.testing.assert_close(attn(x, Relative(rope)), y @ attn.proj.weight.T)


@pytest.mark.parametrize(
    ("bias", "qkv_bias", "expected"),
    [(False, None, (False, False)), (True, None, (True, True)), (True, False, (False, True)),
     (False, True, (True, False))],
)  # fmt: skip
def test_qkv_bias_is_apart_from_bias(bias: bool, qkv_bias: bool | None, expected: tuple[bool, bool]) -> None:
    attn = CausalSelfAttention(GPTConfig(bias=bias, qkv_bias=qkv_bias))
    assert (attn.qkv.bias is not None, attn.proj.bias is not None) == expected


def test_values_of_the_first_layer_are_mixed_into_the_others() -> None:
    """With weights of their own, which start at one half each: "learnable ResFormer"."""
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, value_residual=True, position="rope")).double()
    assert [block.attn.value_mix is None for block in model.blocks] == [True, False, False]
    assert all(block.attn.value_mix.tolist() == [0.5, 0.5] for block in model.blocks[1:])
    with torch.no_grad():
        model.blocks[1].attn.value_mix.copy_(torch.tensor([0.3, 0.9]))
    inputs, read = {}, {}
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda _, args, out, i=i: inputs.update({i: args[0]}))
        block.attn.proj.register_forward_hook(lambda _, args, out, i=i: read.update({i: args[0]}))
    model(torch.arange(8)[None])
    values = {i: model.blocks[i].attn.heads(x)[2] for i, x in inputs.items()}
    for i, (own, first) in {0: (1.0, 0.0), 1: (0.3, 0.9), 2: (0.5, 0.5)}.items():
        mixed = own * values[i] + first * values[0]
        weights = model.blocks[i].attn.logits(inputs[i], model.wpe.relative(slice(8))).softmax(-1)
        torch.testing.assert_close(read[i], (weights @ mixed).transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


def test_capped_logits() -> None:
    model, capped = (GPT(GPTConfig(n_layer=1, n_embd=16, logit_softcap=cap)) for cap in (None, 0.01))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(capped(ids), 0.01 * torch.tanh(model(ids) / 0.01))


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_the_base_of_rotary_frequencies(theta: float) -> None:
    cos, sin = rope_table(9, 8, theta)
    for j in range(4):
        angle = 5 * theta ** (-2 * j / 8)
        assert (float(cos[5, j]), float(sin[5, j + 4])) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-6)


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
    rotated = Rotation(cos.double(), sin.double())(x)
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(half).double() * 2 / head_dim)
    expected = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angle)
    torch.testing.assert_close(rotated, torch.cat([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n_head", "slopes"),
    [(1, [2**-8]), (2, [2**-4, 2**-8]), (4, [2**-2, 2**-4, 2**-6, 2**-8]),
     (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])],
)  # fmt: skip
def test_alibi_subtracts_a_multiple_of_the_distance(n_head: int, slopes: list[float]) -> None:
    """For queries of a whole row, and for one query of each of two rows at different positions."""
    config = GPTConfig(block_size=9, n_embd=4 * n_head, n_head=n_head, position="alibi")
    alibi = POSITIONS["alibi"].made(None, config)
    bias = alibi.relative(slice(2, 9)).bias
    assert bias.shape == (n_head, 7, 9)
    single = alibi.relative(torch.tensor([[3], [8]])).bias
    assert single.shape == (2, n_head, 1, 9)
    for h, slope in enumerate(slopes):
        for i in range(2, 9):
            expected = [-slope * (i - j) if j <= i else -math.inf for j in range(9)]
            assert bias[h, i - 2].tolist() == expected
            assert i not in (3, 8) or single[int(i == 8), h, 0].tolist() == expected
    x = random(2, 9, 4 * n_head)
    assert torch.equal(alibi.embed(x, slice(9)), x)


@pytest.mark.parametrize("position", POSITIONS)
def test_without_an_encoding_order_is_lost(position: str) -> None:
    """The last position of a single layer sees the earlier ones as a set, unless something marks their places."""
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16, position=position)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    first, second = model(torch.tensor([[1, 2, 3, 4]]))[0, -1], model(torch.tensor([[3, 1, 2, 4]]))[0, -1]
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-9) == (position == "none")

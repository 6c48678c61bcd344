"""The optimizers against their update rules written out by hand, and who decays."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.training.muon import MuonConfig, orthogonalized
from gptexp.training.optimizers import AdamWConfig, Parameters, SGDConfig


def build(config: AdamWConfig | SGDConfig | MuonConfig, module: nn.Module) -> torch.optim.Optimizer:
    matrices = {name for name, p in module.named_parameters() if p.ndim >= 2}
    parameters = Parameters([*module.named_parameters()], matrices, getattr(module, "hidden_matrices", {}))
    optimizer: torch.optim.Optimizer = config.build(parameters, config.learning_rate, fused=True)
    return optimizer


def test_only_matrices_decay() -> None:
    model = GPT(GPTConfig(n_layer=2, n_embd=8, n_head=2, bias=True))
    optimizer = build(AdamWConfig(weight_decay=0.3), model)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))  # each once, the tied head too
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.3 if p.ndim >= 2 else 0.0), name


def test_adamw_step() -> None:
    torch.manual_seed(0)
    layer, lr, b1, b2, eps, wd = nn.Linear(3, 2), 0.01, 0.8, 0.9, 1e-6, 0.1
    start = {n: p.detach().double() for n, p in layer.named_parameters()}
    optimizer = build(AdamWConfig("adamw", lr, b1, b2, eps, wd), layer)
    m = {n: torch.zeros_like(p) for n, p in start.items()}
    v = {n: torch.zeros_like(p) for n, p in start.items()}
    for t in range(1, 4):
        for n, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[n], v[n] = b1 * m[n] + (1 - b1) * g, b2 * v[n] + (1 - b2) * g**2
            step = lr * (m[n] / (1 - b1**t)) / ((v[n] / (1 - b2**t)).sqrt() + eps)
            start[n] = start[n] * (1 - lr * (wd if n == "weight" else 0)) - step
        optimizer.step()
    for n, p in layer.named_parameters():
        torch.testing.assert_close(p.detach().double(), start[n], rtol=1e-5, atol=1e-7)


def test_sgd_step() -> None:
    layer = nn.Linear(2, 2, bias=False)
    w = layer.weight.detach().clone()
    optimizer = build(SGDConfig(learning_rate=0.5, momentum=0.9, weight_decay=0.0), layer)
    for _ in range(2):
        layer.weight.grad = torch.ones(2, 2)
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), w - 0.5 * (1 + 1.9))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_newton_schulz_moves_singular_values_alone(n: int, rows: int, more: int, times: int, seed: int) -> None:
    x = torch.randn(n, rows, rows + more, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (x.square().sum((1, 2)).sqrt() + 1e-7)[:, None]
    for _ in range(times):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalized(x, times), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-8)


def test_five_iterations_are_near_orthogonal() -> None:
    values = torch.linalg.svdvals(orthogonalized(torch.randn(4, 32, 128), 5))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def gpt_with_gradients(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=16, n_head=2, bias=True, tie_weights=False, **changes))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}], ids=str)
def test_muon_is_torchs_own_on_hidden_matrices(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which works in bfloat16 unless it is kept from it, and takes q, k and v for one matrix."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
    model, config = gpt_with_gradients(**changes), MuonConfig(weight_decay=0.3, learning_rate=0.05)
    pieces = {f"{name}/{i}": part.detach().clone() for name, rows in model.hidden_matrices.items()
              for i, part in enumerate(model.get_parameter(name).split(rows))}  # fmt: skip
    assert len(pieces) == 2 * (3 + 1 + 1 + 1)
    theirs = torch.optim.Muon(list(pieces.values()), lr=0.05, weight_decay=0.3, momentum=0.95)
    ours = build(config, model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for key, piece in pieces.items():
            name, _, i = key.partition("/")
            grad = model.get_parameter(name).grad
            assert grad is not None
            piece.grad = grad.split(model.hidden_matrices[name])[int(i)]
        ours.step()
        theirs.step()
    for key, piece in pieces.items():
        name, _, i = key.partition("/")
        part = model.get_parameter(name).split(model.hidden_matrices[name])[int(i)]
        torch.testing.assert_close(part.detach(), piece, rtol=1e-5, atol=1e-6)


def test_muon_leaves_all_else_to_adamw() -> None:
    model, config = gpt_with_gradients(), MuonConfig(learning_rate=0.02, adam_learning_rate=0.004, weight_decay=0.5)
    rest = {n: p for n, p in model.named_parameters() if n not in model.hidden_matrices}
    assert {"wte.weight", "wpe.weight", "head.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= rest.keys()
    copies = {n: p.detach().clone() for n, p in rest.items()}
    theirs = torch.optim.AdamW(copies.values(), lr=0.004, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    ours = build(config, model)
    for _ in range(3):
        for name, p in rest.items():
            copies[name].grad = p.grad
        ours.step()
        theirs.step()
    for name, p in rest.items():
        torch.testing.assert_close(p.detach(), copies[name])


def test_muon_goes_on_from_its_state() -> None:
    first, second = gpt_with_gradients(), gpt_with_gradients()
    optimizer = build(MuonConfig(), first)
    optimizer.step()
    stored = {k: v.clone() for k, v in first.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    second.load_state_dict(stored[0])
    other = build(MuonConfig(), second)
    other.load_state_dict(stored[1])
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        q.grad = p.grad
    other.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)

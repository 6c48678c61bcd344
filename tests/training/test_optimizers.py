"""The optimizers against their update rules written out by hand, and who decays."""

import torch
from torch import nn

from gptexp.models.gpt import GPT
from gptexp.models.settings import GPTConfig
from gptexp.training.optimizers import build_optimizer
from gptexp.training.settings import AdamWConfig, SGDConfig


def build(config: AdamWConfig | SGDConfig, module: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(config, module.named_parameters(), {n for n, p in module.named_parameters() if p.ndim >= 2})


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

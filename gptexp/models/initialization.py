"""Initial values: a parameter's are a pure function of the seed, its name and its shape.

Norms keep the constants that they start with: weights 1, biases 0. All other biases are 0, and all other weights are
normal around 0. For a GPT, this is their standard deviation, with n = n_layer, C = n_embd and V = vocab_size:

    weight               init=gpt2      init=xavier                  placement=deepnorm
    wte, wpe             0.02           1 / sqrt(C)                  0.02
    head, if not tied    0.02           sqrt(2 / (C + V))            0.02
    queries, keys        0.02           1 / sqrt(C)                  1 / sqrt(C)
    values               0.02           1 / sqrt(C)                  beta / sqrt(C)
    mlp.fc, mlp.gate     0.02           sqrt(2 / (inputs + outputs)) beta sqrt(2 / (inputs + outputs))
    attn.proj, mlp.proj  0.02/sqrt(2n)  sqrt(2 / (inputs + outputs)) beta sqrt(2 / (inputs + outputs))
    ngram                0              0                            0

beta is (8 n)^(-1/4). With zero_init=true, attn.proj and mlp.proj are 0. With init=torch, all is as in torch's own
layers: embeddings are standard normal; weights and biases of linear layers uniform within 1 / sqrt(inputs).

Sources: Radford et al. 2019, section 2.3 (gpt2); Glorot, Bengio 2010 (xavier); Wang et al. 2022, "DeepNet" (deepnorm).
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def initialize(model: nn.Module, seed: int, std: Callable[[str], float | Tensor] | None = None) -> None:
    """Draw the weights of linear layers and embeddings.

    Args:
        model: whose parameters are set, in place.
        seed: any integer.
        std: the standard deviation of a weight or bias, by the parameter's name; None for torch's own distributions.
    """
    for name, p in model.named_parameters():  # a tied parameter once, under its first name
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        generator = seeded(seed, name)
        if std is None and isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(p, -bound, bound, generator=generator)
        elif std is None:
            nn.init.normal_(p, generator=generator)
        elif isinstance(deviation := std(name), Tensor) or deviation:
            with torch.no_grad():
                p.copy_(torch.empty(p.shape).normal_(generator=generator) * deviation)
        else:
            nn.init.zeros_(p)


def gpt_std(config: Any, name: str, shape: torch.Size) -> float | Tensor:
    """The standard deviation of a weight of a GPT of these settings, `GPTConfig`: a number, or one for each row."""
    if name.endswith("bias"):
        return 0.0
    root, in_block = float(config.n_embd**-0.5), name.startswith("blocks.")
    beta = config.place.beta(config.n_layer) if in_block else None
    if in_block and (beta is not None or config.init == "xavier"):
        beta = 1.0 if beta is None else beta
        if name.endswith("qkv.weight"):
            return torch.tensor([1.0, 1.0, beta]).repeat_interleave(torch.tensor(config.qkv_sizes))[:, None] * root
        return float(beta * math.sqrt(2 / sum(shape)))
    if config.init == "xavier":
        return float(math.sqrt(2 / sum(shape)) if name == "head.weight" else root)
    return float(0.02 / math.sqrt(2 * config.n_layer) if name.endswith("proj.weight") else 0.02)


def seeded(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

"""The same weights in the published architectures, as transformers has them, give the same outputs.

Every parameter is random, biases and norm weights too, so that nothing agrees by being zero or one; and all is in
float64, where two right implementations agree to many more digits than two that differ in an epsilon.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.gpt import GPT
from gptexp.models.gpt_settings import GPTConfig
from gptexp.registry import NORMS

V, BLOCK, LAYERS, HEADS, C = 29, 16, 3, 4, 32
SIZES = {"vocab_size": V, "block_size": BLOCK, "n_layer": LAYERS, "n_head": HEADS, "n_embd": C}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # a tied parameter comes once
            p.normal_(float(p.ndim == 1) / 2, 0.2, generator=generator)  # vectors around 0.5, matrices around 0
    return model.double().eval()


def loaded(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """Our model with these weights; every one of its parameters must be among them, and nothing else."""
    model = GPT(config).double().eval()
    model.load_state_dict({name: w.detach().clone() for name, w in weights.items()}, strict=True)
    return model


@dataclass
class Pair:
    """Our model and theirs, their token embedding, and what our embedding is of theirs."""

    ours: GPT
    theirs: nn.Module
    embedding: nn.Module
    scale: float = 1.0


def blocks_of_gpt(blocks: nn.ModuleList, norm: str) -> dict[str, Tensor]:
    """The blocks of GPT and GPT-2. Their linear layers are Conv1D, whose weight is (in, out): ours transposed."""
    weights = {}
    for i, theirs in enumerate(blocks):
        for ours, part in {f"residual1.{norm}": theirs.ln_1, f"residual2.{norm}": theirs.ln_2}.items():
            weights |= {f"blocks.{i}.{ours}.weight": part.weight, f"blocks.{i}.{ours}.bias": part.bias}
        linear = {"attn.qkv": theirs.attn.c_attn, "attn.proj": theirs.attn.c_proj,
                  "mlp.fc": theirs.mlp.c_fc, "mlp.proj": theirs.mlp.c_proj}  # fmt: skip
        for ours, part in linear.items():
            weights |= {f"blocks.{i}.{ours}.weight": part.weight.T, f"blocks.{i}.{ours}.bias": part.bias}
    return weights


def gpt2() -> Pair:
    """GPT-2 is pre-norm, its gelu is the tanh form ("gelu_new")."""
    config = hf.GPT2Config(vocab_size=V, n_positions=BLOCK, n_layer=LAYERS, n_head=HEADS, n_embd=C,
                        bos_token_id=None, eos_token_id=None, attn_implementation="eager")  # fmt: skip
    theirs = randomized(hf.GPT2LMHeadModel(config))
    body = theirs.transformer
    weights = {"wte.weight": body.wte.weight, "wpe.weight": body.wpe.weight, "head.weight": body.wte.weight,
               "norm_f.weight": body.ln_f.weight, "norm_f.bias": body.ln_f.bias}  # fmt: skip
    ours = loaded(GPTConfig(**SIZES, bias=True, activation="gelu_tanh"), weights | blocks_of_gpt(body.h, "before"))
    return Pair(ours, theirs, body.wte)


def gpt1() -> Pair:
    """The first GPT is post-norm, without a final norm. What its configuration calls "gelu" is the tanh form, too."""
    config = hf.OpenAIGPTConfig(vocab_size=V, n_positions=BLOCK, n_layer=LAYERS, n_head=HEADS, n_embd=C, afn="gelu")
    theirs = randomized(hf.OpenAIGPTLMHeadModel(config))
    body = theirs.transformer
    weights = {"wte.weight": body.tokens_embed.weight, "wpe.weight": body.positions_embed.weight,
               "head.weight": body.tokens_embed.weight}  # fmt: skip
    config = GPTConfig(**SIZES, bias=True, activation="gelu_tanh", placement="post")
    return Pair(loaded(config, weights | blocks_of_gpt(body.h, "around")), theirs, body.tokens_embed)


EPS = NORMS.defaults()["rmsnorm"]["eps"]
THEIR_SIZES = {
    "vocab_size": V, "max_position_embeddings": BLOCK, "num_hidden_layers": LAYERS, "hidden_size": C,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "intermediate_size": 88,  # 8/3 of 32, rounded up to a multiple of 8
    "rms_norm_eps": EPS, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip


def llama_like(theirs: nn.Module, norms: dict[str, str], plus: float = 0.0, scale: float = 1.0, **changes: Any) -> Pair:
    """Llama and its kin: RMSNorm, rotary positions, a gated feed-forward layer, no bias, and a head of its own.

    Args:
        theirs: its parameters are set here.
        norms: our names of a block's norms, and theirs.
        plus: added to the weights of their norms.
        scale: of their token embeddings.
        changes: of our configuration.
    """
    body = randomized(theirs).model
    weights = {"wte.weight": scale * body.embed_tokens.weight, "norm_f.weight": plus + body.norm.weight,
               "head.weight": theirs.lm_head.weight}  # fmt: skip
    for i, layer in enumerate(body.layers):
        a, m = layer.self_attn, layer.mlp
        parts = {"attn.qkv": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                 "attn.proj": a.o_proj.weight, "mlp.gate": m.gate_proj.weight, "mlp.fc": m.up_proj.weight,
                 "mlp.proj": m.down_proj.weight}  # fmt: skip
        parts |= {ours: plus + layer.get_submodule(other).weight for ours, other in norms.items()}
        weights |= {f"blocks.{i}.{name}.weight": w for name, w in parts.items()}
    config = GPTConfig(**SIZES, norm="rmsnorm", activation="swiglu", position="rope", tie_weights=False, **changes)
    return Pair(loaded(config, weights), theirs, body.embed_tokens, scale)


PRE = {"residual1.before": "input_layernorm", "residual2.before": "post_attention_layernorm"}
OF_HEADS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def llama() -> Pair:
    return llama_like(hf.LlamaForCausalLM(hf.LlamaConfig(**THEIR_SIZES)), PRE)


def qwen3() -> Pair:
    """Llama with a norm of each head's queries and keys."""
    theirs = hf.Qwen3ForCausalLM(hf.Qwen3Config(**THEIR_SIZES, head_dim=C // HEADS))
    return llama_like(theirs, PRE | OF_HEADS, qk_norm="head")


def qwen3_grouped() -> Pair:
    """Keys and values of half as many heads, which are wider than C / H; and slower rotations."""
    sizes = THEIR_SIZES | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    theirs = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=12))
    return llama_like(theirs, PRE | OF_HEADS, qk_norm="head", n_kv_head=2, head_dim=12, rope_theta=500.0)


def mistral() -> Pair:
    """Llama with one head of keys and values, and a sliding window."""
    sizes = THEIR_SIZES | {"num_key_value_heads": 1}
    theirs = hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=5))
    return llama_like(theirs, PRE, n_kv_head=1, window=5)


def olmo2() -> Pair:
    """Norms of the sub-layers' outputs, and of all queries and all keys together."""
    theirs = hf.Olmo2ForCausalLM(hf.Olmo2Config(**THEIR_SIZES))
    output = {"residual1.after": "post_attention_layernorm", "residual2.after": "post_feedforward_layernorm"}
    return llama_like(theirs, output | OF_HEADS, placement="output", qk_norm="full")


def gemma2() -> Pair:
    """Norms of the sub-layers' inputs and outputs, and soft caps of both kinds of logits.

    Its norms multiply by 1 + weight, and its embeddings by sqrt(C). Its sliding windows are turned off.
    """
    config = hf.Gemma2Config(**THEIR_SIZES, head_dim=C // HEADS, query_pre_attn_scalar=C // HEADS, sliding_window=BLOCK,
                          layer_types=["full_attention"] * LAYERS, hidden_activation="silu",
                          attn_logit_softcapping=0.8, final_logit_softcapping=3.0)  # fmt: skip
    sandwich = {"residual1.before": "input_layernorm", "residual1.after": "post_attention_layernorm",
                "residual2.before": "pre_feedforward_layernorm",
                "residual2.after": "post_feedforward_layernorm"}  # fmt: skip
    return llama_like(hf.Gemma2ForCausalLM(config), sandwich, plus=1.0, scale=math.sqrt(C), placement="sandwich",
                      attention_softcap=0.8, logit_softcap=3.0)  # fmt: skip


# The rotary tables and norms of Llama and its kin are float32 in transformers, whatever the weights are.
MODELS = {gpt2: 1e-10, gpt1: 1e-10, llama: 1e-5, qwen3: 1e-5, qwen3_grouped: 1e-5, mistral: 1e-5, olmo2: 1e-5,
          gemma2: 1e-5}  # fmt: skip
Build = Callable[[], Pair]
every_model = pytest.mark.parametrize(("build", "tolerance"), MODELS.items(), ids=[m.__name__ for m in MODELS])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(1))


@every_model
def test_logits_are_equal(build: Build, tolerance: float, ids: Tensor) -> None:
    pair = build()
    ours, theirs = pair.ours, pair.theirs
    assert ours.n_params == sum(p.numel() for p in theirs.parameters())
    for length in (1, 5, BLOCK):
        with torch.no_grad():
            mine, other = ours(ids[:, :length]), theirs(ids[:, :length]).logits
        assert float(other.std()) > 0.4  # there is something to compare
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@every_model
def test_gradients_of_the_loss_are_equal(build: Build, tolerance: float, ids: Tensor) -> None:
    """With respect to the token embedding, which is the farthest from the loss (and, when tied, the nearest)."""
    pair = build()
    mine, other = (
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        for logits in (pair.ours(ids[:, :-1]), pair.theirs(ids[:, :-1]).logits)
    )
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    mine.backward()
    other.backward()
    grad = pair.embedding.weight.grad
    assert float(grad.abs().max()) > 1e-3
    torch.testing.assert_close(pair.ours.wte.weight.grad * pair.scale, grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("build", [gpt2, llama, qwen3, qwen3_grouped, mistral, olmo2, gemma2])
def test_greedy_text_is_that_of_transformers(build: Build, ids: Tensor) -> None:
    pair = build()
    ours, theirs = pair.ours, pair.theirs
    prompts = ids[:, :4]
    text = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=12)
    assert ours.generate(prompts.tolist(), 12, temperature=0) == text[:, 4:].tolist()
    assert len(set(text[:, 4:].flatten().tolist())) > 3  # it does say something

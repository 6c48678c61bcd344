"""What an output may depend on: not on later tokens, not on padding; and dropout, which acts in training alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.models.attention import CausalSelfAttention
from gptexp.models.batchnorms import PowerNorm
from gptexp.models.gpt import GPT, FeedForward
from gptexp.models.registry import NORMS, PLACEMENTS
from gptexp.models.settings import ACTIVATIONS, POSITIONS, GPTConfig

VERDICTS: dict[str, tuple[dict[str, dict[str, Any]], bool, bool]] = {
    "layernorm": ({}, False, False),
    "layernorm[plain]": ({"layernorm": {"affine": False}}, False, False),
    "rmsnorm": ({}, False, False),
    "prmsnorm": ({}, False, False),
    "scalenorm": ({}, False, False),
    "dyt": ({}, False, False),
    "groupnorm": ({}, False, False),
    "batchnorm": ({}, True, True),  # its statistics run over sequences and positions
    "batchnorm[batch]": ({"batchnorm": {"stats": ["batch"]}}, False, True),  # over sequences alone
    "rbn": ({}, True, True),
    "rbn[batch]": ({"rbn": {"stats": ["batch"]}}, False, True),
    "causal_batchnorm": ({}, False, True),  # over sequences and the positions so far
    "powernorm": ({}, False, False),  # divides by what it knew before this batch
    "powernorm[batch]": ({"powernorm": {"stats": "batch"}}, True, True),
    "powernorm[batch,plain]": ({"powernorm": {"stats": "batch", "prescale": False}}, True, True),
    "none": ({}, False, False),
}
"""Overrides of model.norms, and whether an output in training depends on later positions, and on other sequences.

In evaluation no output does. The name up to the bracket is `model.norm`.
"""

NORM_VARIANTS = [*NORMS, "batchnorm[batch]", "rbn[batch]", "powernorm[batch]"]
L, V = 8, 11
Lively = Callable[..., GPT]
every_norm = pytest.mark.parametrize("norm", NORM_VARIANTS)
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# Every norm and every placement with one kind of position and activation; all of these with two norms.
VARIANTS = [
    *((norm, placement, "learned", "gelu") for norm in NORM_VARIANTS for placement in PLACEMENTS),
    *(
        (norm, placement, position, activation)
        for norm in ("layernorm", "batchnorm") for placement in PLACEMENTS
        for position in POSITIONS for activation in ACTIVATIONS if (position, activation) != ("learned", "gelu")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "placement", "position", "activation"), VARIANTS)
def test_an_output_depends_on_no_later_token(
    lively: Lively, norm: str, placement: str, position: str, activation: str
) -> None:
    model = lively(norm=norm, placement=placement, position=position, activation=activation).double()
    ids = random_ids(1, L)
    others = ids.expand(L, L).clone()
    for t in range(L):  # row t differs from ids at every position after t
        others[t, t + 1 :] = (ids[0, t + 1 :] + 3) % V
    with torch.no_grad():
        base, changed = model(ids), model(others)
    for t in range(L):
        torch.testing.assert_close(changed[t, : t + 1], base[0, : t + 1], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(changed[t, t + 1 :], base[0, t + 1 :], rtol=1e-2, atol=1e-2) or t == L - 1


def reached(model: GPT, ids: Tensor, t: int) -> Tensor:
    """Where d logits[0, t] / d embedding is not exactly zero: (N, L)."""
    embedding: list[Tensor] = []
    hook = model.wte.register_forward_hook(lambda module, args, out: embedding.append(out))
    (grad,) = torch.autograd.grad(model(ids)[0, t].square().sum(), embedding)
    hook.remove()
    return grad.abs().amax(-1) > 0


def check_evaluation(model: GPT) -> None:
    """d logits[t] / d embedding[s] is exactly zero for s > t and in other sequences, and not for s <= t."""
    for t in range(L):
        own, other = reached(model.double().eval(), random_ids(2, L), t).tolist()
        assert own == [s <= t for s in range(L)]
        assert not any(other)


@pytest.mark.parametrize("name", VERDICTS)
@every_placement
def test_in_evaluation_gradients_reach_no_later_token(lively: Lively, name: str, placement: str) -> None:
    check_evaluation(lively(norm=name.partition("[")[0], norms=VERDICTS[name][0], placement=placement))


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@every_placement
@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "learned"])
def test_nor_do_they_with_other_positions(lively: Lively, norm: str, placement: str, position: str) -> None:
    check_evaluation(lively(norm=norm, placement=placement, position=position))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head"},
        {"qk_norm": "full", "attention_scale": False},
        {"residual": False},
        {"projection": False},
        {"n_inner": 0},
        {"init": "torch", "final_norm": False},
    ],
    ids=str,
)
def test_nor_do_they_with_other_settings(lively: Lively, changes: dict) -> None:
    check_evaluation(lively(**changes))


@pytest.mark.parametrize("name", VERDICTS)
@every_placement
def test_what_training_sees(lively: Lively, name: str, placement: str) -> None:
    """By gradients and by changed tokens. Each time in a new model, because a step of training moves averages."""
    norms, looks_ahead, couples = VERDICTS[name]

    def model() -> GPT:
        model = lively(norm=name.partition("[")[0], norms=norms, placement=placement).train().double()
        for module in model.modules():
            if isinstance(module, PowerNorm):  # whose own gradient reaches where its output does not
                module.exact_gradient = True
        return model

    ids = random_ids(4, L)
    for t in (0, 4, L - 2):
        reach = reached(model(), ids, t)
        assert reach[0, : t + 1].all()
        assert bool(reach[0, t + 1 :].any()) == looks_ahead
        assert bool(reach[1:].any()) == couples
        assert bool(reach[1:, t + 1 :].any()) == looks_ahead
    later, neighbour = ids.clone(), ids.clone()
    later[:, 5:] = (ids[:, 5:] + 3) % V
    neighbour[1:] = (ids[1:] + 3) % V
    base = model()(ids)
    assert torch.allclose(model()(later)[:, :5], base[:, :5]) != looks_ahead
    assert torch.allclose(model()(neighbour)[0], base[0]) != couples


def test_every_norm_has_a_verdict() -> None:
    assert {name.partition("[")[0] for name in VERDICTS} == set(NORMS)
    for name, (norms, _, _) in VERDICTS.items():
        assert set(norms) <= {name.partition("[")[0]}


# --- padding -----------------------------------------------------------------------------------------------------

MASK = torch.arange(L) < torch.tensor([[6], [6], [4], [3]])  # no sequence reaches the last two


def step(model: GPT, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits at the real positions, and the gradients and running statistics after a step of training on them."""
    logits = model(ids, mask)[MASK]
    F.cross_entropy(logits, ids[MASK]).backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **grads, **dict(model.named_buffers())}


@every_norm
@every_placement
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_depends_on_the_tokens_at_padding(lively: Lively, norm: str, placement: str, mode: str) -> None:
    ids = random_ids(4, L)
    other = torch.where(MASK, ids, (ids + 5) % V)
    results = []
    for tokens in (ids, other):
        model = lively(norm=norm, placement=placement).double().train(mode == "train")
        results.append(step(model, tokens, MASK))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, msg=lambda text, key=key: f"{key}: {text}")


@every_norm
@every_placement
def test_a_batch_without_padding_needs_no_mask(lively: Lively, norm: str, placement: str) -> None:
    ids, full = random_ids(4, L), torch.ones(4, L, dtype=torch.bool)
    first, second = (step(lively(norm=norm, placement=placement).double().train(), ids, m) for m in (None, full))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("norm", [*(n for n in NORM_VARIANTS if "batchnorm" in n), "rbn", "rbn[batch]", "powernorm"])
@pytest.mark.parametrize(("placement", "norms"), [("pre", 5), ("post", 4), ("sandwich", 9), ("output", 5)])
def test_the_mask_reaches_every_norm(lively: Lively, norm: str, placement: str, norms: int) -> None:
    """Each of the norms, the final one too, learns other running statistics with the mask than without."""
    masked, plain = (step(lively(norm=norm, placement=placement).train(), random_ids(4, L), m) for m in (MASK, None))
    running = [key for key in masked if "running" in key]
    assert len(running) == 2 * norms
    for key in running:
        assert not torch.allclose(masked[key], plain[key]), key


@pytest.mark.parametrize(
    ("norm", "placement"),
    # Without a norm, deepnorm's factor alone makes the numbers grow beyond all bounds, with padding or without.
    [(n, p) for n in NORM_VARIANTS for p in PLACEMENTS if (n, p) != ("none", "deepnorm")],
)
def test_padding_stays_finite_in_a_deep_model(lively: Lively, norm: str, placement: str) -> None:
    """A position without statistics must not grow from norm to norm until 0 * inf spoils every gradient."""
    model = lively(norm=norm, placement=placement, n_layer=12).train()
    for key, value in step(model, random_ids(4, L), MASK).items():
        assert value.isfinite().all(), key


# --- dropout -----------------------------------------------------------------------------------------------------


@every_norm
def test_dropout_acts_in_training_alone(lively: Lively, norm: str) -> None:
    ids, dropping, plain = random_ids(4, L), lively(norm=norm, dropout=0.3), lively(norm=norm)
    assert torch.equal(dropping(ids), plain(ids))
    assert not torch.allclose(dropping.train()(ids), dropping(ids))
    if not [name for name, _ in plain.named_buffers() if "running" in name]:
        assert torch.equal(plain.train()(ids), plain.eval()(ids))


def zeros(y: Tensor) -> float:
    return float((y == 0).double().mean())


def test_dropout_acts_at_each_of_its_four_places() -> None:
    P, C, rows = 0.25, 16, 4000
    config = GPTConfig(n_embd=C, n_head=1, n_layer=1, vocab_size=C, dropout=P, norm="none", tie_weights=False)
    torch.manual_seed(0)
    x = torch.randn(rows, 1, C, dtype=torch.float64)

    mlp, attn = FeedForward(config).double().train(), CausalSelfAttention(config).double().train()
    assert zeros(mlp(x)) == pytest.approx(P, abs=0.01)
    y = attn(x).detach()
    dead = (y == 0).all(-1)  # with a single position and head, dropping the one attention weight leaves nothing
    assert float(dead.double().mean()) == pytest.approx(P, abs=0.02)
    assert zeros(y[~dead]) == pytest.approx(P, abs=0.01)
    kept = y != 0
    ratio = y[kept] / attn.eval()(x).detach()[kept]  # what is kept is scaled up, once by each of the two
    torch.testing.assert_close(ratio, torch.full_like(ratio, (1 - P) ** -2))

    model = GPT(config).train()
    with torch.no_grad():  # silence the block, and show the embeddings as logits
        nn.init.zeros_(model.blocks[0].attn.proj.weight)
        nn.init.zeros_(model.blocks[0].mlp.proj.weight)
        model.head.weight.copy_(torch.eye(C))
    ids = torch.randint(C, (rows, 2))
    assert zeros(model(ids)) == pytest.approx(P, abs=0.01)
    assert zeros(model.eval()(ids)) == 0

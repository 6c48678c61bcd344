"""What an output may depend on: not on later tokens, not on padding; and dropout, which acts in training alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptexp.audits.influence import measure
from gptexp.models.attention import CausalSelfAttention
from gptexp.models.gpt import GPT, FeedForward
from gptexp.models.gpt_settings import GPTConfig
from gptexp.registry import ACTIVATIONS, PLACEMENTS, POSITIONS
from tests.models.conftest import ATTENTIONS, NORM_VARIANTS, PAIRS, VARIANTS, VERDICTS, assert_close, every_variant

L, V = 8, 11
Lively = Callable[..., GPT]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def check_evaluation(model: GPT) -> None:
    """By the audit, whose gradients are exactly zero where there is no way; and by changed tokens."""
    model, ids = model.double().eval(), random_ids(2, L)
    found = measure(model, ids, training=False)
    assert not found.model.looks_ahead
    assert torch.equal(found.map > 0, torch.ones(L, L).tril().bool())  # every token so far, and no other
    assert not found.others.any()
    assert not any(layer.looks_ahead or layer.couples for layer in found.layers)
    changed = ids[:1].expand(L, L).clone()
    for t in range(L):  # row t differs at every position after t
        changed[t, t + 1 :] = (changed[t, t + 1 :] + 3) % V
    with torch.no_grad():
        base, others = model(ids)[0], model(changed)
    for t in range(L):
        torch.testing.assert_close(others[t, : t + 1], base[: t + 1], rtol=1e-9, atol=1e-9)
        assert t == L - 1 or not torch.allclose(others[t, t + 1 :], base[t + 1 :], rtol=1e-2, atol=1e-2)


def test_the_variants_cover_what_is_registered() -> None:
    norms, placements, positions, activations = map(set, zip(*VARIANTS, strict=True))
    assert (norms, placements) == (set(NORM_VARIANTS), set(PLACEMENTS))
    assert (positions, activations) == (set(POSITIONS), set(ACTIVATIONS))
    for i, j in ((0, 2), (1, 2), (1, 3)):
        assert len({(v[i], v[j]) for v in VARIANTS}) == len({v[i] for v in VARIANTS}) * len({v[j] for v in VARIANTS})


@every_variant
def test_what_an_output_depends_on(
    lively: Lively, norm: str, placement: str, position: str, activation: str
) -> None:
    """In evaluation on the tokens so far; in training on what its norm's statistics run over, too."""

    def model() -> GPT:  # a new one each time, because a step of training moves averages
        parts = {"norm": norm, "placement": placement, "position": position, "activation": activation}
        return lively(**parts).double().train()

    check_evaluation(model())
    looks_ahead, couples = VERDICTS.get(norm, (False, False))
    ids = random_ids(4, L)
    found = measure(model(), ids, training=True)
    assert (found.model.looks_ahead, found.model.couples) == (looks_ahead, couples)
    assert bool((found.map.triu(1) > 0).any()) == looks_ahead
    assert bool((found.others > 0).any()) == couples
    later, neighbor = ids.clone(), ids.clone()
    later[:, 5:] = (ids[:, 5:] + 3) % V
    neighbor[1:] = (ids[1:] + 3) % V
    base = model()(ids)
    assert torch.allclose(model()(later)[:, :5], base[:, :5]) != looks_ahead
    assert torch.allclose(model()(neighbor)[0], base[0]) != couples


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "head"},
        {"qk_norm": "full", "attention_scale": False},
        {"residual": False},
        {"projection": False},
        {"n_inner": 0},
        {"init": "torch", "final_norm": False},
        {"norms": {"layernorm": {"affine": False}}},
    ],
    ids=str,
)
def test_evaluation_sees_no_later_token_with_other_settings(lively: Lively, changes: dict) -> None:
    check_evaluation(lively(**changes))


@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_every_attention_is_causal(lively: Lively, changes: dict, training: bool) -> None:
    """And reaches back exactly as far as its window in each of the two blocks."""
    model = lively(**changes).double().train(training)
    found = measure(model, random_ids(4, L), training)
    assert (found.model.looks_ahead, found.model.couples) == (False, False)
    reach = 2 * (changes.get("window", L) - 1)
    seen = torch.arange(L)[:, None] - torch.arange(L)
    assert bool((found.map[(seen >= 0) & (seen <= reach)] > 0).all())
    assert bool((found.map[(seen < 0) | (seen > reach)] == 0).all())


# --- padding -----------------------------------------------------------------------------------------------------

MASK = torch.arange(L) < torch.tensor([[6], [6], [4], [3]])  # no sequence reaches the last two


def step(model: GPT, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits at the real positions, and the gradients and running statistics after a step of training on them."""
    logits = model(ids, mask)[MASK]
    F.cross_entropy(logits, ids[MASK]).backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **grads, **dict(model.named_buffers())}


@pytest.mark.parametrize(("norm", "placement"), PAIRS)
def test_training_does_not_depend_on_the_tokens_at_padding(lively: Lively, norm: str, placement: str) -> None:
    ids = random_ids(4, L)
    other = torch.where(MASK, ids, (ids + 5) % V)
    first, second = (step(lively(norm=norm, placement=placement).double().train(), t, MASK) for t in (ids, other))
    assert_close(first, second)


@pytest.mark.parametrize(("norm", "placement"), [pair for pair in PAIRS if pair[0] in ("batchnorm", "powernorm")])
def test_the_mask_reaches_every_norm(lively: Lively, norm: str, placement: str) -> None:
    """Each of the norms, the final one too, learns other running statistics with the mask than without."""
    masked, plain = (step(lively(norm=norm, placement=placement).train(), random_ids(4, L), m) for m in (MASK, None))
    running = [key for key in masked if "running" in key]
    assert len(running) >= 2 * 4
    for key in running:
        assert not torch.allclose(masked[key], plain[key]), key


@pytest.mark.parametrize(("norm", "placement"), [pair for pair in PAIRS if pair[0] in {*VERDICTS, "powernorm"}])
def test_padding_stays_finite_in_a_deep_model(lively: Lively, norm: str, placement: str) -> None:
    """A position without statistics must not grow from norm to norm until 0 * inf spoils every gradient."""
    model = lively(norm=norm, placement=placement, n_layer=12).train()
    for key, value in step(model, random_ids(4, L), MASK).items():
        assert value.isfinite().all(), key


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_dropout_acts_in_training_alone(lively: Lively, norm: str) -> None:
    ids, dropping, plain = random_ids(4, L), lively(norm=norm, dropout=0.3), lively(norm=norm)
    assert torch.equal(dropping(ids), plain(ids))
    assert not torch.allclose(dropping.train()(ids), plain.train()(ids))


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

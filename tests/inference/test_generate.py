"""Sampling: what is chosen, from what, and where it ends."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gptexp.inference import kv_cache
from gptexp.inference.sampling import sample_tokens
from gptexp.models.gpt import GPT
from tests.models.conftest import ATTENTIONS, VARIANTS, VERDICTS

V, BLOCK = 11, 8
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4, 5]]  # the last is longer than the block
Lively = Callable[..., GPT]


def contexts(tokens: list[int], start: int) -> Iterator[list[int]]:
    """What is seen before each token from `start` on: a full block loses its older half to the token that comes."""
    seen = tokens[:start][-BLOCK:]
    for token in tokens[start:]:
        yield seen
        seen = [*(seen[BLOCK // 2 :] if len(seen) == BLOCK else seen), token]


def greedy(model: GPT, prompt: list[int], n: int) -> list[int]:
    """The likeliest continuation, one prompt and one token at a time, everything computed anew."""
    ids = list(prompt)
    for _ in range(n):
        *_, seen = contexts([*ids, 0], len(prompt))
        with torch.no_grad():
            ids.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
    return ids[len(prompt) :]


CHANGES = [
    *(
        {"norm": norm, "placement": placement, "position": position, "activation": activation}
        for norm, placement, position, activation in VARIANTS if placement == "pre" or norm in ("rmsnorm", "batchnorm")
    ),
    {"position": "alibi", "n_head": 4, "qk_norm": "head"},
    {"qk_norm": "head", "position": "rope"},
    {"qk_norm": "full", "attention_scale": False},
    {"residual": False},
    {"projection": False},
    {"n_inner": 0},
    {"n_layer": 0},
    {"ngram": 2},
    {"ngram": 5, "ngram_rows": 20},
    *ATTENTIONS,
]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"norm": "batchnorm", "position": "rope"}, {"ngram": 3, "position": "alibi"}])
def test_greedy_is_a_loop_of_argmax(lively: Lively, changes: dict) -> None:
    """Also past the block, where the older half of the context is dropped; and each row as if alone."""
    model = lively(tie_weights=False, **changes)  # tied random weights repeat themselves
    expected = [greedy(model, prompt, 15) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 15, temperature=0) == expected
    assert [model.generate([prompt], 15, temperature=0)[0] for prompt in PROMPTS] == expected
    assert changes or len({tuple(row) for row in expected}) == 3  # not one and the same text


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@torch.inference_mode()
def test_the_cache_gives_the_logits_of_the_whole_context(lively: Lively, changes: dict) -> None:
    """Rows of unequal lengths, which reach the end of the block at different steps."""
    model, lengths = lively(**changes).double(), (3, 1, 12, 8)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, V, (n + 20,), generator=draw).tolist() for n in lengths]
    decoder = model.decoder(4)
    cached = [decoder([row[: n + t] for row, n in zip(rows, lengths, strict=True)]) for t in range(20)]
    for i, n in enumerate(lengths):
        for t, seen in enumerate(contexts(rows[i], n)):
            whole = model(torch.tensor([seen]))[0, -1]
            torch.testing.assert_close(cached[t][i], whole, atol=1e-8, rtol=1e-8)
            assert float(whole.std()) > 0.01


@pytest.mark.parametrize("part", ["blocks.0.residual1.before", "wte", "head"])
def test_hooks_are_called(lively: Lively, part: str) -> None:
    model, seen = lively(tie_weights=False), []
    plain, module = model.generate(PROMPTS[:1], 6), model.get_submodule(part)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    assert model.generate(PROMPTS[:1], 6) == plain
    assert seen == ["before", "after"] * 6


@pytest.mark.parametrize(("small", "used"), [(kv_cache.ONE_THREAD_LIMIT, 1), (0, 3)])
def test_little_work_takes_one_thread(lively: Lively, monkeypatch: pytest.MonkeyPatch, small: int, used: int) -> None:
    monkeypatch.setattr(kv_cache, "ONE_THREAD_LIMIT", small)
    threads, seen, model = torch.get_num_threads(), set(), lively()
    model.head.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        for _ in model.stream(PROMPTS, 12):
            assert torch.get_num_threads() == 3  # between two steps, and
        with pytest.raises(IndexError):
            model.generate([[1, V]], 2)
        assert torch.get_num_threads() == 3  # after a mistake
    finally:
        torch.set_num_threads(threads)
    assert seen == {used}


def test_a_step_computes_new_positions_alone(lively: Lively) -> None:
    model, lengths = lively(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda _, args, out: lengths.append(tuple(args[0].shape[:2])))
    model.generate([[1, 2, 3], [1, 2, 3]], 9, temperature=0)
    assert lengths == [(2, 3), *[(2, 1)] * 5, (2, BLOCK // 2 + 1), (2, 1), (2, 1)]


def test_a_block_of_one_token(lively: Lively) -> None:
    model = lively(block_size=1)
    expected, token = [], 3
    for _ in range(5):
        token = int(model(torch.tensor([[token]])).argmax())
        expected.append(token)
    assert model.generate([[1, 2, 3]], 5, temperature=0) == [expected]


def test_only_the_last_block_of_a_prompt_is_seen(lively: Lively) -> None:
    model, prompt = lively(), PROMPTS[2]
    assert model.generate([prompt], 10) == model.generate([prompt[-BLOCK:]], 10)
    assert model.generate([prompt], 10) == model.generate([[3, *prompt[-BLOCK:]]], 10)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"top_k": 1, "top_p": 0.5}])
def test_narrow_sampling_is_greedy(lively: Lively, options: dict) -> None:
    model = lively()
    assert model.generate(PROMPTS, 12, **options) == model.generate(PROMPTS, 12, temperature=0)
    assert model.generate(PROMPTS, 12) != model.generate(PROMPTS, 12, temperature=0)


def test_a_sample_follows_its_seed_its_row_and_its_prompt(lively: Lively) -> None:
    model = lively()
    text = model.generate(PROMPTS, 20, seed=3)
    torch.manual_seed(123)  # the global generator has no say
    assert model.generate(PROMPTS, 20, seed=3) == text
    assert model.generate(PROMPTS, 20, seed=4) != text
    assert model.generate([[9, 9, 9, 9], PROMPTS[1], [0]], 20, seed=3)[1] == text[1]
    assert model.generate([PROMPTS[0]], 20, seed=3)[0] == text[0]
    assert model.generate(PROMPTS, 9, seed=3) == [row[:9] for row in text]
    same = model.generate([[1], [1], [1]], 20)
    assert same[0] != same[1] != same[2] != same[0]  # rows with one prompt are different samples


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_sample_does_not_depend_on_the_default_type_of_numbers(lively: Lively, dtype: torch.dtype) -> None:
    """Which a run of that precision sets while it samples."""
    model = lively()
    expected = model.generate([[1, 2], [3]], 60, seed=5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert model.generate([[1, 2], [3]], 60, seed=5) == expected
    finally:
        torch.set_default_dtype(before)


def test_a_stop_sequence_ends_its_row_alone(lively: Lively) -> None:
    model = lively()
    text = model.generate(PROMPTS, 20)
    stop = text[0][3:7]
    places = [[end for end in range(4, 21) if row[end - 4 : end] == stop] for row in text]
    assert places == [[7], [], []]  # the sequence is in the first row alone
    assert model.generate(PROMPTS, 20, stop=stop) == [text[0][:7], *text[1:]]

    steps = list(model.stream(PROMPTS, 20, stop=stop))
    assert [tokens[0] is None for tokens in steps] == [i >= 7 for i in range(20)]
    assert len(list(model.stream(PROMPTS[:1], 20, stop=stop))) == 7  # nothing is left to do


def test_a_stop_sequence_is_looked_for_in_the_new_text_alone(lively: Lively) -> None:
    model = lively()
    prompt = [1, 2, 3]
    text = model.generate([prompt], 10)[0]
    assert model.generate([prompt], 10, stop=[2, 3, text[0]])[0] == text
    assert model.generate([prompt], 10, stop=[text[0]])[0] == text[:1]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(lively: Lively, training: bool) -> None:
    model = lively(dropout=0.5, norm="batchnorm").train(training)
    before = {name: b.clone() for name, b in model.named_buffers()}

    def modes() -> set[bool]:
        return {m.training for m in model.modules()}

    model.generate(PROMPTS, 3)
    assert modes() == {training}
    stream = model.stream(PROMPTS, 10)
    next(stream)
    assert torch.is_grad_enabled()  # the consumer between two steps is not in no_grad
    stream.close()  # a consumer that stops early
    assert modes() == {training}
    for _ in model.stream(PROMPTS, 10):
        break
    assert modes() == {training}
    with pytest.raises(IndexError):
        model.generate([[1], [V]], 2)  # no such symbol
    assert modes() == {training}
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])  # and the norms have learned nothing


@pytest.mark.parametrize("norm", sorted(VERDICTS))
def test_a_model_in_training_samples_as_in_evaluation(lively: Lively, norm: str) -> None:
    model = lively(dropout=0.5, norm=norm)
    assert model.train().generate(PROMPTS, 8, seed=1) == model.eval().generate(PROMPTS, 8, seed=1)


def test_every_prompt_needs_a_token(lively: Lively) -> None:
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            lively().generate(prompts, 3)
    assert lively().generate([[1], [2]], 0) == [[], []]


# --- sample_tokens -----------------------------------------------------------------------------------------------

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.02, 0.18])  # in order: 1 (.4), 3 (.65), 5 (.83), 2 (.93), 0 (.98), 4
DRAWS = 20_000


def frequencies(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    chance = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    picks = sample_tokens((PROBS.log() + 3.0).expand(DRAWS, -1), chance, temperature, top_k, top_p)
    return picks.bincount(minlength=6) / DRAWS


@pytest.mark.parametrize(
    ("options", "support"),
    [
        *((options, [0, 1, 2, 3, 4, 5]) for options in ({}, {"top_k": 99}, {"top_p": 1.0}, {"temperature": 0.5})),
        *((options, [1, 3, 5]) for options in ({"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 3})),
        ({"top_p": 0.5}, [1, 3]),  # .4 does not reach .5, .65 does
        *(({"top_k": k, "top_p": p}, [1, 3]) for k, p in ((2, 0.9), (4, 0.5))),
    ],
    ids=str,
)
def test_draws_follow_the_truncated_distribution(options: dict, support: list[int]) -> None:
    expected = torch.zeros(6)
    expected[support] = PROBS[support] ** (1 / options.get("temperature", 1.0))
    expected /= expected.sum()
    seen = frequencies(**options)
    assert bool((seen[expected == 0] == 0).all())
    kept = expected > 0
    chi_squared = float((DRAWS * (seen - expected).square() / expected)[kept].sum())
    assert chi_squared < 20.5  # the 0.999 quantile with five degrees of freedom


def test_temperature_comes_before_top_p() -> None:
    """At temperature 0.5 the first token alone has .16 / .2678 = .6 of the probability; at 1 it has .4."""
    assert frequencies(temperature=0.5, top_p=0.55).nonzero().flatten().tolist() == [1]
    assert frequencies(temperature=1.0, top_p=0.55).nonzero().flatten().tolist() == [1, 3]


def test_extreme_chances_stay_within_the_support() -> None:
    logits = PROBS.log().expand(2, -1)
    for top_k, last in ((None, 4), (1, 1), (3, 5)):
        below_one = torch.tensor([0.0, 1.0]).nextafter(torch.tensor(0.0))
        assert sample_tokens(logits, below_one.clamp(min=0), 1.0, top_k, None).tolist() == [1, last]
    certain = torch.tensor([[0.0, 200.0, 0.0]])  # the other probabilities are zero
    assert sample_tokens(certain, torch.tensor([0.9999999]), 1.0, None, None).tolist() == [1]


def test_each_token_owns_the_chances_from_its_lower_bound_to_below_its_upper_one() -> None:
    bounds = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert sample_tokens(torch.zeros(4, 4), bounds, 1.0, None, None).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (2, None), (None, 0.5), (2, 0.5)])
def test_nothing_is_chosen_from_logits_that_are_no_numbers(top_k: int | None, top_p: float | None) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        sample_tokens(torch.full((2, 5), torch.nan), torch.tensor([0.2, 0.3]), 1.0, top_k, top_p)


def test_rows_are_chosen_apart() -> None:
    logits = torch.stack([PROBS.log(), PROBS.flip(0).log()])
    for chances, expected in (([0.0, 0.0], [1, 4]), ([0.5, 0.0], [3, 4])):
        assert sample_tokens(logits, torch.tensor(chances), 1.0, None, None).tolist() == expected
    assert sample_tokens(logits, torch.tensor([0.5, 0.5]), 0, None, None).tolist() == [1, 4]

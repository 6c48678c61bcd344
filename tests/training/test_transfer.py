"""Starting from another run's weights: which are taken, what is said, what does not fit, and what is frozen."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptexp.analysis.collect import collect
from gptexp.analysis.study import build_study
from gptexp.data.tokenizers import CharTokenizer, tokenizer_from_dict
from gptexp.errors import UserError
from gptexp.models.settings import build_model
from gptexp.processes.group import processes
from gptexp.runs.run import Run
from gptexp.training.launch import start
from gptexp.training.load import load_model, read_checkpoint
from gptexp.training.transfer import freeze, initialize_from, lineage
from tests.conftest import composed, failing, timeless, train

Tiny = Callable[..., Run]


def weights_of(run: Run, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    state = read_checkpoint(run.checkpoint(checkpoint), "run")["state_dict"]  # type: ignore[arg-type]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def begun(run: Run) -> tuple[dict[str, torch.Tensor], str]:
    """The weights that a run has started from, and what is said of them."""
    tokenizer = tokenizer_from_dict(run.info["tokenizer"])
    model = build_model(run.config.sized(tokenizer.vocab_size), run.config.seed)
    told = initialize_from(model, tokenizer, run.info["init_from"])
    return model.state_dict(), told


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_an_identical_model_starts_with_equal_logits(checkpoint: str, finished: Run) -> None:
    path = str(finished.path) if checkpoint == "best" else str(finished.checkpoint("last"))
    tokenizer = tokenizer_from_dict(finished.info["tokenizer"])
    model = build_model(finished.config.sized(tokenizer.vocab_size), seed=99).eval()
    told = initialize_from(model, tokenizer, lineage(path))
    theirs = load_model(finished, checkpoint, tokenizer.vocab_size).cpu()  # type: ignore[arg-type]
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), theirs(ids))
    step = {"best": finished.result["best_step"], "last": 24}[checkpoint]  # type: ignore[index]
    assert told == f"starts from {finished.info['name']}, {checkpoint}, step {step}"


def test_symbols_are_matched_by_what_they_are(finished: Run) -> None:
    before = tokenizer_from_dict(finished.info["tokenizer"])
    assert isinstance(before, CharTokenizer)
    after = CharTokenizer("".join(sorted({*before.symbols, "€", "#"} - {"T", "a"})))
    model = build_model(finished.config.sized(after.vocab_size), seed=5)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = initialize_from(model, after, lineage(str(finished.path)))
    theirs, ours = weights_of(finished, "best"), model.state_dict()
    for i, symbol in enumerate(after.symbols):
        if symbol in before.symbols:
            assert torch.equal(ours["wte.weight"][i], theirs["wte.weight"][before.symbols.index(symbol)])
        else:
            assert torch.equal(ours["wte.weight"][i], fresh["wte.weight"][i])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "wte" not in name and "head" not in name)
    n = len(before.symbols)
    assert told.endswith(f": {n - 2} of {n} symbols known, 2 new ('#', '€'), 2 dropped")


def test_what_depends_on_the_symbols_alone(tiny: Tiny) -> None:
    source = tiny("source", "model.ngram=2", "max_steps=4")
    before = tokenizer_from_dict(source.info["tokenizer"])
    assert isinstance(before, CharTokenizer)
    after = CharTokenizer(before.symbols[1:])
    model = build_model(source.config.sized(after.vocab_size))
    assert initialize_from(model, after, lineage(str(source.path))).endswith("; new embeddings of n-grams")
    assert not model.ngram.weight.any()  # as at the start


@pytest.mark.parametrize(("block_size", "said"), [(8, ": 8 of 8 positions"), (40, ": 16 of 40 positions")])
def test_learned_positions_are_cut_or_go_on(block_size: int, said: str, finished: Run, tiny: Tiny) -> None:
    run = tiny("other", f"init_from={finished.path}", f"model.block_size={block_size}", "max_steps=2")
    state, told = begun(run)
    ours, theirs = state["wpe.weight"], weights_of(finished, "best")["wpe.weight"]
    fresh = build_model(run.config.sized(2), run.config.seed).state_dict()["wpe.weight"]
    shared = min(16, block_size)
    assert torch.equal(ours[:shared], theirs[:shared])
    assert torch.equal(ours[shared:], fresh[shared:])
    assert told.endswith(said)


@pytest.mark.parametrize(("settings", "problem"), [
    (["model.n_embd=32"], "parameter wte.weight is (27, 32) here and (27, 16) there; allowed: the same shape"),
    (["model.n_inner=5"], "blocks.0.mlp.fc.weight is (5, 16) here and (64, 16) there; allowed: the same shape"),
    (["model.n_layer=2"], "has no counterpart there; allowed: a model with the same parts"),
    (["norm=none"], "has no counterpart here; allowed: a model with the same parts"),
    (["tokenizer=byte"], "the vocabularies have no symbol in common"),
])  # fmt: skip
def test_what_does_not_fit(settings: list[str], problem: str, finished: Run, tiny: Tiny, tmp_path: Path) -> None:
    if settings == ["tokenizer=byte"]:
        finished.update(tokenizer={"name": "char", "symbols": "äöü", "terminator": "\n"})
    with pytest.raises(UserError) as caught:
        tiny("other", f"init_from={finished.path}", *settings)
    (line,) = caught.value.problems
    assert line.startswith(f"init_from={finished.path}: ")
    assert line.endswith(problem)
    assert not (tmp_path / "other").exists()


def test_another_family_of_models(finished: Run, corpus: Path, tmp_path: Path) -> None:
    config = composed("data=file", f"data.path={corpus}", "model=mlp", f"init_from={finished.path}")
    with pytest.raises(UserError, match="is a model=gpt, this is a model=mlp; allowed: the same"):
        train(config, tmp_path / "other")


def test_no_run_and_no_checkpoint(finished: Run, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init_from=nowhere: "):
        tiny("other", "init_from=nowhere")
    shutil.rmtree(finished.checkpoint("best").parent)
    with pytest.raises(UserError, match=rf"^init_from={finished.path}: there is no checkpoint "):
        tiny("other", f"init_from={finished.path}")
    assert not (tmp_path / "other").exists()


def test_a_tied_head_does_not_take_two_matrices(finished: Run, tiny: Tiny) -> None:
    loose = tiny("loose", "model.tie_weights=false")
    with pytest.raises(UserError, match="is that of wte here and another one there"):
        tiny("other", f"init_from={loose.path}")
    untied = tiny("another", f"init_from={finished.path}", "model.tie_weights=false", "max_steps=1")
    assert untied.info["status"] == "done"


def test_killed_and_resumed_to_the_bit(finished: Run, tiny: Tiny) -> None:
    """Also when the run that it started from is gone."""
    settings = [f"init_from={finished.path}", "seed=3", "optimizer.learning_rate=1e-4"]
    whole = tiny("whole", *settings)
    assert whole.info["init_from"]["name"] == finished.info["name"]
    with failing(13), pytest.raises(Exception, match="in the middle"):
        tiny("killed", *settings)
    shutil.rmtree(finished.path)
    killed = Run.open(whole.path.parent / "killed")
    start(killed, processes())
    assert timeless(killed) == timeless(whole)
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(killed).items())


def test_what_is_frozen_stays(finished: Run, tiny: Tiny) -> None:
    run = tiny("frozen", f"init_from={finished.path}", "trainable=[head*,*.mlp.*]", "model.tie_weights=false")
    before, after = begun(run)[0], weights_of(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"}


def test_a_pattern_that_fits_nothing(finished: Run, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"^trainable=\[heads\*\]: fits no parameter; allowed: patterns of names"):
        tiny("frozen", "trainable=[heads*]")
    model = build_model(finished.config.sized(5))
    assert freeze(model, ["wpe*"]) == 16 * 16
    assert freeze(model, ["head*"]) == 5 * 16  # which is tied to the embedding
    assert model.wte.weight.requires_grad
    assert freeze(model, None) == model.n_params


def test_runs_are_compared_by_what_they_started_from(tiny: Tiny, tmp_path: Path) -> None:
    """Not by its directory, which has a seed of its own."""
    for seed in (1, 2):
        source = tiny(f"source-{seed}", f"seed={seed}", "max_steps=8")
        tiny(f"sweep/scratch-{seed}", f"seed={seed}")
        tiny(f"sweep/tuned-{seed}", f"seed={seed}", f"init_from={source.path}")
    study = build_study(collect([tmp_path / "sweep"]))
    (factor,) = study.factors
    assert factor.key == "init_from"
    assert [sorted(variant.runs) for variant in study.variants] == [[1, 2], [1, 2]]
    assert factor.levels[1].startswith("layernorm-pre-h2, 8 steps on file, ")

"""A study in words: headlines, what is undecided, sentences for a paper, and the verdicts that they rest on."""

import json
import math
import random
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from gptexp.analysis.study import Study
from gptexp.analysis.summary import (
    commands,
    disagreements,
    further_seeds,
    headline,
    next_command,
    open_questions,
    paper,
)
from gptexp.analysis.tables import variants_table
from gptexp.errors import UserError
from tests.analysis.conftest import Write

Build = Callable[..., Study]


def sweep(write: Write, seeds: int, shifts: dict[str, float], noise: float = 0.001) -> None:
    for norm, shift in shifts.items():
        for seed in range(seeds):
            write(2.0 + 0.05 * seed + shift + noise * (-1) ** seed * (seed % 3) * (shift != 0), seed, norm)


def test_headlines(write: Write, study: Build) -> None:
    sweep(write, 5, {"layernorm": 0.0, "rmsnorm": -0.02, "dyt": 0.05, "scalenorm": 0.0})
    assert headline(study()) == [
        "rmsnorm is better than layernorm by 0.02 nats; dyt is worse than layernorm by 0.05 nats; "
        "scalenorm does not differ from layernorm by more than 0.01 nats."
    ]
    assert further_seeds(study()) is None
    assert next_command(study()) is None
    assert paper(study())[0].startswith("rmsnorm is better than layernorm by 0.0196 nats (5 seeds, 95\u00a0% CI -0.0")


def test_headline_of_one_comparison(write: Write, study: Build) -> None:
    sweep(write, 3, {"layernorm": 0.0, "rmsnorm": -0.2})
    assert headline(study())[0].startswith("rmsnorm is better than layernorm by 0.2 nats (95\u00a0% interval 0.19")


def test_headline_by_factor(write: Write, study: Build) -> None:
    """The norm adds 0.5, the placement 0.04, and both together 0.1 more."""
    draw = random.Random(0)
    for seed in (1, 2, 3, 4, 5):
        for norm, place in product(("layernorm", "batchnorm"), ("pre", "post")):
            loss = 2 + 0.5 * (norm == "batchnorm") + 0.04 * (place == "post")
            loss += 0.1 * (norm == "batchnorm" and place == "post") + draw.gauss(0, 0.002)
            write(loss, seed, norm, place)
    found = study()
    first, together, best = headline(found)
    assert re.fullmatch(r"batchnorm is worse than layernorm by 0\.55 nats; post is worse than pre by 0\.0\d+ nats\.",
                        first)  # fmt: skip
    assert re.fullmatch(r"Together, batchnorm and post cost 0\.\d+ nats more than the sum of both\.", together)
    assert best.startswith("The lowest loss is that of layernorm pre, 2.0")
    (interaction,) = [c for c in found.comparisons if c.kind == "interaction"]
    assert interaction.judgement.mean == pytest.approx(0.1, abs=0.005)
    assert (interaction.factor, interaction.this) == ("norm x placement", "batchnorm x post")


def test_what_is_undecided_comes_last(write: Write, study: Build) -> None:
    for seed in (1, 2, 3):
        write(2.0, seed)
        write(2.3, seed, "dyt")
        write(2.0 + (0.03, -0.01, 0.02)[seed - 1], seed, "rmsnorm")
    found = study()
    assert headline(found)[-1] == "Still undecided: rmsnorm."
    (line,) = open_questions(found)
    assert re.fullmatch(r"rmsnorm against layernorm: \+0\.0133 nats so far; about \d+ seeds in all would .*", line)
    more = further_seeds(found)
    assert more is not None
    assert commands(found) == ["python -m gptexp.train -m seed=1,2"]
    seeds = ",".join(str(seed) for seed in range(4, 4 + more))
    assert next_command(found) == f"python -m gptexp.train -m sweep.name=sweep seed={seeds}"


def test_few_seeds_give_no_p(write: Write, study: Build) -> None:
    for seeds, words in ((1, "one seed decides nothing"), (2, "two seeds decide nothing")):
        write(2.0, seeds)
        write(2.1, seeds, "rmsnorm")
        found = study()
        assert headline(found)[0] == f"layernorm has the lowest loss, 2.0000, but {words}."
        assert math.isnan(found.comparisons[0].judgement.p)


def test_headline_without_a_comparison(write: Write, study: Build) -> None:
    write([], 1, status="running").metrics_path.unlink()
    none = "No run has finished, so there is nothing to compare (1 run: 1 still running)."
    assert headline(study()) == [none]
    write(2.0, 1, name="done")
    assert "only one variant" in headline(study())[0]
    write(2.0, 2, "rmsnorm")
    assert headline(study())[0] == "layernorm has the lowest loss, 2.0000, but no two variants share a seed."


def test_the_losses_may_disagree(write: Write, study: Build) -> None:
    for seed in (1, 2, 3, 4):
        write([4.0, 2.0, 2.001 * (1 + seed * 1e-5)], seed)
        write([4.0, 2.0, 2.5 + seed * 1e-3], seed, "rmsnorm")
    (line,) = disagreements(study())
    assert line == "rmsnorm against layernorm: worse by final val/loss, no different by best val/loss"


def test_right_answers_are_compared(write: Write, study: Build) -> None:
    """As shares of wrong ones, so that lower is better."""
    for seed in (1, 2, 3, 4, 5):
        for norm, right in (("layernorm", 0.97 + seed / 1000), ("rmsnorm", 0.6 + seed / 50)):
            run = write(2.0, seed, norm)
            run.write_result({**(run.result or {}), "final": {"val/exact_match": right}})
    found = study(metric="exact_match")
    (comparison,) = found.comparisons
    assert comparison.differences == pytest.approx({s: 0.37 + s / 1000 - s / 50 for s in range(1, 6)})
    assert comparison.judgement.verdict == "worse"
    assert headline(found)[0].startswith("rmsnorm is worse than layernorm by 0.31 of the answers (95")
    assert variants_table(found)["wrong"].tolist() == pytest.approx([0.027, 0.34])
    assert study().comparisons[0].judgement.verdict == "equal"  # the losses are


def test_different_vocabularies_are_compared_in_bits_per_character(write: Write, study: Build) -> None:
    """Three characters a token and 3 nats are less than one character and 1.5 nats."""
    for seed in (1, 2, 3):
        for name, characters, loss in (("char", 1.0, 1.5), ("byte", 1.0, 1.6), ("bpe", 3.0, 3.0)):
            settings = {"data": {"tokenizer": name} | ({"vocab_size": 600} if name == "bpe" else {})}
            run = write(loss + seed / 1000, seed, name=f"{name}-{seed}", settings=settings, data=name[1] * 64,
                        chars_per_token=characters, tokenizer={"name": name})  # fmt: skip
            run.update(data={"corpus": "shakespeare", "sha256": "f" * 64})
    found = study()
    assert [(f.key, f.levels) for f in found.factors] == [("data.tokenizer", ("char", "byte", "bpe"))]
    assert variants_table(found)["bpc"].tolist() == pytest.approx([x / math.log(2) for x in (1.0006667, 1.502, 1.602)])
    assert headline(found)[0] == ("tokenizer=bpe is better than tokenizer=char by 0.72 bits; tokenizer=byte is worse "
                                  "than tokenizer=char by 0.14 bits.")  # fmt: skip
    assert found.records[0].best == pytest.approx(1.501 / math.log(2))
    assert any("bits per character (val/bpc)" in note for note in found.notes)


def test_equal_vocabularies_are_compared_in_nats(write: Write, study: Build) -> None:
    sweep(write, 3, {"layernorm": 0.0, "rmsnorm": -0.2})
    assert not study().bits


def test_answers_to_the_same_questions_are_compared_however_they_are_written(write: Write, study: Build) -> None:
    for seed in (1, 2, 3):
        for reverse in (False, True):
            task = {"name": "arithmetic", "reverse": reverse}
            run = write(2.0, seed, name=f"{reverse}-{seed}", data="ef"[reverse] * 64, settings={"task": task})
            run.update(data={"corpus": "none", "questions": {"digits": 3}})
            run.write_result({**(run.result or {}), "final": {"val/exact_match": 0.5 + 0.4 * reverse + seed / 1000}})
    found = study(metric="exact_match", baseline="reverse=true")
    assert [(f.key, f.levels) for f in found.factors] == [("task.reverse", ("false", "true"))]
    assert headline(found)[0].startswith("reverse=false is worse than reverse=true by 0.4 of the answers")
    assert [len(runs) for runs in study().apart.values()] == [3]


def test_answers_of_runs_that_have_none(write: Write, study: Build) -> None:
    write(2.0)
    with pytest.raises(UserError, match="metric=exact_match: no run tells it"):
        study(metric="exact_match")


def test_a_variant_that_diverges_counts_as_worse(write: Write, study: Build) -> None:
    for seed in range(6):
        write(2.0, seed)
        write([4.0, math.nan], seed, "dyt", status="diverged")
        write([4.0, 1.9] if seed < 1 else [4.0, math.nan], seed, "rmsnorm", status="done" if seed < 1 else "diverged")
    found = study()
    assert {c.this: c.judgement.verdict for c in found.comparisons} == {"dyt": "worse", "rmsnorm": "worse"}
    assert found.variants[1].p_diverges == pytest.approx(2 * 2 / 924, rel=1e-6)
    assert "dyt diverges more often than layernorm" in headline(found)[0]


def test_other_lengths_of_training_are_set_apart(write: Write, study: Build, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write(2.0, seed, settings={"max_steps": 300})
        write(1.5, seed, "rmsnorm", settings={"max_steps": 2000})
    found = study()
    assert list(found.apart) == ["another length of training: max_steps=2000"]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": [], "swept": ["max_steps"]}))
    assert not study().apart


def test_a_sweep_that_looks_is_judged_by_its_plan(write: Write, study: Build, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for norm, loss in (("layernorm", 2.0), ("rmsnorm", 2.0 + 0.01 * seed), ("dyt", 2.5)):
            write(loss, seed, norm)
    looks = {"seeds": [1, 2, 3, 4, 5], "counts": [3, 4, 5]}
    jobs = [f"{norm}-pre-h4-s{seed}" for norm in ("layernorm", "rmsnorm", "dyt") for seed in (1, 2, 3)]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs, "looks": looks}))
    found = study()
    assert found.standing is not None
    assert found.standing.look == 0
    verdicts = {c.this: c.judgement.verdict for c in found.comparisons}
    assert verdicts == {"rmsnorm": "undecided", "dyt": "worse"}
    write(2.0, 4)
    assert study().standing.look == 0  # the second look waits for the run of rmsnorm
    write(2.02, 4, "rmsnorm")
    assert study().standing.look == 1
    write(1.0, 9, "rmsnorm")
    assert any("the seeds 9 are not in the sweep's plan" in note for note in study().notes)
    assert any("look 2 of 3, after 4 of at most 5 seeds" in note for note in study().notes)

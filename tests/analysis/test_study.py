"""Runs become a study: factors, variants, pairs, main effects, and what is left out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptexp.analysis import collect as collecting
from gptexp.analysis.collect import collect, without_seed
from gptexp.analysis.study import Study
from gptexp.analysis.summary import (
    counts,
)
from gptexp.errors import UserError
from gptexp.runs.files import read_metrics
from tests.analysis.conftest import Write

Build = Callable[..., Study]

FACTORS: dict[str, tuple[list[dict[str, Any]], dict[str, tuple[str, ...]], list[str]]] = {
    "norms by placements": (
        [{"model": {"norm": n, "placement": place}} for n in ("layernorm", "rmsnorm") for place in ("pre", "post")],
        {"model.norm": ("layernorm", "rmsnorm"), "model.placement": ("pre", "post")},
        ["layernorm pre", "layernorm post", "rmsnorm pre", "rmsnorm post"],
    ),
    "in the order of a run's name": (
        [{"model": {"n_head": heads, "norm": norm}} for heads in (2, 4) for norm in ("layernorm", "rmsnorm")],
        {"model.norm": ("layernorm", "rmsnorm"), "model.n_head": ("2", "4")},
        ["layernorm h2", "rmsnorm h2", "layernorm h4", "rmsnorm h4"],
    ),
    "settings that change together": (
        [{"model": {"n_embd": 64, "n_head": 2}}, {"model": {"n_embd": 128, "n_head": 4}}],
        {"model.n_head": ("2", "4")},
        ["h2", "h4"],
    ),
    "a setting that one level has": (
        [{"schedule": {"name": "cosine"}}, {"schedule": {"name": "wsd", "decay_fraction": 0.3, "min_lr_ratio": 0.1}}],
        {"schedule.name": ("cosine", "wsd")},
        ["cosine", "wsd"],
    ),
    "a setting of one level that varies there": (
        [{"model": {"norm": "layernorm"}},
         *({"model": {"norm": "batchnorm", "norms": {"batchnorm": {"momentum": m}}}} for m in (0.1, 0.05))],
        {"model.norm": ("layernorm", "batchnorm"), "model.norms.batchnorm.momentum": ("–", "0.1", "0.05")},
        ["layernorm", "batchnorm momentum=0.1", "batchnorm momentum=0.05"],
    ),
    "configurations with names": (
        [{"name": "2", "max_steps": 10, "batch_size": 4}, {"name": "large", "max_steps": 20}],
        {"name": ("2", "large")},
        ["2", "large"],
    ),
    "the path of a corpus": ([{"data": {"name": "file", "path": path}} for path in "ab"], {}, ["the variant"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORS)
def test_what_varies(case: str, write: Write, study: Build) -> None:
    configurations, factors, labels = FACTORS[case]
    for number, settings in enumerate(configurations):
        write(2.0, 1, settings=settings, name=f"r{number}")
    found = study()
    assert {f.key: f.levels for f in found.factors} == factors
    assert [v.label for v in found.variants] == labels


def write_all(write: Write, losses: dict[tuple[str, str], dict[int, float]]) -> None:
    """Runs of norms and placements, with their losses by seed."""
    for (norm, placement), by_seed in losses.items():
        for seed, loss in by_seed.items():
            write(loss, seed, norm, placement)


def test_pairs_are_of_one_seed(write: Write, study: Build) -> None:
    write_all(write, {("layernorm", "pre"): {1: 2.0, 2: 2.1, 3: 2.2, 4: 2.5},
                      ("rmsnorm", "pre"): {1: 1.9, 2: 2.05, 3: 2.3, 5: 1.0}})  # fmt: skip
    (comparison,) = study().comparisons
    assert comparison.differences == pytest.approx({1: -0.1, 2: -0.05, 3: 0.1})
    assert comparison.unpaired == (4, 5)
    assert comparison.judgement.mean == pytest.approx(-0.05 / 3)


def test_main_effects_by_hand(write: Write, study: Build) -> None:
    write_all(write, {
        ("layernorm", "pre"): {0: 2.0, 1: 2.2, 2: 2.0}, ("layernorm", "post"): {0: 2.4, 1: 2.5, 2: 2.0},
        ("rmsnorm", "pre"): {0: 1.9, 1: 2.0, 2: 2.0}, ("rmsnorm", "post"): {0: 2.1, 1: 2.6},
    })  # fmt: skip
    effects = {c.factor: c for c in study().comparisons if c.kind == "factor"}
    # norm: mean over placements of rmsnorm - layernorm; placement: mean over norms of post - pre
    assert effects["norm"].differences == pytest.approx({0: (-0.1 - 0.3) / 2, 1: (-0.2 + 0.1) / 2})
    assert effects["placement"].differences == pytest.approx({0: (0.4 + 0.2) / 2, 1: (0.3 + 0.6) / 2})
    assert (effects["norm"].this, effects["norm"].that) == ("rmsnorm", "layernorm")
    assert effects["norm"].unpaired == (2,)  # one of the four lacks it


def test_the_baseline_and_the_metric_are_chosen(write: Write, study: Build) -> None:
    write([4.0, 2.0, 2.5])
    write([4.0, 2.1, 2.2], 1, "rmsnorm")
    assert study().baseline == "layernorm"
    assert study().comparisons[0].differences[1] == pytest.approx(-0.3)  # of the final losses
    assert study(metric="best").comparisons[0].differences[1] == pytest.approx(0.1)
    assert study(baseline="rmsnorm").comparisons[0].differences[1] == pytest.approx(0.3)
    with pytest.raises(UserError, match=r"baseline=rmsnrom: no such variant; did you mean rmsnorm\?"):
        study(baseline="rmsnrom")


def test_words_that_one_label_alone_has_are_enough_for_a_baseline(write: Write, study: Build) -> None:
    for norm, placement in (("layernorm", "pre"), ("layernorm", "post"), ("rmsnorm", "pre")):
        write(2.0, 1, norm, placement)
    for name in ("rmsnorm pre", "rmsnorm", "rmsnorm-pre"):
        assert study(baseline=name).baseline == "rmsnorm pre"
    with pytest.raises(UserError, match="baseline=pre: may be any of layernorm pre, rmsnorm pre; write one of these"):
        study(baseline="pre")
    with pytest.raises(UserError, match="baseline=norm: no such variant; allowed: layernorm pre, layernorm post, rms"):
        study(baseline="norm")


def test_lost_runs_are_counted_and_reported(write: Write, study: Build, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write(2.0, seed)
    write(1.5, 1, "rmsnorm")
    write([4.0, math.nan], 2, "rmsnorm", status="diverged")
    write([4.0], 3, "rmsnorm", status="failed")
    write([], 4, "rmsnorm", status="running")
    jobs = [f"{norm}-pre-h4-s{seed}" for norm in ("rmsnorm", "layernorm") for seed in (1, 2, 3, 4, 5)]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": [*jobs, "dyt-pre-h4-s1"]}))
    found = study()
    assert [v.label for v in found.variants] == ["rmsnorm", "layernorm"]  # in the order of the jobs
    assert dict(found.variants[0].counts) == {"done": 1, "diverged": 1, "failed": 1, "running": 1, "missing": 1}
    assert dict(found.variants[1].counts) == {"done": 3, "missing": 2}
    assert any("2 of 3 runs diverged or failed" in note for note in found.notes)
    assert any("dyt-pre-h4-s1" in note for note in found.notes)
    assert counts(found) == "10 runs: 4 done, 1 still running, 1 failed, 1 diverged, 3 without a directory"


def test_the_seed_of_a_name() -> None:
    assert without_seed("rmsnorm-pre-h4-s12") == "rmsnorm-pre-h4"
    assert without_seed("rmsnorm-pre-h4-s12-batch_size_1") == "rmsnorm-pre-h4-batch_size_1"
    assert without_seed("my-s-model") == "my-s-model"


def test_runs_of_another_corpus_split_or_precision_are_set_apart(write: Write, study: Build) -> None:
    write(2.0, 1)
    write(2.0, 2)
    write(1.0, 1, "rmsnorm", data="e" * 64)
    write(1.0, 2, "rmsnorm", precision="bf16-mixed")
    write(1.0, 3, "rmsnorm", settings={"data": {"val_fraction": 0.2}})
    found = study()
    assert [v.label for v in found.variants] == ["the variant"]
    assert list(found.apart) == [
        "another corpus: shakespeare (eeeeeeee)", "another precision: bf16-mixed",
        'another validation split: data.val_fraction=0.2, task={"name": "text"}',
    ]  # fmt: skip
    assert counts(found).endswith("3 set apart")


def test_threads_are_noted_and_separate_no_pairs(write: Write, study: Build) -> None:
    for seed, threads in ((1, None), (2, 1)):
        for norm in ("layernorm", "rmsnorm"):
            run = write(2.0, seed, norm, settings={"hardware": {"threads": threads}})
            run.update(device=run.info["device"] | {"threads": threads or 2})
    found = study()
    assert [f.name for f in found.factors] == ["norm"]
    assert found.comparisons[0].judgement.n == 2
    assert any("different numbers of threads (2 with 2, 2 with 1)" in note for note in found.notes)


def test_other_code_devices_evaluations_and_repeated_runs_are_noted(write: Write, study: Build) -> None:
    write(2.0, 1, name="first")
    write(3.0, 1, name="again")
    run = write([4.0, 3.0, 2.5, 2.0], 1, "rmsnorm")
    info = run.info
    run.update(fingerprints=info["fingerprints"] | {"code": "x" * 64}, device=info["device"] | {"name": "other"})
    found = study()
    assert found.variants[0].runs[1].best == 2.0
    notes = " ".join(found.notes)
    assert "1 runs repeat" in notes
    assert "2 versions of the code" in notes
    assert "2 devices" in notes
    assert "3 to 4 evaluations" in notes


def test_no_run_is_read_twice(write: Write, study: Build, tmp_path: Path) -> None:
    first = write(2.0, 1)
    write(2.0, 1, "rmsnorm", folder="other")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "link").symlink_to(first.path)
    for folders in (["sweep", "other"], ["other/rmsnorm-pre-h4-s1", "sweep"], ["chosen", "other"],
                    ["sweep", "sweep/layernorm-pre-h4-s1", "chosen", "other"]):  # fmt: skip
        assert len(study(*folders).records) == 2


def test_wrong_folders_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        collect([tmp_path / "empty", tmp_path / "nowhere"])
    assert error.value.problems == [
        f"{tmp_path / 'empty'}: holds no runs", f"{tmp_path / 'nowhere'}: there is no such directory",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("run.json", "{", "run.json is not valid JSON"),
        ("run.json", '{"status": "done"}', "run.json lacks 'fingerprints'"),
        ("run.json", '{"name": "x", "status": "done", "fingerprints": {}}', "run.json lacks 'fingerprints.code'"),
        ("result.json", '{"status": "do', "one of its files is not valid JSON"),
        ("result.json", "[1]", "result.json is not as it was written"),
        ("result.json", '{"seconds": "many"}', "result.json is not as it was written"),
        ("config.yaml", "seed: -1", "config.yaml: seed=-1: must be an integer"),
        ("config.yaml", "seed: [", "config.yaml: cannot be read as a configuration"),
        ("metrics.csv", "step,tokens,seconds,val/loss,val/loss_windows\n1,1,1,x,\n", "metrics.csv cannot be read"),
        ("metrics.csv", "\xff\xfe\n", "metrics.csv cannot be read"),
        ("metrics.csv", "", "metrics.csv holds no losses"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(write: Write, study: Build, file: str, content: str, reason: str) -> None:
    write(2.0, 1)
    (write(2.0, 2).path / file).write_bytes(content.encode("latin-1"))
    found = study()
    assert len(found.records) == 1
    assert reason in found.unreadable[0].reason
    assert counts(found) == "2 runs: 1 done, 1 unreadable"


def test_a_half_written_row_is_left_out(write: Write, study: Build) -> None:
    run = write([4.0, 2.0], 1, status="running")
    with run.metrics_path.open("a") as file:
        file.write("3,2304,2.5,0.001,,1.0")
    (record,) = study().records
    assert record.best == 2.0
    assert record.curve["step"].tolist() == [0, 1]


def test_a_run_that_is_deleted_while_it_is_read(write: Write, study: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    write(2.0, 1)
    doomed = write(2.0, 2).path

    def delete_first(path: Path, columns: list[str]) -> list[dict[str, float]]:
        if path.parent == doomed:
            shutil.rmtree(doomed)
            raise FileNotFoundError(doomed)
        return read_metrics(path, columns)

    monkeypatch.setattr(collecting, "read_metrics", delete_first)
    found = study()
    assert len(found.records) == 1
    assert found.unreadable[0].reason == "was deleted"

"""Runs become a study: factors, variants, pairs, main effects, and what is left out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptexp.analysis import collect as collecting
from gptexp.analysis.collect import collect, without_seed
from gptexp.analysis.conclusion import commands, counts, further_seeds, headline, next_command
from gptexp.analysis.study import Study
from gptexp.errors import UserError
from gptexp.records import read_metrics
from tests.analysis.conftest import Write

Build = Callable[..., Study]


def test_the_settings_that_vary_are_the_factors(write: Write, study: Build) -> None:
    for norm in ("layernorm", "rmsnorm"):
        for placement in ("pre", "post"):
            write(2.0, 1, norm, placement)
    found = study()
    assert [(f.name, f.key, f.levels) for f in found.factors] == [
        ("norm", "model.norm", ("layernorm", "rmsnorm")), ("placement", "model.placement", ("pre", "post")),
    ]  # fmt: skip
    assert "model.norms.rmsnorm.eps" in found.factors[0].also  # it is there because the norm is
    assert [v.label for v in found.variants] == ["layernorm pre", "layernorm post", "rmsnorm pre", "rmsnorm post"]


def test_settings_that_change_together_are_one_factor(write: Write, study: Build) -> None:
    for n, (width, heads) in enumerate([(64, 2), (128, 4)]):
        write(2.0, 1, model={"n_embd": width, "n_head": heads}, name=f"r{n}")
    (factor,) = study().factors
    assert {factor.key, *factor.also} == {"model.n_embd", "model.n_head"}


def test_a_setting_of_one_level_that_another_factor_determines_is_no_factor(write: Write, study: Build) -> None:
    write(2.0, 1, settings={"schedule": {"name": "cosine"}}, name="a")
    write(2.0, 1, settings={"schedule": {"name": "wsd", "decay_fraction": 0.3, "min_lr_ratio": 0.1}}, name="b")
    (factor,) = study().factors
    assert factor.name == "name"
    assert set(factor.also) == {"schedule.decay_fraction", "schedule.decay_steps"}


def test_a_setting_of_one_level_that_varies_there_is_a_factor(write: Write, study: Build) -> None:
    write(2.0, 1, "layernorm", name="a")
    for momentum in (0.1, 0.05):
        write(2.0, 1, "batchnorm", model={"norms": {"batchnorm": {"momentum": momentum}}}, name=f"m{momentum}")
    found = study()
    assert [f.name for f in found.factors] == ["norm", "momentum"]
    assert [v.label for v in found.variants] == ["layernorm", "batchnorm momentum=0.1", "batchnorm momentum=0.05"]


def test_names_of_configurations_stand_for_their_settings(write: Write, study: Build) -> None:
    for name, settings in {"small": {"max_steps": 10, "batch_size": 4}, "large": {"max_steps": 20}}.items():
        for seed in (1, 2):
            write(2.0, seed, settings={**settings, "name": name}, name=f"{name}-s{seed}")
    found = study()
    assert [v.label for v in found.variants] == ["small", "large"]
    assert [f.name for f in found.factors] == ["name"]
    assert {"max_steps", "batch_size"} <= set(found.factors[0].also)


def test_pairs_are_of_one_seed(write: Write, study: Build) -> None:
    for seed, (a, b) in {1: (2.0, 1.9), 2: (2.1, 2.05), 3: (2.2, 2.3)}.items():
        write(a, seed)
        write(b, seed, "rmsnorm")
    write(2.5, 4)
    write(1.0, 5, "rmsnorm")
    (comparison,) = study().comparisons
    assert comparison.differences == pytest.approx({1: -0.1, 2: -0.05, 3: 0.1})
    assert comparison.unpaired == (4, 5)
    assert comparison.judgement.mean == pytest.approx(-0.05 / 3)


def test_main_effects_by_hand(write: Write, study: Build) -> None:
    table = {
        ("layernorm", "pre"): (2.0, 2.2), ("layernorm", "post"): (2.4, 2.5),
        ("rmsnorm", "pre"): (1.9, 2.0), ("rmsnorm", "post"): (2.1, 2.6),
    }  # fmt: skip
    for (norm, placement), losses in table.items():
        for seed, loss in enumerate(losses):
            write(loss, seed, norm, placement)
    effects = {c.factor: c for c in study().comparisons if c.kind == "factor"}
    # norm: mean over placements of rmsnorm - layernorm; placement: mean over norms of post - pre
    assert effects["norm"].differences == pytest.approx({0: (-0.1 - 0.3) / 2, 1: (-0.2 + 0.1) / 2})
    assert effects["placement"].differences == pytest.approx({0: (0.4 + 0.2) / 2, 1: (0.3 + 0.6) / 2})
    assert (effects["norm"].this, effects["norm"].that) == ("rmsnorm", "layernorm")


def test_a_main_effect_takes_the_seeds_that_every_combination_has(write: Write, study: Build) -> None:
    for norm in ("layernorm", "rmsnorm"):
        for placement in ("pre", "post"):
            for seed in (1, 2):
                if (norm, placement, seed) != ("rmsnorm", "post", 2):
                    write(2.0, seed, norm, placement)
    (effect, _) = [c for c in study().comparisons if c.kind == "factor"]
    assert list(effect.differences) == [1]
    assert effect.unpaired == (2,)


def test_the_baseline_is_chosen_by_its_label(write: Write, study: Build) -> None:
    write(2.0)
    write(1.9, 1, "rmsnorm")
    assert study().baseline == "layernorm"
    assert study(baseline="rmsnorm").comparisons[0].differences == pytest.approx({1: 0.1})
    with pytest.raises(UserError, match=r"baseline=rmsnrom: no such variant; did you mean rmsnorm\?"):
        study(baseline="rmsnrom")


def test_the_final_loss_can_be_compared_instead_of_the_best(write: Write, study: Build) -> None:
    write([4.0, 2.0, 2.5])
    write([4.0, 2.1, 2.2], 1, "rmsnorm")
    assert study().comparisons[0].differences[1] == pytest.approx(0.1)
    assert study(metric="final").comparisons[0].differences[1] == pytest.approx(-0.3)


def test_lost_runs_are_counted_and_told(write: Write, study: Build, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write(2.0, seed)
    write(1.5, 1, "rmsnorm")
    write([4.0, math.nan], 2, "rmsnorm", status="diverged")
    write([4.0], 3, "rmsnorm", status="failed")
    write([], 4, "rmsnorm", status="running")
    jobs = [f"{norm}-pre-h4-s{seed}" for norm in ("rmsnorm", "layernorm") for seed in (1, 2, 3, 4, 5)]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": [*jobs, "dyt-pre-h4-s1"]}))
    found = study()
    assert [v.label for v in found.variants] == ["rmsnorm", "layernorm"]  # as the jobs stand
    assert dict(found.variants[0].counts) == {"done": 1, "diverged": 1, "failed": 1, "running": 1, "missing": 1}
    assert dict(found.variants[1].counts) == {"done": 3, "missing": 2}
    assert any("2 of 3 runs diverged or failed" in note for note in found.notes)
    assert any("dyt-pre-h4-s1" in note for note in found.notes)
    assert counts(found) == "10 runs: 4 done, 1 still running, 1 failed, 1 diverged, 3 without a directory"


def test_the_seed_of_a_name() -> None:
    assert without_seed("rmsnorm-pre-h4-s12") == "rmsnorm-pre-h4"
    assert without_seed("rmsnorm-pre-h4-s12-batch_size_1") == "rmsnorm-pre-h4-batch_size_1"
    assert without_seed("my-s-model") == "my-s-model"


def test_runs_of_another_corpus_split_or_precision_are_put_apart(write: Write, study: Build) -> None:
    write(2.0, 1)
    write(2.0, 2)
    write(1.0, 1, "rmsnorm", data="e" * 64)
    write(1.0, 2, "rmsnorm", precision="bf16-mixed")
    write(1.0, 3, "rmsnorm", settings={"data": {"val_fraction": 0.2}})
    found = study()
    assert [v.label for v in found.variants] == ["the variant"]
    assert list(found.apart) == [
        "another corpus: shakespeare (eeeeeeee)", "another precision: bf16-mixed",
        "another validation split: data.val_fraction=0.2, data.split_seed=1337",
    ]  # fmt: skip
    assert counts(found).endswith("3 put apart")


def test_the_path_of_a_corpus_is_no_factor(write: Write, study: Build) -> None:
    write(2.0, 1, settings={"data": {"name": "file", "path": "a.txt"}})
    write(2.0, 2, settings={"data": {"name": "file", "path": "b.txt"}})
    assert study().factors == ()


def test_threads_are_told_and_part_no_pairs(write: Write, study: Build) -> None:
    for seed, threads in ((1, None), (2, 1)):
        for norm in ("layernorm", "rmsnorm"):
            run = write(2.0, seed, norm, settings={"hardware": {"threads": threads}})
            run.update(device=run.info["device"] | {"threads": threads or 2})
    found = study()
    assert [f.name for f in found.factors] == ["norm"]
    assert found.comparisons[0].judgement.n == 2
    assert any("different numbers of threads (2 with 2, 2 with 1)" in note for note in found.notes)


def test_the_first_of_two_equal_runs_counts(write: Write, study: Build) -> None:
    write(2.0, 1, name="first")
    write(3.0, 1, name="again")
    found = study()
    assert found.variants[0].runs[1].best == 2.0
    assert any(note.startswith("1 runs repeat") for note in found.notes)


def test_other_code_devices_and_evaluations_are_told(write: Write, study: Build) -> None:
    write(2.0, 1)
    run = write([4.0, 3.0, 2.5, 2.0], 1, "rmsnorm")
    info = run.info
    run.update(fingerprints=info["fingerprints"] | {"code": "x" * 64}, device=info["device"] | {"name": "other"})
    notes = " ".join(study().notes)
    assert "2 versions of the code" in notes
    assert "2 devices" in notes
    assert "3 to 4 evaluations" in notes


def test_several_folders_and_single_runs(write: Write, study: Build, tmp_path: Path) -> None:
    write(2.0, 1)
    write(2.0, 1, "rmsnorm", folder="other")
    assert len(study("sweep", "other").records) == 2
    assert len(study("other/rmsnorm-pre-h4-s1", "sweep").records) == 2
    assert len(study("sweep", "sweep/layernorm-pre-h4-s1", "other").records) == 2  # none is read twice


def test_a_folder_of_links_to_chosen_runs(write: Write, study: Build, tmp_path: Path) -> None:
    (tmp_path / "chosen").mkdir()
    for seed in (1, 2):
        run = write(2.0, seed)
        (tmp_path / "chosen" / run.path.name).symlink_to(run.path)
    assert len(study("chosen").records) == 2
    assert len(study("chosen", "sweep").records) == 2  # they are the same runs


def test_mistaken_folders_are_told_together(tmp_path: Path) -> None:
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
        ("run.json", '{"status": "done"}', "run.json lacks 'name'"),
        ("run.json", '{"name": "x", "status": "done", "fingerprints": {}}', "run.json lacks 'fingerprints.code'"),
        ("result.json", '{"status": "do', "a file of it is not valid JSON"),
        ("result.json", "[1]", "result.json is not as it was written"),
        ("result.json", '{"seconds": "many"}', "result.json is not as it was written"),
        ("config.yaml", "seed: -1", "config.yaml: seed=-1: must be an integer"),
        ("config.yaml", "seed: [", "config.yaml: cannot be read as a configuration"),
        ("metrics.csv", "step,tokens,seconds,val/loss,val/loss_windows\n1,1,1,x,\n", "metrics.csv cannot be read"),
        ("metrics.csv", "\xff\xfe\n", "metrics.csv cannot be read"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(write: Write, study: Build, file: str, content: str, reason: str) -> None:
    write(2.0, 1)
    (write(2.0, 2).path / file).write_bytes(content.encode("latin-1"))
    found = study()
    assert len(found.records) == 1
    assert reason in found.unreadable[0].reason
    assert counts(found) == "2 runs: 1 done, 1 unreadable"


def test_half_a_row_is_none(write: Write, study: Build) -> None:
    run = write([4.0, 2.0], 1, status="running")
    with run.metrics_path.open("a") as file:
        file.write("3,2304,2.5,0.001,,1.0")
    (record,) = study().records
    assert record.best == 2.0
    assert record.curve["step"].tolist() == [0, 1]


def test_a_run_without_metrics_yet(write: Write, study: Build) -> None:
    write([], 1, status="running").metrics_path.unlink()
    found = study()
    assert math.isnan(found.records[0].best)
    assert headline(found) == [
        "No run has come to its end, so there is nothing to compare (1 run: 1 still running)."
    ]  # fmt: skip


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
    assert found.unreadable[0].reason == "was deleted meanwhile"


def sweep(write: Write, seeds: int, shifts: dict[str, float], noise: float = 0.001) -> None:
    for norm, shift in shifts.items():
        for seed in range(seeds):
            write(2.0 + 0.05 * seed + shift + noise * (-1) ** seed * (seed % 3) * (shift != 0), seed, norm)


def test_headlines(write: Write, study: Build) -> None:
    sweep(write, 10, {"layernorm": 0.0, "rmsnorm": -0.02, "dyt": 0.05, "scalenorm": 0.0})
    (first, rest) = headline(study())
    assert first.startswith("rmsnorm is better than layernorm by 0.0199 nats (95\u00a0% interval 0.019 to 0.0208")
    assert first.endswith(", p = 0.0059, 10 seeds).")
    assert rest == "Of the other variants: 1 worse, 1 no different."
    assert headline(study(baseline="rmsnorm"))[0] == "No variant is better than rmsnorm."
    assert further_seeds(study()) == 0
    assert next_command(study()) is None


def test_headline_of_equality(write: Write, study: Build) -> None:
    sweep(write, 6, {"layernorm": 0.0, "rmsnorm": 0.0})
    assert headline(study()) == ["No variant differs from layernorm by more than 0.01 nats (6 seeds)."]


def test_headline_of_too_few_seeds(write: Write, study: Build) -> None:
    sweep(write, 5, {"layernorm": 0.0, "rmsnorm": -0.02})
    found = study()
    assert headline(found) == [
        "Undecided: 5 seeds cannot decide 1 comparison at 5\u00a0%: a difference takes at least 6, equality 5.",
        "So far the largest difference is rmsnorm, 0.0196 nats below layernorm; about 6 seeds in all would decide it.",
    ]
    assert further_seeds(found) == 1
    assert commands(found) == ["python -m gptexp.train -m seed=1,2"]
    assert next_command(found) == "python -m gptexp.train -m sweep.name=sweep seed=5"


def test_headline_of_one_seed_one_variant_and_no_pairs(write: Write, study: Build) -> None:
    write(2.0, 1)
    assert "one variant alone" in headline(study())[0]
    write(2.0, 2, "rmsnorm")
    assert headline(study())[0] == "Undecided: no seed has a finished run of layernorm and of another variant."
    write(2.1, 1, "rmsnorm")
    assert headline(study())[0].startswith("Undecided: 1 seed cannot decide 1 comparison")

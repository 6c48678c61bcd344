"""Run directories: claimed once, written whole, and continued with what may change."""

import multiprocessing
from pathlib import Path

import pytest

from gptexp.config.schema import Config, load_config, read_config
from gptexp.errors import UserError
from gptexp.runs.run import Run, code_fingerprint, unfinished, write_atomically


def claim(folder: Path, **info: object) -> Run:
    return Run.claim(folder / "run", Config(), info)


def _claim_path(folder: Path) -> str:
    return str(claim(folder).path)


def test_processes_never_share_a_directory(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        paths = pool.map(_claim_path, [tmp_path] * 12)
    assert len(set(paths)) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run", *(f"run-{n}" for n in range(2, 13))])


def test_the_newest_unfinished_run_of_a_configuration(tmp_path: Path) -> None:
    for year, status, config in ((2030, "done", "f"), (2020, "interrupted", "f"), (2025, "running", "f"),
                                 (2029, "running", "other"), (2031, "diverged", "f")):  # fmt: skip
        claim(tmp_path, fingerprints={"config": config}).update(started=f"{year}-01-01", status=status)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    found = unfinished(tmp_path, "f")
    assert found is not None
    assert found.info["started"] == "2025-01-01"
    assert unfinished(tmp_path, "g") is None
    assert unfinished(tmp_path / "nowhere", "f") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_torn_run_json_is_a_users_error(content: str, tmp_path: Path) -> None:
    run = claim(tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        Run.open(run.path)


def test_an_unknown_component_may_be_another_packages(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {norm: half}\nmax_steps: 0\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    norm, steps = caught.value.problems
    assert norm.startswith(f"{path}: model.norm=half: must be one of batchnorm,")
    assert norm.endswith("; GPTEXP_IMPORT=MODULE finds another package's")
    assert steps == f"{path}: max_steps=0: must be an integer of at least 1 or null"


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text, not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_changes_no_result_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    run = claim(tmp_path, fingerprints={"config": Config().fingerprint()})
    run.extend(run.check_resumable({"diagnostics_interval": 50, "hardware.timeout": 5, "output_dir": "elsewhere"}))
    assert (run.config.diagnostics_interval, run.config.hardware.timeout) == (50, 5)
    assert run.fingerprints == [Config().fingerprint()]
    for setting, value in (("logger.csv._target_", "x.Y"), ("seed", 1), ("max_steps", 10)):
        with pytest.raises(UserError, match=f"{setting}={value} differs from the run's"):
            run.check_resumable({setting: value})


@pytest.mark.parametrize(("schedule", "may"), [
    ({"name": "constant"}, True), ({"name": "cosine"}, False), ({"name": "cosine", "decay_steps": 1000}, True),
    ({"name": "linear"}, False), ({"name": "wsd"}, False),
])  # fmt: skip
def test_more_steps_need_a_schedule_that_does_not_depend_on_them(
    schedule: dict[str, object], may: bool, tmp_path: Path
) -> None:
    run = Run.claim(tmp_path / "run", read_config({"schedule": schedule, "max_steps": 1000}), {})
    if may:
        assert run.check_resumable({"max_steps": 2000}).max_steps == 2000
    else:
        with pytest.raises(UserError, match="name the schedule to go on with"):
            run.check_resumable({"max_steps": 2000})
    named = {"schedule.name": "constant", "schedule.warmup_steps": 100}  # as many as the run has had
    assert run.check_resumable({"max_steps": 2000, **named}).schedule.warmup_steps == 100


def test_the_code_has_a_fingerprint() -> None:
    assert code_fingerprint(Config()) == code_fingerprint(Config())
    assert len(code_fingerprint(Config())) == 64

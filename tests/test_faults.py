"""The campaign of faults: what it brings about is real, and it does not call recovered what is not."""

import errno
import json
import random
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from urllib.error import HTTPError

import pytest

from benchmarks import evidence, fault_kinds, faults, injection
from benchmarks.disturbed import LOST, TARGETS, Campaign, Case, Ended, NotInjected, NotRecovered
from benchmarks.fault_kinds import KINDS, Kind
from benchmarks.faults import Fault, Result
from benchmarks.wandb_server import Trouble, serving
from gptexp.runs.run import Run
from tests.conftest import REPOSITORY


@pytest.fixture
def pair(finished: Run, tmp_path: Path) -> list[Path]:
    """Two copies of a run."""
    return [shutil.copytree(finished.path, tmp_path / "runs" / name) for name in ("one", "two")]


def test_times_are_no_evidence(tiny: Callable[..., Run], finished: Run) -> None:
    pair = [tiny("again").path, finished.path]
    assert pair[0].joinpath("metrics.csv").read_bytes() != pair[1].joinpath("metrics.csv").read_bytes()
    assert evidence.differences(*map(evidence.of_run, pair)) == []


@pytest.mark.parametrize(("file", "old", "new", "told"), [
    ("metrics.csv", "24,1536,3.", "24,1536,4.", "metrics.csv, line"),
    ("samples.txt", "--- step 8", "--- step 9", "samples.txt, line"),
    ("result.json", '"best_step": 24', '"best_step": 16', "result.json, line 5"),
    ("result.json", "{", "", "result.json, line 1: 'unreadable: JSONDecodeError"),
    ("run.json", '"done"', '"running"', "run.json, line 1: 'status running' in place of 'status done'"),
    ("metrics.csv", "\n24,", "\n", "metrics.csv, line"),
])  # fmt: skip
def test_what_a_run_leaves_is(file: str, old: str, new: str, told: str, pair: list[Path]) -> None:
    text = (pair[1] / file).read_text()
    assert old in text
    (pair[1] / file).write_text(text.replace(old, new, 1))
    (found,) = evidence.differences(*map(evidence.of_run, pair))
    assert found.startswith(told)


def test_a_file_too_many_and_one_too_few() -> None:
    found = evidence.differences({"a": ["1"], "b": ["2"]}, {"a": ["1"], "c": ["2"]})
    assert found == ["b is missing", "c should not be there"]


def test_finished_runs_must_agree(pair: list[Path], tmp_path: Path) -> None:
    assert evidence.of_training(tmp_path, "") == evidence.of_run(pair[0])
    (pair[1] / "samples.txt").write_text("other")
    assert evidence.of_training(tmp_path, "")["samples.txt"] == ["other"]
    for run in pair:
        Run.open(run).update(status="failed")
    assert evidence.of_training(tmp_path, "") == {"runs": ["none is done: failed, failed"]}


def test_ways_to_tear_a_file(tmp_path: Path) -> None:
    path, content, draw = tmp_path / "file", bytes(range(1, 101)), random.Random(0)
    right: dict[str, Callable[[bytes], bool]] = {
        "cut": content.startswith,
        "zeros": lambda torn: len(torn) == 100 and content.startswith(torn.rstrip(b"\0")),
        "hole": lambda torn: len(torn) == 100 and all(new in (0, old) for new, old in zip(torn, content, strict=True)),
        "longer": lambda torn: torn.startswith(content) and set(torn[100:]) == {0},
        "older": lambda torn: torn == b"before",
    }
    for how, check in right.items():
        path.write_bytes(content)
        assert injection.tear(path, how, draw, older=b"before").startswith("file ")
        assert path.read_bytes() != content
        assert check(path.read_bytes()), how


@pytest.mark.skipif(not injection.can_mount(), reason="may not mount file systems")
def test_a_full_disk_is_full_until_there_is_space_again(tmp_path: Path) -> None:
    with injection.small_disk(tmp_path):
        ballast = injection.fill(tmp_path, 3 * injection.PAGE)
        (tmp_path / "fits").write_bytes(bytes(2 * injection.PAGE))
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
            (tmp_path / "file").write_bytes(bytes(2 * injection.PAGE))
        ballast.unlink()
        (tmp_path / "file").write_bytes(bytes(2 * injection.PAGE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(fault_kinds.KINDS["read-only"].lacking() != "", reason="root may not mount here")
def test_a_read_only_folder_is_so_until_it_no_longer_is(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with (tmp_path / "open").open("w") as file:
        with injection.read_only(tmp_path):
            for path in (tmp_path / "new", tmp_path / "inner" / "new"):
                with pytest.raises(OSError, match=rf"\[Errno ({errno.EROFS}|{errno.EACCES})\]"):
                    path.write_text("x")
            file.write("goes on")  # what was open for writing stays so
        (tmp_path / "inner" / "new").write_text("x")
    assert (tmp_path / "open").read_text() == "goes on"


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")
def test_no_file_grows_beyond_a_limit(tmp_path: Path) -> None:
    program = "import sys; sys.stdin.readline(); open('file', 'wb', 0).write(bytes(5000))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.PIPE, text=True)
    with injection.limited_files(process, 3000):
        process.communicate("\n")
    assert (tmp_path / "file").stat().st_size == 3000


@pytest.mark.skipif(not injection.can_trace(), reason="has no strace that may trace")
def test_a_process_is_killed_at_a_system_call(tmp_path: Path) -> None:
    made = [tmp_path / "outputs" / name for name in "abc"]
    made[0].parent.mkdir()
    command, log = ["mkdir", *map(str, made)], tmp_path / "log"
    subprocess.run([*injection.counting(log), *command], check=True)
    calls = [call for call in injection.traced_calls(log, "outputs") if call.name == "mkdir"]
    assert [(call.number, call.path) for call in calls] == [(n, str(path)) for n, path in enumerate(made, 1)]
    assert injection.traced_calls(log, "elsewhere") == []
    for path in made:
        path.rmdir()
    assert subprocess.run([*calls[1].prefix(), *command], check=False).returncode == -9
    assert [path.exists() for path in made] == [True, False, False]


@pytest.mark.parametrize(("trouble", "error", "words"), [
    ("refuses", HTTPError, "HTTP Error 500"), ("hangs", TimeoutError, "timed out"),
    ("vanishes", OSError, "refused|closed|reset|pipe"),
])  # fmt: skip
def test_the_server_answers_and_then_makes_trouble(trouble: Trouble, error: type[OSError], words: str) -> None:
    def ask() -> object:
        query = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
        with urllib.request.urlopen(f"{server.url}/graphql", data=query, timeout=1) as answer:
            return json.loads(answer.read())["data"]["viewer"]["username"]

    with serving(trouble, healthy=2) as server:
        assert [ask(), ask()] == ["me", "me"]
        assert server.troubled == 0
        for _ in range(2):
            with pytest.raises(error, match=words):
                ask()
        assert server.troubled > 0


def test_each_kind_has_its_share() -> None:
    planned = faults.plan(100, list(KINDS))
    for name, kind in KINDS.items():
        assert [fault.number for fault in planned if fault.kind == name] == list(range(kind.weight))
    assert len({fault.kind for fault in faults.plan(len(KINDS), list(KINDS))}) >= 6
    assert faults.plan(3, ["torn"]) == [Fault("torn", n) for n in range(3)]


@pytest.mark.parametrize(("ended", "error"), [
    (Ended(1, "", "error: OSError: [Errno 28] No space left on device\n"), None),
    (Ended(2, "", "error: output_dir: cannot write outputs (Read-only file system)\n"), None),
    (Ended(0, "no picture ([Errno 28] No space left on device)\n", ""), None),
    (Ended(0, "done\n", ""), NotInjected),
    (Ended(1, "", "Traceback (most recent call last):\nOSError: [Errno 28]\n"), NotRecovered),
    (Ended(1, "Traceback (most recent call last):\n", "error: OSError: [Errno 28]\n"), NotRecovered),
    (Ended(1, "", ""), NotRecovered),
    (Ended(-11, "", "error: No space left on device"), NotRecovered),
])  # fmt: skip
def test_a_fault_is_told_in_a_line(ended: Ended, error: type[Exception] | None) -> None:
    with pytest.raises(error) if error else nullcontext():
        fault_kinds.check_told(ended)


@pytest.mark.parametrize(("outcome", "injected", "recovered", "worst"), [
    (None, True, True, ""),
    (NotInjected("too late"), False, False, "too late"),
    (NotRecovered("row 3 differs"), True, False, "row 3 differs"),
    (OSError(errno.EPERM, "not here"), False, False, "PermissionError: [Errno 1] not here"),
])  # fmt: skip
def test_what_is_counted(
    outcome: Exception | None, injected: bool, recovered: bool, worst: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tried: list[Case] = []

    def inject(case: Case) -> None:
        tried.append(case)
        if outcome:
            raise outcome

    monkeypatch.setitem(KINDS, "torn", Kind(1, inject))
    result = faults.take(Campaign(tmp_path), Fault("torn", 0))
    assert (result.injected, result.recovered, result.worst) == (injected, recovered, worst)
    assert len({case.draw.random() for case in tried}) == len(tried) == (1 if injected else faults.ATTEMPTS)
    assert (result.folder is not None and Path(result.folder).exists()) == (injected and not recovered)
    expected = {"number": 1, "not injected": int(not injected), "recovered": int(recovered), "worst": worst}
    assert faults.summary([result])["torn"] == expected


@pytest.mark.parametrize(("recovered", "injected", "status"), [(True, True, 0), (False, True, 1), (False, False, 1)])
def test_the_exit_status(
    recovered: bool, injected: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    result = Result("torn", 0, "training", "cut", injected, recovered, "a line", LOST, 1.0, str(tmp_path))
    monkeypatch.setattr(faults, "run", lambda *_: [result])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["faults", "--n=1", "--only=torn", f"--out={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit, match="1") if status else nullcontext():
        faults.main()
    assert ("not recovered: torn 0, training: cut" in capsys.readouterr().out) == (injected and not recovered)
    assert json.loads((tmp_path / "out.json").read_text())["faults"][0]["recovered"] == recovered


WRONG = """
import runpy, sys
from pathlib import Path
sys.argv[0] = sys.argv.pop(1)
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    if not Path.cwd().name.startswith("undisturbed"):
        for path in Path("outputs").rglob("metrics.csv"):
            path.write_text(path.read_text().replace(",0.001,", ",0.0011,", 1))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_row_that_differs_is_not_recovered(tmp_path: Path) -> None:
    """A program stands in for ours that changes a digit of metrics.csv in the end."""
    (tmp_path / "wrong.py").write_text(WRONG)
    campaign = Campaign(tmp_path, program=[sys.executable, str(tmp_path / "wrong.py")])
    results = [faults.take(campaign, Fault(kind, 0)) for kind in ("kill-compare", "kill-sweep")]
    assert [(result.injected, result.recovered) for result in results] == [(True, False)] * 2
    assert "metrics.csv, line" in results[1].worst


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_small_campaign(tmp_path: Path) -> None:
    kinds = ["kill-training", "kill-compare", "no-space", "read-only"]
    command = [sys.executable, "-m", "benchmarks.faults", "--n=6", f"--out={tmp_path / 'figures.json'}"]
    done = subprocess.run([*command, *(f"--only={kind}" for kind in kinds)], cwd=REPOSITORY, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worst thing seen" in done.stdout
    report = json.loads((tmp_path / "figures.json").read_text())
    assert len(report["faults"]) == 6
    assert sum(row["recovered"] for row in report["kinds"].values()) == sum(f["injected"] for f in report["faults"])
    assert {f["target"] for f in report["faults"]} <= set(TARGETS)

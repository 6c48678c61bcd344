"""Problems with answers: their rows, their loss mask, what is held out, and whole runs on them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptexp import sample
from gptexp.config.schema import read_section
from gptexp.data.batches import IGNORED, Batch
from gptexp.data.datamodule import CharDataModule
from gptexp.data.tokenizers import tokenizer_from_dict
from gptexp.errors import UserError
from gptexp.runs.files import read_metrics, read_samples
from gptexp.runs.run import Run
from gptexp.tasks.arithmetic import Arithmetic, Operation
from gptexp.tasks.problems import Problems
from gptexp.training.load import load_data, load_model

ADDITION = ["task=arithmetic", "task.digits=1", "task.val_examples=40", "logger=none", "hardware=cpu",
            "model.n_layer=1", "model.n_embd=32", "model.block_size=8", "batch_size=16", "max_steps=60",
            "eval_interval=20", "schedule.warmup_steps=3", "optimizer.learning_rate=1e-2"]  # fmt: skip


def arithmetic(block_size: int = 32, **settings: Any) -> CharDataModule:
    data = CharDataModule({"name": "none"}, {"name": "arithmetic", **settings}, block_size=block_size)
    data.setup()
    return data


def rows_of(data: CharDataModule, batch: Batch) -> list[tuple[str, str]]:
    """The text of each row of a batch, and that of its targets."""
    decode = data.encoded.tokenizer.decode
    found = []
    for x, y, there in zip(batch.x, batch.y, batch.mask, strict=True):
        whole = decode([*x[there], y[there][-1]])
        found.append((whole, decode(y[y != IGNORED])))
    return found


@given(
    st.integers(0, 10**6 - 1), st.integers(0, 10**6 - 1), st.sampled_from("+-*"), st.booleans(), st.booleans()
)  # fmt: skip
def test_a_problem_as_it_is_written(a: int, b: int, sign: str, reverse: bool, padding: bool) -> None:
    task = Arithmetic(operators=["+", "-", "*"], digits=6, reverse=reverse, zero_padding=padding)
    prompt, answer = task.written(Operation(a, sign, b))
    answer = answer[::-1] if reverse else answer
    left, right = re.split(r"(?<=\d)[-+*]", prompt.rstrip("="))
    assert (int(left), int(right)) == (a, b)
    assert int(answer) == {"+": a + b, "-": a - b, "*": a * b}[sign]
    if padding:
        assert len(left) == len(right) == 6
        assert len(answer.lstrip("-")) == {"+": 7, "-": 6, "*": 12}[sign]
    else:
        assert answer == str(int(answer))


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_the_steps_of_a_scratchpad_add_up(a: int, b: int) -> None:
    written = Arithmetic(digits=4, scratchpad=True).written(Operation(a, "+", b)).answer
    steps, _, answer = written.removeprefix("<").rpartition(">")
    carry, digits = 0, ""
    for step in steps.split(";"):
        x, y, before, total, written, after = map(int, re.findall(r"\d+", step))
        assert (before, x + y + before) == (carry, total)
        digits = f"{total % 10}{digits}"
        carry = total // 10
        assert (int(written), after) == (int(digits), carry)
    assert int(answer) == a + b == int(f"{carry}{digits}")


def test_only_the_answer_is_a_target_and_only_padding_is_masked() -> None:
    data = arithmetic(digits=2)
    batch = data.train.train_batch(0, 0, 50)
    for whole, targets in rows_of(data, batch):
        prompt, _, answer = whole.partition("=")
        assert targets == answer
        assert f"{sum(map(int, prompt.split('+')))}\n" == answer
    lengths = batch.mask.sum(1)
    assert (batch.x[~batch.mask] == 0).all()
    assert lengths.min() < lengths.max() == batch.x.shape[1]
    assert batch.tokens == (batch.y != IGNORED).sum()


def test_batches_are_a_function_of_seed_and_step_and_are_shared_out() -> None:
    data = arithmetic()
    whole, again = data.train.train_batch(3, 5, 12), arithmetic().train.train_batch(3, 5, 12)
    parts = [data.train.train_batch(3, 5, 12, slice(begin, begin + 4)) for begin in (0, 4, 8)]
    assert (whole.x == again.x).all()
    assert (np.concatenate([part.y for part in parts]) == whole.y).all()
    assert {part.tokens for part in parts} == {whole.tokens}
    assert (data.train.train_batch(3, 6, 12).x != whole.x).any()
    assert (data.train.train_batch(4, 5, 12).x != whole.x).any()


@pytest.mark.parametrize("limit", [None, 30])
def test_what_is_held_out_is_never_trained_on(limit: int | None) -> None:
    data = arithmetic(digits=1, val_examples=50, train_examples=limit)
    held_out = {whole for whole, _ in rows_of(data, data.val.rows(range(50)))}
    seen = {whole for step in range(100) for whole, _ in rows_of(data, data.train.train_batch(0, step, 20))}
    assert len(held_out) == data.val.n_rows == 50
    assert not held_out & seen
    assert len(seen) == (limit or 50)  # all of the hundred that there are


def test_carries_are_as_frequent_as_each_other() -> None:
    def carries(a: int, b: int) -> int:
        return sum((a % 10**place + b % 10**place) >= 10**place for place in range(1, 4))

    def counted(of: Callable[[int, int], int], **settings: Any) -> list[int]:
        data = arithmetic(**settings)
        rows = rows_of(data, data.train.train_batch(0, 0, 12000))
        found = Counter(of(*map(int, whole.partition("=")[0].split("+"))) for whole, _ in rows)
        return [found[n] for n in sorted(found)]

    by_chance, balanced = counted(carries), counted(carries, balance_carries=True)
    assert len(by_chance) == len(balanced) == 4
    assert max(by_chance) > 2 * min(by_chance)
    assert all(abs(count - 3000) < 250 for count in balanced)
    both = counted(carries, balance_digits=True, balance_carries=True)  # 0 to 1, 2 or 3 carries
    assert [n / 12000 for n in both] == pytest.approx([13 / 36, 13 / 36, 7 / 36, 3 / 36], abs=0.02)
    lengths = counted(lambda a, b: len(str(max(a, b))), balance_digits=True)
    assert [n / 12000 for n in lengths] == pytest.approx([0.34, 0.33, 0.33], abs=0.02)


def test_what_is_held_out_is_the_same_however_it_is_written() -> None:
    def held_out(**settings: Any) -> set[str]:
        data = arithmetic(128, zero_padding=True, **settings)
        return {whole.partition("=")[0] for whole, _ in rows_of(data, data.val.rows(range(1000)))}

    plain = held_out()
    assert len(plain) == 1000
    assert plain == held_out(reverse=True, train_examples=50, balance_carries=True, balance_digits=True)
    assert plain == held_out(scratchpad=True)
    assert plain != held_out(split_seed=1)


@pytest.mark.parametrize(("settings", "block", "line"), [
    ({"digits": 9}, 8, "model.block_size=8: shorter than the longest prompt with its answer, 30 tokens; allowed: at "
                       "least 30"),
    ({"digits": 1, "train_examples": 80, "val_examples": 40}, 8,
     "task.train_examples=80: there are 100 problems of task.digits=1, for training and validation; allowed: at most "
     "60"),
    ({"digits": 1, "val_examples": 51}, 8, "task.val_examples=51: there are 100 problems of task.digits=1, for "
                                           "training and validation; allowed: at most 50"),
])  # fmt: skip
def test_impossible_problems(settings: dict[str, Any], block: int, line: str) -> None:
    with pytest.raises(UserError) as caught:
        arithmetic(block, **settings)
    assert caught.value.problems == [line]


def test_all_problems_that_there_are() -> None:
    data = arithmetic(digits=1, train_examples=60, val_examples=40)
    assert isinstance(data.train, Problems)
    assert data.train.n_rows + data.val.n_rows == 100


def test_a_run_tells_how_many_answers_are_right(
    command: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exactly as many as the model gives, one symbol at a time."""
    assert command(*ADDITION, f"hydra.run.dir={tmp_path / 'run'}") == 0
    run = Run.open(tmp_path / "run")
    told = [row["val/exact_match"] for row in read_metrics(run.metrics_path) if "val/exact_match" in row]
    assert len(told) == 4
    assert run.result["final"]["val/exact_match"] == told[-1]  # type: ignore[index]
    data = load_data(run, run.config)
    assert isinstance(data.val, Problems)
    tokenizer = tokenizer_from_dict(run.info["tokenizer"])
    model = load_model(run, "last", tokenizer.vocab_size)
    prompts = [tokenizer.encode(problem.prompt).tolist() for problem in data.val.problems]
    rows = model.generate(prompts, 8, temperature=0.0, stop=tokenizer.encode("\n").tolist())
    answers = [tokenizer.decode(row).rstrip("\n") for row in rows]
    right = [given == problem.answer for given, problem in zip(answers, data.val.problems, strict=True)]
    assert 0 < sum(right) < len(right)
    assert told[-1] == sum(right) / len(right)
    shown = read_samples(run.samples_path)[-1][1].split("\n")[:10]
    assert [line.endswith(")") for line in shown] == [not r for r in right[:10]]
    assert shown[0].startswith(f"{data.val.problems[0].prompt}{answers[0]}")
    capfd.readouterr()
    asked = f"prompt={data.val.problems[0].prompt}"
    assert command(f"run={run.path}", "checkpoint=last", asked, main=sample.main) == 0
    assert capfd.readouterr().out == f"{data.val.problems[0].prompt}{answers[0]}\n"
    assert command(f"run={run.path}", main=sample.main) == 2
    assert capfd.readouterr().err == "error: prompt: is missing; give a problem of task=arithmetic\n"


def problem_file(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_problems_of_a_file(tokenizer: str, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i}: ", "answer": f"line {i}\nünd {i * i}"} for i in range(40)] * 2  # each of them twice
    path = problem_file(tmp_path / "problems.jsonl", lines)
    data = CharDataModule({"name": "file", "path": str(path), "tokenizer": tokenizer, "val_fraction": 0.25},
                          {"name": "problems"}, block_size=64)  # fmt: skip
    data.setup()
    held_out, trained = (rows_of(data, split.rows(range(split.n_rows))) for split in (data.val, data.train))
    assert (len(held_out), len(trained)) == (20, 60)
    assert not {w for w, _ in held_out} & {w for w, _ in trained}
    assert {w for w, _ in held_out + trained} == {f"{d['prompt']}{d['answer']}\x03" for d in lines}
    assert all(whole == f"{targets.split()[1]}: {targets}" for whole, targets in held_out)


@pytest.mark.parametrize(("lines", "problem"), [
    ([{"prompt": "1", "answer": "2"}, "\n"], "line 2 is empty; allowed: a JSON object in each line"),
    (["{\n"], "line 1 is not JSON; allowed: a JSON object in each line"),
    ([{"prompt": "1", "answer": ""}], 'line 1 has no text "answer"; allowed: {"prompt": TEXT, "answer": TEXT}'),
    ([{"prompt": "1"}], 'line 1 has no text "answer"; allowed: {"prompt": TEXT, "answer": TEXT}'),
    ([{"prompt": 1, "answer": "2"}], 'line 1 has no text "prompt"; allowed: {"prompt": TEXT, "answer": TEXT}'),
    ([{"prompt": "a\x03", "answer": "2"}], 'line 1: "prompt" has the character U+0003, which ends an answer'),
])  # fmt: skip
def test_a_file_without_problems(lines: list[Any], problem: str, tmp_path: Path) -> None:
    path = problem_file(tmp_path / "problems.jsonl", lines)
    data = CharDataModule({"name": "file", "path": str(path)}, {"name": "problems"})
    with pytest.raises(UserError) as caught:
        data.setup()
    assert caught.value.problems == [f"data.path={path}: {problem}"]


def test_settings_that_have_no_effect_together() -> None:
    def problems(data: dict[str, Any], **task: Any) -> list[str]:
        return read_section("task", task).problems(read_section("data", data))  # type: ignore[no-any-return]

    assert problems({"name": "names"}, name="arithmetic") == [
        "data.name=names: has no effect with task=arithmetic, which makes its own problems; allowed: data=none"
    ]
    assert problems({"name": "none"}, name="text") == ["data.name=none: task=text needs a corpus"]
    assert problems({"name": "shakespeare"}, name="problems") == [
        "data.name=shakespeare: task=problems needs data=file data.path=FILE"]  # fmt: skip
    assert problems({"name": "none"}, name="arithmetic", operators=["*"], scratchpad=True) == [
        "task.scratchpad=true: needs task.operators=['+']"]  # fmt: skip
    assert problems({"name": "none", "val_fraction": 0.2}, name="arithmetic") == [
        "data.val_fraction=0.2: has no effect with task=arithmetic; see task.val_examples"]  # fmt: skip

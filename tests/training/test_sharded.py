"""Checkpoints that are directories: written beside, put in place at once, and read without unpickling."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from gptexp import sample
from gptexp.errors import UserError
from gptexp.runs import Run
from gptexp.training.callbacks.checkpoints import publish
from gptexp.training.checkpoint import read_checkpoint
from tests.training import write_shards


def shard(source: Path, folder: Path, **more: Any) -> None:
    """What Lightning's FSDP strategy makes of a checkpoint, with further entries."""
    content = torch.load(source, weights_only=True)
    parts = {"model": content.pop("state_dict"), "optimizer_0": content.pop("optimizer_states")[0], **more}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(parts, checkpoint_id=folder, no_dist=True)
    torch.save(content, folder / "meta.pt")


@pytest.fixture
def run(tiny: Callable[..., Run]) -> Run:
    return tiny("run", "max_steps=4", "eval_interval=4")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_directory_is_read_as_the_file_is(
    processes: int, run: Run, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = (f"run={run.path}", "max_new_tokens=40")
    assert command(*ask, main=sample.main) == 0
    text = capsys.readouterr().out
    path, folder = run.checkpoint("best"), tmp_path / "shards"
    if processes == 1:
        shard(path, folder)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*torchrun, str(write_shards.__file__), str(path), str(folder)], check=True, timeout=240)
        assert len(list(folder.glob("*.distcp"))) == 2
    whole = read_checkpoint(path, "run")
    path.unlink()
    shutil.copytree(folder, path.with_name(".best.ckpt.4"))
    publish(path.with_name(".best.ckpt.4"), path)
    parts = read_checkpoint(path, "run")
    assert parts["gptexp"] == whole["gptexp"]
    assert parts["global_step"] == 4
    weights = {name: tensor for name, tensor in whole["state_dict"].items() if tensor.ndim}
    assert weights.keys() <= parts["state_dict"].keys()
    assert all(torch.equal(tensor, parts["state_dict"][name]) for name, tensor in weights.items())
    assert read_checkpoint(path, "run", weights=False)["state_dict"] == {}
    assert command(*ask, main=sample.main) == 0
    assert capsys.readouterr().out == text


def test_a_new_directory_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("a checkpoint of one process")
    (tmp_path / ".best.ckpt.5").mkdir()
    for step in (5, 10):
        folder = tmp_path / f".last.ckpt.{step}"
        folder.mkdir()
        (folder / "meta.pt").write_text(str(step))
        publish(folder, path)
        assert (path / "meta.pt").read_text() == str(step)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".best.ckpt.5", folder.name, "last.ckpt"]
    shutil.copytree(tmp_path, tmp_path.with_name("copy"), symlinks=True)  # as cp -a and rsync -a copy
    assert (tmp_path.with_name("copy") / "last.ckpt" / "meta.pt").read_text() == "10"


def test_a_copy_in_which_links_were_followed(tmp_path: Path) -> None:
    path, folder = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.10"
    for each in (path, folder):
        each.mkdir()
    (folder / "meta.pt").write_text("10")
    publish(folder, path)
    assert (path / "meta.pt").read_text() == "10"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".last.ckpt.10", "last.ckpt"]


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["index", "value", "rest"])
def test_nothing_is_unpickled(where: str, run: Run, tmp_path: Path) -> None:
    folder, trace = tmp_path / "shards", tmp_path / "trace"
    shard(run.checkpoint("best"), folder, **({"optimizer_1": {"lr": Evil(trace)}} if where == "value" else {}))
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    elif where == "rest":
        torch.save({"gptexp": Evil(trace)}, folder / "meta.pt")
    with pytest.raises(UserError, match=r"is not a checkpoint of gptexp \(UnpicklingError\)"):
        read_checkpoint(folder, "run", weights=False)
    assert not trace.exists()


def test_an_unfinished_directory(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shard(run.checkpoint("best"), folder)
    (folder / "meta.pt").unlink()
    with pytest.raises(UserError, match="is not a checkpoint, or is damaged"):
        read_checkpoint(folder, "run")

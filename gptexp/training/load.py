"""What a run directory holds, ready to be used: its data, its checkpoints, and its model with their weights."""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from gptexp.config.schema import Config, read_section
from gptexp.data.datamodule import CharDataModule
from gptexp.errors import UserError
from gptexp.models.settings import build_model
from gptexp.runs.run import Run


def load_data(run: Run, config: Config) -> CharDataModule:
    """The data of the corpus that the run was begun with, which may be the fallback of the one that it asked for.

    Raises:
        UserError: when that corpus is gone or has changed.
    """
    known = run.info["data"]
    path, val_path = (known.get(key) if known["corpus"] == "file" else None for key in ("path", "val_path"))
    data = CharDataModule(
        replace(config.data, name=known["corpus"], path=path, val_path=val_path, offline_fallback=None),
        read_section("task", known["task"]),
        block_size=config.model.block_size,
        batch_size=config.batch_size,
        accumulate=config.gradient_accumulation_steps,
        batch_warmup_steps=config.batch_warmup_steps,
        min_sequences=config.model.min_sequences,
        eval_batch_size=config.eval_batch_size,
        eval_windows=config.eval_windows,
        seed=config.seed,
    )
    data.setup()
    if data.encoded.fingerprint != run.info["fingerprints"]["data"]:
        raise UserError(f"resume={run.path}: {known['path']} has changed since the run began")
    return data


def load_model(run: Run, checkpoint: Literal["best", "last"], vocab_size: int) -> Any:
    """The model of a run with a checkpoint's weights, on the CPU or a GPU if there is one, in evaluation mode.

    Raises:
        UserError: when the checkpoint is cut short, or is not this run's.
    """
    path = run.checkpoint(checkpoint)
    weights = read_checkpoint(path, f"run={run.path}")["state_dict"]
    model = build_model(run.config.sized(vocab_size))
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    except RuntimeError as error:
        raise UserError(f"run={run.path}: {path} holds the weights of another model") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """A checkpoint's content, mapped into memory; nothing in it is unpickled but tensors and plain values.

    Args:
        path: of the file.
        key: what the command calls it, for messages.

    Raises:
        UserError: when the checkpoint is missing, damaged, or not one of this program.
    """
    if not path.exists():
        raise UserError(f"{key}: there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() is not None  # compares checksums, which torch does not look at
    except (OSError, zipfile.BadZipFile):  # a cut file lacks the directory at its end
        damaged = True
    if damaged:
        raise UserError(f"{key}: {path} is not a checkpoint, or is damaged")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint["gptexp"]["config"], str) or "state_dict" not in checkpoint:
            raise KeyError("gptexp")
    except Exception as error:
        raise UserError(f"{key}: {path} is not a checkpoint of gptexp ({type(error).__name__})") from error
    return dict(checkpoint)

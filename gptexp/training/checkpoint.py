"""Reads checkpoints without running anything that they hold."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from gptexp.errors import UserError

INDEX = ".metadata"
"""In the directory of a sharded checkpoint: torch's index of all tensors, a pickle."""

REST = "meta.pt"
"""Beside it: all that is no weight and no state of an optimizer, as Lightning writes it."""


def read_checkpoint(path: Path, key: str, weights: bool = True) -> dict[str, Any]:
    """A checkpoint's content; nothing in it is unpickled but tensors and plain values.

    Args:
        path: a file, which is mapped into memory, or the directory of a sharded checkpoint.
        key: what the command calls it, for messages.
        weights: read `state_dict` from a sharded checkpoint, too.

    Raises:
        UserError: when the checkpoint is missing, damaged, or not one of this program.
    """
    if not path.exists():
        raise UserError(f"{key}: there is no checkpoint {path}")
    whole = (path / INDEX).is_file() and (path / REST).is_file() if path.is_dir() else _undamaged(path)
    if not whole:
        raise UserError(f"{key}: {path} is not a checkpoint, or is damaged")
    try:
        if path.is_dir():
            from gptexp.training.sharded import read_sharded  # slow to import, and seldom needed

            checkpoint = read_sharded(path, weights)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint["gptexp"]["config"], str) or "state_dict" not in checkpoint:
            raise KeyError("gptexp")
    except Exception as error:
        raise UserError(f"{key}: {path} is not a checkpoint of gptexp ({type(error).__name__})") from error
    return dict(checkpoint)


def _undamaged(path: Path) -> bool:
    """Whether a file has all that was saved, by the checksums in it, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):  # the directory of a zip file is at its end, so a cut file has none
        return False

"""Reads checkpoints without running anything that they hold."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from gptexp.errors import UserError


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """A checkpoint's content, mapped into memory; nothing in it is unpickled but tensors and plain values.

    Raises:
        UserError: when the file is missing, cut short, or not a checkpoint of this program.
    """
    if not path.is_file():
        raise UserError(f"{key}: there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):  # the directory of a zip file is at its end, so a cut file has none
        raise UserError(f"{key}: {path} is not a checkpoint, or is cut short")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint["gptexp"]["config"], str) or "state_dict" not in checkpoint:
            raise KeyError("gptexp")
    except Exception as error:
        raise UserError(f"{key}: {path} is not a checkpoint of gptexp ({type(error).__name__})") from error
    return dict(checkpoint)

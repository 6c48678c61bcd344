"""Reads sharded checkpoints, to which every process has written its part, without running anything that they hold.

torch's own reader unpickles the index and every value that is no tensor. Here both are looked through before.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from gptexp.training.checkpoint import INDEX, REST


def read_sharded(path: Path, weights: bool = True) -> dict[str, Any]:
    """The content of a sharded checkpoint, as that of a single file; the optimizer's state is left out.

    Without weights, `state_dict` is empty.

    Raises:
        pickle.UnpicklingError: when it holds more than tensors and plain values.
    """
    reader = PlainReader(path)
    entries = reader.read_metadata().state_dict_metadata
    # Lightning would unpickle these when the run is resumed: the optimizer's numbers.
    values = {name: None for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)}
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata) and name.startswith("model.")
    } if weights else {}  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # this process reads alone
        try:
            load({**values, **state}, storage_reader=reader, planner=_PlainPlanner(), no_dist=True)
        except CheckpointException as error:  # no `Exception`
            raise next(reason for reason, _ in error.failures.values()) from error
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    return {**rest, "state_dict": {name.removeprefix("model."): tensor for name, tensor in state.items()}}


class PlainReader(FileSystemReader):
    """Reads a sharded checkpoint whose index names nothing but the records of an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: when it names anything else.
        """
        _Index(io.BytesIO((Path(self.path) / INDEX).read_bytes())).load()
        index: Metadata = super().read_metadata(*args, **kwargs)
        return index


class _Index(pickle.Unpickler):
    """Python's way of restricting what a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if "." not in name else None
        records = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        if (records and isinstance(found, type) and found.__module__ == module) or (module, name) in _PLAIN:
            return found
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


_PLAIN = (
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
)  # fmt: skip


class _PlainPlanner(DefaultLoadPlanner):
    """Reads plain values alone."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Refuse what is no plain value."""
        torch.load(value, weights_only=True)

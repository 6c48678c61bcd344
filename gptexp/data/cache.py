"""The cache folder: where it is, and how several processes can write to it at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gptexp.errors import UserError


def cache_folder() -> Path:
    """The folder for what can be made or downloaded again: GPTEXP_CACHE, or the system's cache folder."""
    given = os.environ.get("GPTEXP_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    import pooch  # here, because it is slow to import

    return Path(pooch.os_cache("gptexp"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and hold the lock for `path` while the block writes there.

    Raises:
        UserError: a full disk, a folder without write access, a file system without locks; it names GPTEXP_CACHE.
    """
    from filelock import FileLock  # here, because it is slow to import

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield
    except (OSError, NotImplementedError) as error:  # the second: filelock, on a file system without locks
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(
            f"GPTEXP_CACHE={cache_folder()}: cannot be written ({reason}); "
            "allowed: a folder with write access and enough free space"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write and read, which replaces `path` in one step when the block ends without an error.

    Use it under the lock of `path`, because it writes over what a killed process has left behind.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w+b") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

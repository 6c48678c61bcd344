"""How faults are brought about: signals, full and read-only file systems, torn files, crashes at a system call.

All of it is done to real processes and real file systems. What needs a privilege or a program that the machine lacks
is found out by trying: `can_mount` and `can_trace`.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = 4096  # bytes that a file system gives out at a time

SYSTEM_CALLS = ("write", "rename", "fsync", "ftruncate", "unlink", "mkdir", "chmod")
"""The system calls at which a traced process is killed; `traced_calls` finds those that concern a folder."""


def kill_group(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process and all that it has started, which must be in a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill(process: int) -> None:
    """SIGKILL to a process by its number, if there still is one."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def living(mark: str) -> dict[int, str]:
    """The processes with `mark` in their environment, and their command lines; none on a system without /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":  # a zombie has ended; whoever began it has yet to look
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems, as root usually may."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own in an empty folder, in memory; its content is gone afterwards.

    Raises:
        OSError, CalledProcessError: where that is not allowed.
    """
    _quietly("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder))
    try:
        yield
    finally:
        _unmount(folder)


def fill(folder: Path, room: int) -> Path:
    """Leave a file system `room` bytes of space, rounded down to pages.

    Returns:
        the file that takes up the rest; space is back when it is removed.
    """
    ballast = folder / ".ballast"
    space = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (space.f_bavail - room // PAGE) * space.f_frsize)
    return ballast


@contextmanager
def limited_files(process: "subprocess.Popen[str]", size: int) -> Iterator[None]:
    """No file of a process may grow beyond `size` bytes: what is left of a full disk where none can be mounted."""
    import resource  # here, because Windows has none

    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    yield


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in a folder can be changed; files that are open for writing stay so.

    As root, whom permissions do not stop, a read-only view of the folder is mounted over it.

    Raises:
        PermissionError: for root without the right to mount.
    """
    if can_mount():
        # The view is made elsewhere, so that nothing can be opened for writing in it before it is read-only.
        with tempfile.TemporaryDirectory() as view, _bound(folder, Path(view)):
            _quietly("mount", "-o", "remount,bind,ro", view)
            with _bound(Path(view), folder):
                yield
        return
    if os.geteuid() == 0:
        raise PermissionError("root may write anywhere, and may not mount here")
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if path.is_dir()}
    for path in modes:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def tear(path: Path, how: str, draw: random.Random, older: bytes | None = None) -> str:
    """Leave of a file what a power loss could leave.

    Args:
        path: the file.
        how: "cut" leaves a random beginning; "zeros" has zeros in place of the rest; "hole" has zeros in place of some
            blocks; "longer" adds zeros at the end, as of a file whose length was written before its data; "older" is
            the content that it had before.
        draw: where.
        older: what it had before.

    Returns:
        what was done, in words.
    """
    content = path.read_bytes()
    place = draw.randrange(len(content)) if content else 0
    match how:
        case "cut":
            path.write_bytes(content[:place])
            return f"{path.name} cut to {place} of {len(content)} bytes"
        case "zeros":
            path.write_bytes(content[:place] + bytes(len(content) - place))
            return f"{path.name} zeros from byte {place} of {len(content)}"
        case "hole":
            size = min(draw.randint(1, 4) * 512, len(content) - place)
            path.write_bytes(content[:place] + bytes(size) + content[place + size :])
            return f"{path.name} {size} zeros from byte {place} of {len(content)}"
        case "longer":
            count = draw.randint(1, PAGE)
            path.write_bytes(content + bytes(count))
            return f"{path.name} {count} zeros after its end"
        case "older" if older is not None:
            path.write_bytes(older)
            return f"{path.name} as it was before"
    raise ValueError(how)


@dataclass(frozen=True)
class SystemCall:
    """The moment of a process at which it is killed.

    Attributes:
        name: of the system call.
        number: the first is 1.
        path: of the file that it concerned when the calls were counted.
    """

    name: str
    number: int
    path: str

    @property
    def purpose(self) -> str:
        """The call and the file's name, which for a temporary file is the name that it is going to have."""
        name = Path(self.path).name
        return f"{self.name} {name[1:].rpartition('.')[0] if name.startswith('.') else name}"

    def prefix(self) -> list[str]:
        """What to put before a command to have it killed there, before the call is carried out."""
        # Without --seccomp-bpf, which is faster: with it, strace 6.1 injects no signal.
        return ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={self.name}",
                "-e", f"inject={self.name}:signal=KILL:when={self.number}"]  # fmt: skip


@cache
def can_trace() -> bool:
    """Whether strace is there and may kill a process at a system call."""
    if shutil.which("strace") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder, name) for name in ("first", "second")]
        command = [*SystemCall("mkdir", 2, "").prefix(), "mkdir", *map(str, made)]
        subprocess.run(command, check=False, capture_output=True)
        return [path.exists() for path in made] == [True, False]


def counting(log: Path) -> list[str]:
    """What to put before a command to have its system calls written to a file; see `traced_calls`."""
    return ["strace", "-f", "-qq", "--seccomp-bpf", "-y", "-s", "0", "-o", str(log), "-e",
            f"trace={','.join(SYSTEM_CALLS)}"]  # fmt: skip


def traced_calls(log: Path, folder: str) -> list[SystemCall]:
    """The system calls of the first thread of a traced command that concern files of a folder.

    Args:
        log: written by `counting`.
        folder: its name; a part of a path.
    """
    found, counts, first = [], dict.fromkeys(SYSTEM_CALLS, 0), ""
    for line in log.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        first = first or thread
        match = re.match(r"\s*(\w+)\(", call)
        if match is None or match[1] not in counts or thread != first:
            continue
        counts[match[1]] += 1
        path = next((p for p in re.findall(r"[<\"]([^>\"]*)[>\"]", call) if folder in Path(p).parts), None)
        if path:
            found.append(SystemCall(match[1], counts[match[1]], path))
    return found


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def _bound(folder: Path, place: Path) -> Iterator[None]:
    _quietly("mount", "--bind", str(folder), str(place))
    try:
        yield
    finally:
        _unmount(place)


def _unmount(folder: Path) -> None:
    # Lazily: the mount goes now, and its content when the last process that uses it has ended.
    for how in ([], ["-l"]):
        if subprocess.run(["umount", *how, str(folder)], check=False, capture_output=True).returncode == 0:
            return

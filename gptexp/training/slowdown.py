"""Why a run has become slow: what its process and its machine did meanwhile, and what that suggests."""

import os
import time
from dataclasses import dataclass

SLOW = 0.5
"""A run that is slower than this part of its first speed is slow."""

TAKEN, TAKEN_AT_FIRST = 0.2, 0.3
"""What others must take of the cores that a run wants, as a part of these: to be the cause of a fall, or to be worth a
line when the run begins."""

IDLE = 0.6
"""A process waits if it uses less than this part of the cores that it wants."""


@dataclass(frozen=True)
class Reading:
    """Clocks, read at one moment.

    Attributes:
        wall: seconds of wall-clock time.
        own: seconds of CPU time of all threads of this process, since it began.
        busy: seconds for which this process's cores were busy, all together; None where that is not known.
        stolen: seconds for which the host of a virtual machine gave its cores to others; None where not known.
        load: processes that wanted to run, on average over the last minute.
        cores: that this process may use.
    """

    wall: float
    own: float
    busy: float | None
    stolen: float | None
    load: float
    cores: int


@dataclass(frozen=True)
class Use:
    """How a span of time was used, in cores: 1.0 is one core busy throughout.

    Attributes:
        own: by this process.
        others: by other processes, on the cores that this one may use.
        stolen: by other virtual machines of the same host.
        cores: that this process may use.
    """

    own: float
    others: float
    stolen: float
    cores: int


def read_clocks() -> Reading:
    """Read this process's and this machine's clocks. Busy times come from Linux; elsewhere the load stands in."""
    busy, stolen = _machine_seconds()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    return Reading(time.perf_counter(), time.process_time(), busy, stolen, load, len(usable_cores()))


def use_between(start: Reading, end: Reading, processes: int = 1) -> Use:
    """How the time between two readings was used.

    Args:
        start: the earlier reading.
        end: the later one.
        processes: of this run on this machine; each is taken to use as much as this one.
    """
    wall = max(end.wall - start.wall, 1e-9)
    own = (end.own - start.own) / wall
    everything = end.load if start.busy is None or end.busy is None else (end.busy - start.busy) / wall
    stolen = ((end.stolen or 0.0) - (start.stolen or 0.0)) / wall
    others = min(max(0.0, everything - own * processes), end.cores)  # a short span is read off a coarse clock
    return Use(own, others, max(0.0, stolen), end.cores)


def likely_cause(
    speed: float, first: float | None, use: Use, threads: int, accelerator: str = "cpu"
) -> tuple[str, str] | None:
    """Why a run is slower than it was at first, or, when it has just begun, why it is slower than it could be.

    Args:
        speed: now, in tokens per second or any other unit.
        first: what it was when the run began, in the same unit; None if the run begins now.
        use: how the time was used over which `speed` was measured.
        threads: CPU threads of this process.
        accelerator: "cpu", "cuda" or "mps".

    Returns:
        a word for the cause and one line of text, or None if the run is not slow, or begins and nothing disturbs it.
    """
    if first is not None and not speed < SLOW * first:
        return None
    wanted = min(threads, use.cores) if accelerator == "cpu" else 1
    missing = (use.others + use.stolen - (use.cores - wanted)) / wanted  # of what is wanted, as others have it
    crowded = missing > (TAKEN_AT_FIRST if first is None else TAKEN)
    cores = _count(use.cores, "core")
    if crowded and use.stolen > use.others:
        cause, why = "host", f"the host of this virtual machine gave {use.stolen:.1f} of its {cores} to others"
    elif crowded:
        cause, why = "others", (
            f"other processes use {use.others:.1f} of {cores}, and this run has {_count(threads, 'thread')}; end the "
            "others, or give each of several runs fewer threads (hardware.threads=1)"
        )
    elif first is None:
        return None
    elif accelerator != "cpu":
        cause, why = "device", "no other process takes its cores; perhaps another one uses the device, or it is too hot"
    elif use.own < IDLE * wanted:
        cause, why = "waiting", (
            f"it kept only {use.own:.1f} of {cores} busy with {_count(threads, 'thread')}, and nothing else wanted "
            "them; perhaps it was stopped, a container's limit holds it back, or it waits for memory or a disk"
        )
    else:
        cause, why = "processor", (
            "it has its cores to itself, so perhaps they are too hot, save power, or are shared with another virtual "
            "machine"
        )
    fell = "this run is slower than it could be" if first is None else f"speed fell to {speed / first:.0%} of its first"
    return cause, f"{fell}: {why}"


def usable_cores() -> set[int]:
    """The cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _machine_seconds() -> tuple[float | None, float | None]:
    """Busy and stolen seconds of the usable cores since the machine started, or None twice without /proc/stat."""
    try:
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None, None
    names = {f"cpu{core}" for core in usable_cores()}
    busy = stolen = 0
    for name, *values in rows:
        if name in names:  # user, nice, system, idle, iowait, irq, softirq, steal
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return busy / ticks, stolen / ticks


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"

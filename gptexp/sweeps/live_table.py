"""The state of a sweep while it runs: a live table in a terminal, a line for each job that ends elsewhere."""

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptexp.config.schema import Config
from gptexp.errors import UserError
from gptexp.runs.files import last_row
from gptexp.runs.run import FINAL, Run
from gptexp.sweeps.sweep import Standing, Sweep

BEST = 5  # jobs listed
STALE = 60  # seconds without a sign before this process began, after which a job counts as killed


class Scoreboard:
    """Reads the sweep's directory once a second, so it also sees the jobs of other processes and machines.

    `total` counts jobs that will be added later, too; by default it is the number of names. The note stands above all.
    """

    def __init__(
        self, sweep: Sweep, names: Sequence[str], console: Console, total: int | None = None, note: str = ""
    ) -> None:
        self.note = note
        self.sweep, self.console, self.total = sweep, console, len(names) if total is None else total
        self.measure = sweep.measure
        self.standings = {name: sweep.standing(name) for name in names}
        self._done_before = sum(job.state in FINAL for job in self.standings.values())
        self._began = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)  # shows nothing but in a terminal

    def __enter__(self) -> "Scoreboard":
        if self._done_before:
            done = f"{self._done_before} of {self.total} jobs are done already"
            self.console.print(f"{self.sweep.folder}: {done}", highlight=False, soft_wrap=True)
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()
        self.look()

    def add(self, names: Sequence[str]) -> None:
        """Show further jobs."""
        self.standings = {name: Standing(name, "waiting") for name in names} | self.standings

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._live.update(self.look(), refresh=True)

    def look(self) -> Group:
        """Look at every job; without a terminal, print a line for each that has ended since.

        Returns:
            a table of counts, of the jobs that run, and of the best so far.
        """
        running: dict[str, tuple[dict[str, float], Config]] = {}  # the last row of metrics.csv of each
        ended = []
        for name, before in list(self.standings.items()):
            if before.state in FINAL:
                continue
            now = self.standings[name] = self.sweep.standing(name)
            if now.state != before.state and now.state in (*FINAL, "failed"):
                ended.append(now)
            # The board must not stop because a directory has gone, or is not yet whole.
            with suppress(OSError, ValueError, KeyError, UserError):
                run = Run(self.sweep.folder / name)
                times = [p.stat().st_mtime for p in (run.metrics_path, run.path / "run.json") if p.exists()]
                if now.state == "running" and max(times) >= self._began - STALE:  # else a killed process left it
                    running[name] = {"step": 0.0, "seconds": 0.0, **last_row(run.metrics_path)}, run.config

        counts = Counter(job.state for job in self.standings.values())
        values = {job.name: float(getattr(job, self.measure)) for job in self.standings.values()}
        ranked = sorted((job for job in self.standings.values() if math.isfinite(values[job.name])),
                        key=lambda job: values[job.name])  # fmt: skip
        over = sum(counts[state] for state in (*FINAL, "failed"))
        shares = {name: config.share_done(at["step"], at["seconds"]) for name, (at, config) in running.items()}
        left = self._left(over, sum(shares.values()))
        for job in ended if not self.console.is_terminal else ():
            known = math.isfinite(values[job.name])
            value = f"val/{self.measure} {values[job.name]:.4f}" if known else str(job.error or "")
            best = [f"best {values[first.name]:.4f} {first.name}" for first in ranked[:1]]
            line = " · ".join(filter(None, [f"[{over}/{self.total}] {job.state} {job.name}", value, *best, left]))
            self.console.print(line, highlight=False, soft_wrap=True)

        words = [f"{self.sweep.folder.name}: {self.total} jobs", f"{counts['done']} done", f"{len(running)} running",
                 f"{counts['failed']} failed",
                 *(f"{counts[state]} {state}" for state in ("diverged", "pruned") if counts[state]), left]  # fmt: skip
        table = Table(box=None, padding=(0, 1), show_header=False)
        for name, (at, config) in running.items():
            limit = f"/{config.max_steps}" if config.max_steps else ""
            table.add_row(name, ProgressBar(1.0, shares[name], width=20), f"step {at['step']:.0f}{limit}",
                          f"loss {at['train/loss']:.4f}" if "train/loss" in at else "")  # fmt: skip
        for place, job in enumerate(ranked[:BEST], 1):
            table.add_row(job.name, f"{place}.", job.state, f"val/{self.measure} {values[job.name]:.4f}")
        return Group(*([Text(self.note)] if self.note else []), Text(" · ".join(filter(None, words))), table)

    def _left(self, over: int, under_way: float) -> str:
        """The time left, from the jobs, and parts of jobs, that have been done since this process began."""
        done, waiting = over - self._done_before + under_way, self.total - over - under_way
        if done < 0.1 or waiting <= 0:
            return ""
        return f"{timedelta(seconds=round((time.time() - self._began) / done * waiting))} left"

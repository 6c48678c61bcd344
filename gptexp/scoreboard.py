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

from gptexp.errors import UserError
from gptexp.records import last_row
from gptexp.runs import Run
from gptexp.sweeps import FINAL, Standing, Sweep

ENDED = (*FINAL, "failed")
BEST = 5  # jobs listed
STALE = 60  # seconds without a sign before this process began, after which a job counts as killed


class Scoreboard:
    """Reads the sweep's directory once a second, so it also sees the jobs of other processes and machines.

    `total` counts jobs that will be added later, too; by default it is the number of names.
    """

    def __init__(self, sweep: Sweep, names: Sequence[str], console: Console, total: int | None = None) -> None:
        self.sweep, self.console, self.total = sweep, console, len(names) if total is None else total
        self.standings = {name: sweep.standing(name) for name in names}
        self._running: dict[str, dict[str, float]] = {}  # the last row of metrics.csv of each, and its "steps" in all
        self._ended_before = {n for n, s in self.standings.items() if s.state in FINAL}
        self._began = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=True)  # shows nothing but in a terminal

    def __enter__(self) -> "Scoreboard":
        if self._ended_before:
            done = f"{len(self._ended_before)} of {self.total} jobs are done already"
            self.console.print(f"{self.sweep.folder}: {done}", highlight=False, soft_wrap=True)
        self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()
        self._poll()

    def add(self, names: Sequence[str]) -> None:
        """Show further jobs."""
        self.standings = {name: Standing(name, "waiting") for name in names} | self.standings

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._poll()
            self._live.update(self.render(), refresh=True)

    def _poll(self) -> None:
        running: dict[str, dict[str, float]] = {}
        ended = []
        for name, before in list(self.standings.items()):
            if before.state in FINAL:
                continue
            now = self.standings[name] = self.sweep.standing(name)
            if now.state == "running":
                # A directory that has gone, or is not yet whole, is no reason for the board to stop.
                with suppress(OSError, ValueError, KeyError, UserError):
                    run = Run(self.sweep.folder / name)
                    times = [p.stat().st_mtime for p in (run.metrics_path, run.path / "run.json") if p.exists()]
                    at = {"step": 0.0, **last_row(run.metrics_path), "steps": run.config.max_steps}
                    if max(times) >= self._began - STALE:  # else a killed process left it
                        running[name] = at
            if now.state != before.state and now.state in ENDED:
                ended.append(now)
        self._running = running
        if not self.console.is_terminal:
            for job in ended:
                self.console.print(self._line(job), highlight=False, soft_wrap=True)

    def _ended(self) -> set[str]:
        return {name for name, job in self.standings.items() if job.state in ENDED}

    def _ranked(self) -> list[Standing]:
        """The jobs that have a loss, best first."""
        return sorted((s for s in self.standings.values() if math.isfinite(s.loss)), key=lambda s: s.loss)

    def _line(self, job: Standing) -> str:
        value = f"val/loss {job.loss:.4f}" if math.isfinite(job.loss) else str(job.error or "")
        best = [f"best {s.loss:.4f} {s.name}" for s in self._ranked()[:1]]
        counted = f"[{len(self._ended())}/{self.total}] {job.state} {job.name}"
        return " · ".join(filter(None, [counted, value, *best, self._left()]))

    def _left(self) -> str:
        """The time left, from what has been done since this process began."""
        ended = self._ended()
        under_way = sum(at["step"] / at["steps"] for at in self._running.values())
        done, waiting = len(ended - self._ended_before) + under_way, self.total - len(ended) - under_way
        if done < 0.1 or waiting <= 0:
            return ""
        return f"{timedelta(seconds=round((time.time() - self._began) / done * waiting))} left"

    def render(self) -> Group:
        """The table: counts, the jobs that run, the best so far."""
        counts = Counter(s.state for s in self.standings.values())
        words = [f"{counts['done']} done", f"{len(self._running)} running", f"{counts['failed']} failed",
                 *(f"{counts[state]} {state}" for state in ("diverged", "pruned") if counts[state])]  # fmt: skip
        words = [f"{self.sweep.folder.name}: {self.total} jobs", *words, self._left()]
        table = Table(box=None, padding=(0, 1), show_header=False)
        for name, at in self._running.items():
            table.add_row(name, ProgressBar(at["steps"], at["step"], width=20), f"step {at['step']:.0f}/{at['steps']}",
                          f"loss {at['train/loss']:.4f}" if "train/loss" in at else "")  # fmt: skip
        for place, standing in enumerate(self._ranked()[:BEST], 1):
            table.add_row(standing.name, f"{place}.", standing.state, f"val/loss {standing.loss:.4f}")
        return Group(Text(" · ".join(filter(None, words))), table)

"""Every claim that needs a GPU: `python -m benchmarks.gpu [--peer DIR] [--only NAME,NAME] [--json FILE] [--minutes 9]`.

Takes at most nine minutes of one GPU. Each part (see benchmarks/gpu_parts.py) runs in a process of its own, with a time
of its own, and what an earlier part left of its time; then it is killed with all its processes. A part that fails does
not stop the others: the last lines of what it printed are in the table and in the JSON, which is written anew after
each part. Parts that measure beside nanoGPT need a checkout of it, in DIR.

    machine      the device and the versions; always run
    resume       bf16-mixed and 32-true train, are killed, and end to the bit as an unbroken run does
    compile      hardware.compile=true and graphs: the same loss as without, and tokens per second
    strategies   DDP and FSDP with one device: the same loss as without, killed and resumed to the bit
    throughput   tokens per second beside nanoGPT, both compiled, at its baby recipe
    fast         experiment=fast_gpu, to the loss of nanoGPT's README and to its end
    generate     sampling beside nanoGPT's sample.py
    many         eight small runs at once against one after another
    overhead     a step of the command over one of a bare loop
    nanogpt      experiment=nanogpt_gpu, as many steps as fit
    ladder       the ladder's rung 7, as many steps as fit

On a machine without a GPU the same parts run in miniature, which shows that they work and measures nothing. The JSON of
a GPU machine belongs in benchmarks/results/, under the name of the device, and the pages of docs/ quote it. Exit
status: 1 if any part failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_parts import FIGURES, PARTS, end, write

MINUTES = 9.0
LINES = 60
"""Lines of what a failed part printed that the JSON keeps; a traceback of torch is long."""

WIDEST = 300
"""Characters of a line in the table; a command with all its settings is longer."""

LOG = "log.txt"


def main() -> None:
    """Run the parts, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas; all unless given")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmarks/gpu.json"), help="JSON with all figures")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts; shared out among them (9)")
    asked = parser.parse_args()
    only = ["machine", *(name for name in asked.only.split(",") if name != "machine")]
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: no such part; allowed: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, _stop)
    report = run([name for name in PARTS if name in only], asked.peer, asked.minutes, asked.json)
    Console().print(table(report))
    print(asked.json)
    if any(done["status"] in ("failed", "out of time") for done in report["parts"].values()):
        sys.exit(1)


def run(names: Sequence[str], peer: Path | None, minutes: float, path: Path) -> dict[str, Any]:
    """Run parts one after another, and write the report to a file after each of them.

    Args:
        names: of the parts, in their order.
        peer: a checkout of nanoGPT, or None.
        minutes: for all parts together; fewer parts have the share that they would have of all.
        path: of the JSON.
    """
    begin = time.monotonic()
    report: dict[str, Any] = {"started": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "commit": commit(),
                              "minutes": minutes, "parts": {}}  # fmt: skip
    gpu, over = False, begin
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            part = PARTS[name]
            over += part.seconds * minutes / MINUTES
            if part.peer and peer is None:
                done: dict[str, Any] = {"status": "skipped", "figures": {"shown": "needs --peer"}}
            else:
                place = Path(folder, name)
                place.mkdir()
                seconds = over - time.monotonic()
                command = [sys.executable, "-m", "benchmarks.gpu_parts", name, str(place), str(seconds),
                           *(["--gpu"] if gpu else []), *([f"--peer={peer}"] if peer else [])]  # fmt: skip
                done = attempt(command, place, seconds)
                shutil.rmtree(place)  # checkpoints by the gigabyte
            if name == "machine":
                gpu = bool(done["figures"].get("gpu"))
            report["parts"][name] = done
            report["seconds"] = time.monotonic() - begin
            write(path, report)
            print(f"{name}: {done['status']}", *lines(done), sep=" · ", flush=True)
    return report


def attempt(command: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part's process to its end, or kill it, with all that it has started, when its time is over.

    Args:
        command: of the process, which writes what it measures to figures.json in the folder.
        folder: for that and for what the process prints.
        seconds: that it may take.

    Returns:
        status ("passed", "failed" or "out of time"), seconds, the seconds allowed, the figures and, unless it passed,
        the last lines that it printed.
    """
    begin, late = time.monotonic(), False
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | {"GPTEXP_DEBUG": "1"})  # fmt: skip
        try:
            process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                end(process.pid)
                process.wait()
    status = "out of time" if late else "failed" if process.returncode else "passed"
    done: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begin, "allowed": seconds, "figures": {}}
    with suppress(OSError):
        done["figures"] = json.loads((folder / FIGURES).read_text())
    if status != "passed":
        done["error"] = (folder / LOG).read_text(errors="replace").splitlines()[-LINES:]
    return done


def commit() -> str | None:
    """The commit that is checked out, with "+" after it if files differ from it; None where there is no git."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def lines(done: dict[str, Any]) -> list[str]:
    """What a part showed, and the end of what it printed if it did not pass: the JSON has more of it."""
    return [line[:WIDEST] for line in (done["figures"].get("shown", ""), *done.get("error", [])[-3:]) if line]


def table(report: dict[str, Any]) -> Table:
    """The parts of a report as a table."""
    made = Table("part", "status", "s", "", title=f"{report['seconds']:.0f} s in all")
    for name, done in report["parts"].items():
        made.add_row(name, done["status"], f"{done.get('seconds', 0):.0f}", escape("\n".join(lines(done))))
    return made


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # on the way out the part's processes are killed


if __name__ == "__main__":
    main()

"""What looking inside training costs: `python -m benchmarks.diagnostics [--rounds 5] [--steps 300] [setting ...]`.

Trains by the real command, each time in turn with diagnostics_interval null, 100 and 1, and compares the seconds of
training within each round. At an interval of 1 every step is measured, which tells what one measurement costs far
more exactly than the hundredth part of it that shows at 100.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import command_seconds, parser, ratios, spread, take_turns, write

INTERVALS = ("null", "100", "1")


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "diagnostics")
    arguments.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    asked = arguments.parse_args()

    def milliseconds(interval: str) -> Callable[[], float]:
        def measure() -> float:
            with tempfile.TemporaryDirectory() as folder:
                settings = [f"diagnostics_interval={interval}", "logger=none", *asked.settings]
                return command_seconds(Path(folder, "run"), asked.steps, 0, settings) * 1000

        return measure

    rounds = take_turns({interval: milliseconds(interval) for interval in INTERVALS}, asked.rounds)
    steps = {interval: spread([r[interval] for r in rounds]) for interval in INTERVALS}
    shares = {interval: ratios(rounds, interval, "null") for interval in INTERVALS[1:]}
    share = (shares["1"]["median"] - 1) / 100
    table = Table("interval", "ms a step (median)", "ratio (median)", "lowest", "highest",
                  title=f"{asked.rounds} rounds of {asked.steps} steps")  # fmt: skip
    for interval in INTERVALS:
        table.add_row(interval, f"{steps[interval]['median']:.1f}",
                      *(f"{v:.3f}" for v in shares.get(interval, {}).values()))  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"one measurement takes {share * 100:.2f} steps: {share:.2%} of the time at an interval of 100")
    write(asked.out, {"steps": asked.steps, "settings": asked.settings, "rounds": rounds, "milliseconds": steps,
                      "ratios": shares, "step_share_at_100": share})  # fmt: skip


if __name__ == "__main__":
    main()

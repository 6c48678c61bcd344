"""What a step needs: `python -m benchmarks.memory [--rounds 1] [setting ...]`.

Trains by the real command with one of n_layer, n_embd, block_size and batch_size changed at a time, and sets the peak
of the process's memory beside a count of the numbers that a step holds: weights, gradients and AdamW's two averages,
and what the backward pass keeps of the forward pass. The peaks are fitted by a + b state + c activations, all at
least 0; b and c would be 1 if nothing else were held and nothing were given back early.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import nnls

from benchmarks.forecast import Size
from benchmarks.measure import parser, write
from benchmarks.scaling import BASE, measure, points, sized

STEPS = 20  # the peak is reached in the first ones


def counted(point: dict[str, int]) -> tuple[float, float]:
    """MiB of state and of activations, in float32; see `benchmarks.forecast`."""
    model = sized(point)
    c = model.config
    size = Size(c.n_layer, c.n_embd, c.block_size, c.vocab_size)
    return 16 * model.n_params / 2**20, size.activations(point["batch_size"]) / 2**20


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Non-negative least squares: MiB of every process, and the factors of state and activations."""
    columns = np.array([[1.0, row["state"], row["activations"]] for row in rows])
    peaks = np.array([row["MiB"] for row in rows])
    (process, state, activations), _ = nnls(columns, peaks)
    errors = columns @ [process, state, activations] / peaks - 1
    return {"process_MiB": process, "state": state, "activations": activations,
            "largest_error": float(np.abs(errors).max())}  # fmt: skip


def main() -> None:
    """Measure, print the table and write the JSON."""
    asked = parser(__doc__, "memory", rounds=1).parse_args()
    rows = []
    for point in track(points(), "runs", console=Console(stderr=True)):
        peak = max(measure(point, STEPS, asked.settings)[1] for _ in range(asked.rounds))
        state, activations = counted(point)
        rows.append(point | {"state": state, "activations": activations, "MiB": peak})
    found = fit(rows)
    table = Table(*(key.removeprefix("model.") for key in BASE), "state MiB", "activations MiB", "peak MiB")
    for row in rows:
        table.add_row(*(str(row[key]) for key in BASE),
                      *(f"{row[key]:,.0f}" for key in ("state", "activations", "MiB")))  # fmt: skip
    console = Console()
    console.print(table)
    console.print("{process_MiB:.0f} MiB a process + {state:.2f} x state + {activations:.2f} x activations, "
                  "off by {largest_error:.0%} at most".format(**found))  # fmt: skip
    write(asked.out, {"settings": asked.settings, "points": rows, "fit": found})


if __name__ == "__main__":
    main()

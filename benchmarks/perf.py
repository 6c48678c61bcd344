"""What each optimization in gptexp/perf gains: `python -m benchmarks.perf [--rounds 5] [setting ...]`.

Trains the recipe of nanoGPT's README for a CPU by the real command, with each optimization on and off in turn, and
compares the tokens per second: for the kernels of one run alone, for the spin count of two runs at once, too. What
glibc's malloc keeps is measured as well: it is not in gptexp/perf, for it gained less than a tenth.
"""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from benchmarks.measure import as_text, parser, ratios, spread, take_turns, write
from benchmarks.shared import tokens_per_second

KEPT = "MALLOC_TRIM_THRESHOLD_=2147483647+MALLOC_MMAP_THRESHOLD_=33554432"

COMPARED = {
    "mkl_kernels": ("hardware.fast_mkl=true", "hardware.fast_mkl=false", 1),
    "openmp_spin, alone": ("default", "GOMP_SPINCOUNT=300000", 1),
    "openmp_spin, two at once": ("default", "GOMP_SPINCOUNT=300000", 2),
    "(malloc keeps memory)": (KEPT, "default", 1),
}
"""What is on, what is off, and how many runs train at once."""


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "perf")
    arguments.add_argument("--seconds", type=float, default=8, help="of training that each figure is taken from")
    asked = arguments.parse_args()

    def measure(contestant: str, runs: int) -> Callable[[], float]:
        return lambda: sum(tokens_per_second(contestant, runs, 0, asked.seconds, asked.settings))

    contestants = {f"{name}: {how}": measure(contestant, runs) for name, (on, off, runs) in COMPARED.items()
                   for how, contestant in (("on", on), ("off", off))}  # fmt: skip
    rounds = take_turns(contestants, asked.rounds)
    table = Table("", "on", "off", "on / off", title="tokens per second, of all runs")
    report = {}
    for name in COMPARED:
        on, off = (spread([r[f"{name}: {how}"] for r in rounds]) for how in ("on", "off"))
        gain = ratios(rounds, f"{name}: on", f"{name}: off")
        report[name] = {"on": on, "off": off, "gain": gain}
        table.add_row(name, f"{on['median']:,.0f}", f"{off['median']:,.0f}", as_text(gain))
    Console().print(table)
    write(asked.out, {"seconds": asked.seconds, "settings": asked.settings, "rounds": rounds, "compared": report})


if __name__ == "__main__":
    main()

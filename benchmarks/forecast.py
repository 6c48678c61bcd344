"""What larger models would need, on paper: `python -m benchmarks.forecast [--scaling JSON] [--memory JSON]`.

Takes the rate of this machine and the factors of memory from the JSON files of benchmarks.scaling and
benchmarks.memory, and applies them to GPT-2's smallest and largest size. A GPU's rate is not measured: it is the share
--utilisation of the dense bfloat16 rate that the data sheet of one H100 SXM gives.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

H100 = 989e12  # operations a second in bfloat16, dense: NVIDIA's data sheet
TOKENS = 20  # for each parameter: Hoffmann et al. 2022
DAY = 86400


@dataclass(frozen=True)
class Size:
    """A GPT with learned positions, biases and a tied head."""

    n_layer: int
    n_embd: int
    block_size: int = 1024
    vocab_size: int = 50257

    @property
    def parameters(self) -> int:
        """Embeddings of tokens and positions; each layer's matrices, biases and norms; the final norm."""
        c = self.n_embd
        return (self.vocab_size + self.block_size) * c + self.n_layer * (12 * c * c + 13 * c) + 2 * c

    @property
    def operations(self) -> float:
        """Floating-point operations of a training step for each token, as `GPT.flops_per_token` counts them."""
        c = self.n_embd
        return 6.0 * (12 * self.n_layer * c * c + self.vocab_size * c) + 12.0 * self.n_layer * c * self.block_size

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and AdamW's two averages, in float32."""
        return 16 * self.parameters

    def activations(self, rows: int = 1) -> int:
        """Bytes that the backward pass keeps of the forward pass of rows of `block_size` tokens, in float32.

        A token leaves 16 C numbers in each layer (the inputs of both sub-layers and of their norms: 4 C; q, k, v and
        what attention gives: 4 C; the feed-forward layer before and after its non-linearity: 8 C), and its logits,
        their logarithms and their gradient at the end: 3 V.
        """
        return 4 * rows * self.block_size * (16 * self.n_embd * self.n_layer + 3 * self.vocab_size)


SIZES = {"124 M": Size(12, 768), "1.5 B": Size(48, 1600)}


def forecast(size: Size, gflops: float, memory: dict[str, float], utilisation: float) -> dict[str, Any]:
    """What a model of this size needs.

    Args:
        size: of the model.
        gflops: what this machine does, 10^9 operations a second.
        memory: the factors of `state` and `activations`.
        utilisation: the share of its data sheet's rate that a GPU reaches.
    """
    gpu, tokens = utilisation * H100, TOKENS * size.parameters
    return {
        "parameters": size.parameters,
        "GFLOP a token": size.operations / 1e9,
        "state, GiB": memory["state"] * size.state / 2**30,
        "activations of a row, GiB": memory["activations"] * size.activations() / 2**30,
        "tokens/s here": gflops * 1e9 / size.operations,
        "tokens/s on an H100": gpu / size.operations,
        "tokens": tokens,
        "days here": tokens * size.operations / (gflops * 1e9) / DAY,
        "days on an H100": tokens * size.operations / gpu / DAY,
    }


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("scaling", "memory"):
        asked.add_argument(f"--{name}", type=Path, default=Path(f"outputs/benchmarks/{name}.json"))
    asked.add_argument("--utilisation", type=float, default=0.4, help="share of a GPU's rate (0.4)")
    given = asked.parse_args()
    found = {}
    for name in ("scaling", "memory"):
        path: Path = getattr(given, name)
        if not path.exists():
            raise SystemExit(f"--{name} {path}: no such file; python -m benchmarks.{name} writes it")
        found[name] = json.loads(path.read_text())["fit"]
    columns = {name: forecast(size, found["scaling"]["gflops"], found["memory"], given.utilisation)
               for name, size in SIZES.items()}  # fmt: skip
    table = Table("", *columns, title=f"this machine at {found['scaling']['gflops']:.0f} GFLOP/s, "
                  f"a GPU at {given.utilisation:.0%} of its rate")  # fmt: skip
    for row in next(iter(columns.values())):
        table.add_row(row, *(f"{v:,.0f}" if (v := column[row]) >= 100 else f"{v:.2g}" for column in columns.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

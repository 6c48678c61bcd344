"""The norms and placements that a model can be made of, and the settings of each norm.

Nothing here imports torch, so a configuration is checked in a fraction of a second. A new norm is one class
in `norms.py` and one line in `NORMS`; its settings become `model.norms.<name>.*`. A norm of another package comes in
by an entry point of the group `gptexp.norms`, or from a module that the environment variable `GPTEXP_IMPORT` names.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from gptexp import perf
from gptexp.errors import UserError


@dataclass(frozen=True)
class NormShape:
    """What a norm is made for: x of shape (N, L, channels)."""

    channels: int  # C
    positions: int  # the most positions L
    bias: bool = False  # whether norms that may go without a bias have one (`model.bias`)


@dataclass(frozen=True)
class NormSettings:
    """Base of the settings of every norm; a norm without settings uses it as it is."""

    def problems(self, shape: NormShape) -> list[str]:
        """Settings that are wrong for this shape, or with each other: lines such as `groups=3: must divide 16`."""
        return []

    @property
    def min_sequences(self) -> int:
        """The fewest sequences that a training batch must have."""
        return 1


@dataclass(frozen=True)
class _Eps(NormSettings):
    eps: Annotated[float, Gt(0)] = 1e-5


@dataclass(frozen=True)
class LayerNormSettings(_Eps):
    """eps is added to the variance; without affine there is neither weight nor bias; bias=None follows model.bias."""

    affine: bool = True
    bias: bool | None = None

    def problems(self, shape: NormShape) -> list[str]:
        """A bias is part of the affine map."""
        return ["bias=true: has no effect with affine=false"] if self.bias and not self.affine else []


@dataclass(frozen=True)
class RMSNormSettings(_Eps):
    """eps is added to the mean square."""

    eps: Annotated[float, Gt(0)] = 1e-6


@dataclass(frozen=True)
class PartialRMSNormSettings(RMSNormSettings):
    """fraction is the share of the channels, the first ones, that the mean square is taken over."""

    fraction: Annotated[float, Gt(0), Le(1)] = 0.0625


@dataclass(frozen=True)
class ScaleNormSettings(_Eps):
    """eps is the least length that x is divided by."""


@dataclass(frozen=True)
class DynamicTanhSettings(NormSettings):
    """alpha is the initial factor inside the tanh."""

    alpha: Annotated[float, Gt(0)] = 0.5


@dataclass(frozen=True)
class GroupNormSettings(_Eps):
    """groups of neighbouring channels, each normalised by itself; eps is added to the variance."""

    groups: Annotated[int, Ge(1)] = 4

    def problems(self, shape: NormShape) -> list[str]:
        """The groups must be of equal size, and of more than one channel."""
        if shape.channels % self.groups:
            return [f"groups={self.groups}: must divide the {shape.channels} channels"]
        return [f"groups={self.groups}: a group of one channel is always 0"] if self.groups == shape.channels else []


@dataclass(frozen=True)
class RunningSettings(_Eps):
    """momentum moves the running averages."""

    momentum: Annotated[float, Gt(0), Le(1)] = 0.1


@dataclass(frozen=True)
class BatchNormSettings(RunningSettings):
    """eps is added to the variance; momentum moves the running averages; stats is what statistics run over."""

    stats: list[Literal["batch", "time"]] = field(default_factory=lambda: ["batch", "time"])

    def problems(self, shape: NormShape) -> list[str]:
        """Statistics over time alone would be those of one sequence."""
        if sorted(self.stats) in (["batch"], ["batch", "time"]):
            return []
        return [f"stats=[{','.join(self.stats)}]: must be [batch,time] or [batch]"]

    @property
    def min_sequences(self) -> int:
        """A variance over one sequence alone does not exist."""
        return 1 if "time" in self.stats else 2


@dataclass(frozen=True)
class RegularizedBatchNormSettings(BatchNormSettings):
    """The settings of batchnorm, and the weights of the penalties on the batch's mean and standard deviation."""

    mean_penalty: Annotated[float, Ge(0)] = 0.1
    std_penalty: Annotated[float, Ge(0)] = 0.01


@dataclass(frozen=True)
class PowerNormSettings(RunningSettings):
    """stats=running divides by the running average, stats=batch by the batch's own; prescale first to unit RMS."""

    stats: Literal["running", "batch"] = "running"
    prescale: bool = True


@dataclass(frozen=True)
class Norm:
    """A registered norm: where its class is, and the dataclass of its settings."""

    target: str  # "module:class"; the class is built as cls(settings, NormShape)
    settings: type[NormSettings] = NormSettings


NORMS: dict[str, Norm] = {
    "layernorm": Norm("gptexp.models.norms:LayerNorm", LayerNormSettings),
    "rmsnorm": Norm("gptexp.models.norms:RMSNorm", RMSNormSettings),
    "prmsnorm": Norm("gptexp.models.norms:PartialRMSNorm", PartialRMSNormSettings),
    "scalenorm": Norm("gptexp.models.norms:ScaleNorm", ScaleNormSettings),
    "dyt": Norm("gptexp.models.norms:DynamicTanh", DynamicTanhSettings),
    "groupnorm": Norm("gptexp.models.norms:GroupNorm", GroupNormSettings),
    "batchnorm": Norm("gptexp.models.batchnorms:BatchNorm", BatchNormSettings),
    "rbn": Norm("gptexp.models.batchnorms:RegularizedBatchNorm", RegularizedBatchNormSettings),
    "causal_batchnorm": Norm("gptexp.models.batchnorms:CausalBatchNorm", RunningSettings),
    "powernorm": Norm("gptexp.models.batchnorms:PowerNorm", PowerNormSettings),
    "none": Norm("gptexp.models.norms:Identity"),
}


@dataclass(frozen=True)
class Placement:
    """Where the norms of a sub-layer f stand: x becomes around(alpha x + after(f(before(x))))."""

    before: bool = False  # norm of f's input
    after: bool = False  # norm of f's output
    around: bool = False  # norm of the sum
    final: bool = False  # norm before the head
    alpha: Callable[[int], float] | None = None  # weight of x in the sum, a function of the number of blocks
    # factor of the initial weights of the feed-forward, value and output matrices, which are then Xavier normal
    # (Glorot, Bengio 2010); None is GPT-2's initialisation
    beta: Callable[[int], float] | None = None


PLACEMENTS: dict[str, Placement] = {
    "pre": Placement(before=True, final=True),  # GPT-2; Xiong et al. 2020
    "post": Placement(around=True),  # Vaswani et al. 2017; GPT
    "sandwich": Placement(before=True, after=True, final=True),  # Ding et al. 2021; Gemma 2; Kim et al. 2025, "Peri-LN"
    "output": Placement(after=True, final=True),  # OLMo 2: Team OLMo 2025
    "deepnorm": Placement(  # Wang et al. 2022, "DeepNet", table of the decoder-only model
        around=True, alpha=lambda n: (2 * n) ** 0.25, beta=lambda n: (8 * n) ** -0.25
    ),
}


def default_norms() -> dict[str, dict[str, Any]]:
    """The table `model.norms`: the default settings of every registered norm."""
    return {name: asdict(norm.settings()) for name, norm in NORMS.items()}


def add_plugins() -> None:
    """Register the norms of other packages.

    They import torch, so what must be settled before that is settled here.

    Raises:
        UserError: for one that cannot be loaded.
    """
    entries = entry_points(group="gptexp.norms")
    if entries or os.environ.get("GPTEXP_IMPORT"):
        perf.prepare()
    for entry in entries:
        try:
            NORMS[entry.name] = entry.load()
        except Exception as error:
            raise UserError(f"norm={entry.name}: cannot be loaded from {entry.value} ({error})") from error
    for name in filter(None, os.environ.get("GPTEXP_IMPORT", "").split(",")):
        try:
            if os.getcwd() not in sys.path and "" not in sys.path:
                sys.path.append(os.getcwd())
            import_module(name.strip())
        except Exception as error:
            raise UserError(f"GPTEXP_IMPORT={name}: cannot be imported ({error})") from error


add_plugins()

"""What of a run is compared, and the words for it. Lower is better for each."""

from typing import Literal, NamedTuple

Metric = Literal["final", "best", "exact_match"]


class Measure(NamedTuple):
    """The words for what is compared."""

    title: str  # "final val/loss"
    column: str  # of a table: "loss"
    noun: str  # in a sentence: "loss"
    plural: str  # for a paper: "final validation losses in nats per token"
    unit: str  # of a difference, in a sentence: "nats"
    of: str  # the unit, in full: "nats per token"
    beside: Metric  # verdicts on this one stand beside

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return f"{self.title} ({self.of})"


MEASURES: dict[Metric, Measure] = {
    "final": Measure("final val/loss", "loss", "loss", "final validation losses in nats per token", "nats",
                     "nats per token", "best"),
    "best": Measure("best val/loss", "loss", "loss", "best validation losses in nats per token", "nats",
                    "nats per token", "final"),
    "exact_match": Measure("wrong answers, 1 - val/exact_match", "wrong", "share of wrong answers",
                           "shares of wrong answers", "of the answers", "share of all", "final"),
}  # fmt: skip
"""By the setting `metric`."""

BITS: dict[Metric, Measure] = MEASURES | {
    "final": Measure("final val/bpc", "bpc", "loss", "final validation losses in bits per character", "bits",
                     "bits per character", "best"),
    "best": Measure("best val/bpc", "bpc", "loss", "best validation losses in bits per character", "bits",
                    "bits per character", "final"),
}  # fmt: skip
"""The same for runs with different vocabularies, whose tokens are not equally long."""

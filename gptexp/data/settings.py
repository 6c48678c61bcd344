"""The settings of the data, and the mistakes that only show when two of them are seen together."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True)
class DataConfig:
    """What text to learn from, and how it is cut into symbols and into two splits."""

    # a corpus that is found or downloaded (shakespeare, names), the documentation of Python (pydocs, needs no network),
    # or a file of one's own (file, with `path`)
    name: Literal["shakespeare", "names", "pydocs", "file"] = "shakespeare"
    path: str | None = None  # the UTF-8 text file, for `name="file"` alone
    # one id for each distinct character of the corpus, or the 256 bytes of its UTF-8
    tokenizer: Literal["char", "byte"] = "char"
    documents: bool = False  # whether every line is a document of its own, which no batch row goes beyond
    terminator: str = "\n"  # the one symbol that opens and closes a document; it stands for the newline
    # share of the characters (or documents) kept for validation: the last ones
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    split_seed: Annotated[int, Ge(0), Lt(2**63)] = 1337  # the seed of the shuffle of the documents before the split
    # what to read when a named corpus is out of reach; None makes that an error
    offline_fallback: Literal["pydocs"] | None = "pydocs"

    def problems(self) -> list[str]:
        """The problems that no single setting shows, one line each, with full keys; empty when all is well.

        A setting that would have no effect is a problem, but for `offline_fallback=None`: a corpus that is
        never replaced keeps that promise anyway.
        """
        terminator = f"data.terminator={self.terminator!r}:"
        one = len(self.terminator) == 1 and not "\ud800" <= self.terminator <= "\udfff"
        other = one and self.terminator != "\n"
        rules = {
            "data.path=null: data.name=file needs data.path, a UTF-8 text file": self.name == "file" and not self.path,
            f"data.path={self.path}: has no effect with data.name={self.name}; allowed: data.name=file":
                self.name != "file" and self.path is not None,
            f"{terminator} allowed: exactly one character": not one,
            rf"{terminator} has no effect with data.documents=false; allowed: '\n', or data.documents=true":
                other and not self.documents,
            f"{terminator} has no effect with data.tokenizer=byte, "
            r"where a document ends with the byte of the newline; allowed: '\n'":
                other and self.documents and self.tokenizer == "byte",
            f"data.split_seed={self.split_seed}: has no effect with data.documents=false, "
            f"where nothing is shuffled; allowed: {DataConfig.split_seed}, or data.documents=true":
                self.split_seed != DataConfig.split_seed and not self.documents,
        }  # fmt: skip
        return [problem for problem, applies in rules.items() if applies]

"""The settings of the data, and the mistakes that only show when two of them are seen together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from gptexp.errors import UserError
from gptexp.validation import read_fields


@dataclass(frozen=True)
class DataConfig:
    """What text to learn from, and how it is cut into symbols and into two splits.

    Attributes:
        name: a corpus that is found or downloaded (shakespeare, names), the documentation of Python
            (pydocs, needs no network), or a file of one's own (file, with `path`).
        path: the UTF-8 text file, for `name="file"` alone.
        tokenizer: one id for each distinct character of the corpus, or the 256 bytes of its UTF-8.
        documents: whether every line is a document of its own, which no batch row goes beyond.
        terminator: the one symbol that opens and closes a document; it stands for the newline.
        val_fraction: share of the characters (or documents) kept for validation: the last ones.
        split_seed: the seed of the shuffle of the documents before the split.
        offline_fallback: what to read when a named corpus is out of reach; None makes that an error.
    """

    name: Literal["shakespeare", "names", "pydocs", "file"] = "shakespeare"
    path: str | None = None
    tokenizer: Literal["char", "byte"] = "char"
    documents: bool = False
    terminator: str = "\n"
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    split_seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    offline_fallback: Literal["pydocs"] | None = "pydocs"


def read_data(given: "DataConfig | Mapping[str, Any] | None") -> DataConfig:
    """A `DataConfig`, from itself or from a mapping of its fields.

    Raises:
        UserError: with one line for every problem.
    """
    problems: list[str] = []
    if not isinstance(given, DataConfig):
        values = read_fields(DataConfig, "data.", given or {}, problems)
        given = DataConfig(**(values or {}))
    problems = problems or check(given)
    if problems:
        raise UserError(problems)
    return given


def check(config: DataConfig) -> list[str]:
    """The problems that no single setting shows, one line each, with full keys; empty when all is well.

    A setting that would have no effect is a problem, but for `offline_fallback=None`: a corpus that is
    never replaced keeps that promise anyway.
    """
    problems = []
    if config.name == "file" and not config.path:
        problems.append(f"data.path={config.path or 'null'}: data.name=file needs data.path, a UTF-8 text file")
    if config.name != "file" and config.path is not None:
        problems.append(f"data.path={config.path}: has no effect with data.name={config.name}; allowed: data.name=file")
    if len(config.terminator) != 1 or "\ud800" <= config.terminator <= "\udfff":
        problems.append(f"data.terminator={config.terminator!r}: allowed: exactly one character")
    elif config.terminator != "\n" and not config.documents:
        problems.append(
            f"data.terminator={config.terminator!r}: has no effect with data.documents=false; "
            r"allowed: '\n', or data.documents=true"
        )
    elif config.terminator != "\n" and config.tokenizer == "byte":
        problems.append(
            f"data.terminator={config.terminator!r}: has no effect with data.tokenizer=byte, "
            r"where a document ends with the byte of the newline; allowed: '\n'"
        )
    if config.split_seed != DataConfig.split_seed and not config.documents:
        problems.append(
            f"data.split_seed={config.split_seed}: has no effect with data.documents=false, "
            f"where nothing is shuffled; allowed: {DataConfig.split_seed}, or data.documents=true"
        )
    return problems

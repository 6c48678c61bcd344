"""Sample from a trained run: `python -m gptexp.sample DIR prompt="ROMEO:" num_samples=3`.

settings (key=value):
  run=DIR               the run directory, as DIR alone
  prompt=TEXT           the text to continue; may be given several times
  prompt_file=FILE      read a prompt from a file, or from standard input with prompt_file=-
  prompt_per_line=true  each line of prompt_file is a prompt of its own
  num_samples=1         samples of each prompt
  max_new_tokens=500    longest continuation, in tokens
  temperature=0.8       0, which answers to problems have, always takes the likeliest token
  top_k=null            sample among the k likeliest tokens
  top_p=null            sample among the likeliest tokens whose probabilities reach p
  stop=TEXT             end a sample at this text; documents end at their terminator by themselves
  seed=1337             the same seed, prompt and settings give the same text
  checkpoint=best       best or last
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from gptexp.errors import UserError
from gptexp.perf import mkl_kernels
from gptexp.processes.console import run_command


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the command; see the module's text."""

    run: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    prompt_per_line: bool = False
    num_samples: Annotated[int, Ge(1)] = 1
    max_new_tokens: Annotated[int, Ge(1)] = 500
    temperature: Annotated[float, Ge(0)] | None = None
    top_k: Annotated[int, Ge(1)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    stop: str | None = None
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    checkpoint: Literal["best", "last"] = "best"


def main() -> None:
    """The command line."""
    run_command(__doc__, lambda arguments: sample(*parse(arguments)))


def parse(arguments: Sequence[str]) -> tuple[SampleConfig, list[str]]:
    """The settings and prompts of the command line.

    Raises:
        UserError: with a line for every mistake.
    """
    from gptexp.config.settings import named_directories, read, read_arguments
    from gptexp.runs.run import checkpoint_named

    problems: list[str] = []
    prompts = [a.partition("=")[2] for a in arguments if a.startswith("prompt=")]
    named, others = named_directories(a for a in arguments if not a.startswith("prompt="))
    values = read_arguments(others, problems)
    if named:
        values = {"checkpoint": checkpoint_named(named[0]), **values, "run": named[0]}
    config: SampleConfig | None = read(SampleConfig, "", values, problems)
    if not named:
        problems.append("run: is missing; give the run directory as run=DIR")
    problems += [f"{name}: cannot be read as a setting; the run directory is {named[0]}" for name in named[1:]]
    if prompts and "prompt_file" in values:
        problems.append(f"prompt_file={values['prompt_file']}: give prompt or prompt_file, not both")
    if "prompt_per_line" in values and "prompt_file" not in values:
        problems.append(f"prompt_per_line={values['prompt_per_line']}: has no effect without prompt_file")
    if problems or config is None:
        raise UserError(problems)
    if config.prompt_file:
        prompts = _read_prompts(config)
    return config, prompts


def _read_prompts(config: SampleConfig) -> list[str]:
    try:
        path = Path(str(config.prompt_file))
        text = (sys.stdin.buffer.read() if config.prompt_file == "-" else path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"prompt_file={config.prompt_file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file={config.prompt_file}: is not UTF-8 (byte {error.start})") from error
    return [line for line in text.split("\n") if line] if config.prompt_per_line else [text]


def sample(config: SampleConfig, prompts: Sequence[str]) -> None:
    """Print samples; at a terminal, a single one appears as it is generated.

    Raises:
        UserError: for a mistake in the run, its checkpoint, a prompt or the stop text.
    """
    from gptexp.data.tokenizers import tokenizer_from_dict
    from gptexp.runs.run import Run
    from gptexp.training.load import load_model

    run = Run.open(str(config.run))
    mkl_kernels.choose(run.config.hardware.fast_mkl)
    info = run.info
    tokenizer = tokenizer_from_dict(info.get("tokenizer"))
    data = info.get("data", {})
    end = data.get("document_end")
    start = data.get("document_start", end)
    problems = end is not None and start is None
    if problems and not prompts:
        raise UserError(f"prompt: is missing; give a problem of task={data['task']['name']}")
    opening, ending = (tokenizer.encode(symbol).tolist() if symbol else [] for symbol in (start, end))
    texts = list(prompts) or ([""] if opening else ["\n"])
    rows = [[*opening, *tokenizer.encode(text, what="prompt").tolist()] for text in texts]
    if [] in rows:
        raise UserError("prompt=: is empty; give at least one character")
    stop = tokenizer.encode(config.stop, what="stop").tolist() if config.stop else ending
    if config.stop and len(stop) > 1 and tokenizer.sized:  # text is written in other symbols than alone
        raise UserError(f"stop={config.stop}: is {len(stop)} symbols of this vocabulary; allowed: a text that is one, "
                        "such as a newline")  # fmt: skip
    model = load_model(run, config.checkpoint, tokenizer.vocab_size)
    texts = [text for text in texts for _ in range(config.num_samples)]
    rows = [row for row in rows for _ in range(config.num_samples)]
    temperature = config.temperature if config.temperature is not None else 0.0 if problems else 0.8
    options = {key: getattr(config, key) for key in ("top_k", "top_p", "seed")}
    options |= {"stop": stop, "temperature": temperature}
    if len(rows) == 1 and sys.stdout.isatty():
        print(texts[0].lstrip("\n"), end="", flush=True)
        waiting: list[int] = []
        for tokens in model.stream(rows, config.max_new_tokens, **options):
            waiting += tokens
            if not (text := tokenizer.decode(waiting)).endswith("\ufffd"):  # the character is complete
                print(text, end="", flush=True)
                waiting.clear()
        print()
        return
    for i, (text, row) in enumerate(zip(texts, model.generate(rows, config.max_new_tokens, **options), strict=True), 1):
        ended = bool(end and stop and row[-len(stop) :] == stop)
        body = text + tokenizer.decode(row[: -len(stop)] if ended else row)
        if end:
            print(body)
        elif len(rows) > 1:
            print(f"--- sample {i} of {len(rows)} ---\n{body.lstrip(chr(10))}\n")
        else:
            print(body.lstrip("\n"))


if __name__ == "__main__":
    main()

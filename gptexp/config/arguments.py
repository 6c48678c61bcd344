"""Reads the command line of gptexp.train before Hydra does: its flags, and what is left for Hydra's settings."""

import argparse
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from gptexp import __version__
from gptexp.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Hydra's flags, as its documentation lists them; only looked at here, for Hydra reads them itself."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        self.add_argument("overrides", nargs="*")
        for flags in (("--help", "-h"), ("--hydra-help",), ("--resolve",), ("--run", "-r"), ("--multirun", "-m"),
                      ("--shell-completion", "-sc")):  # fmt: skip
            self.add_argument(*flags, action="store_true")
        for flags in (("--package", "-p"), ("--config-path", "-cp"), ("--config-dir", "-cd"),
                      ("--experimental-rerun",)):  # fmt: skip
            self.add_argument(*flags)
        self.add_argument("--config-name", "-cn", default="config")
        self.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
        shown = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
        self.add_argument("--info", "-i", const="all", nargs="?", choices=shown)
        text = f"gptexp {__version__} (Hydra {version('hydra-core')})"
        self.add_argument("--version", action="version", version=text)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(message)


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read a command line, without the name of the program.

    Returns:
        Hydra's flags by their names, with the settings in `overrides`, and a line for each mistake; a setting that is
        only written wrongly is among the overrides as it was meant, so that it can be checked with the others.

    Raises:
        UserError: for a flag whose argument is missing or not allowed.
        SystemExit: after `--version`.
    """
    parser = _Parser()
    argv = list(argv)
    args, unknown = parser.parse_known_intermixed_args(argv)
    strange = [word for word in unknown if word.startswith("-")]
    words = [word for word in argv if word in args.overrides or (word in unknown and word not in strange)]
    problems = []
    for option in strange:
        bare, shown = option.lstrip("-"), option
        after = argv[argv.index(option) + 1 :][:1]
        if "=" not in option and after and after[0] in words and "=" not in after[0]:  # --norm rmsnorm
            words.remove(after[0])
            bare, shown = f"{bare}={after[0]}", f"{option} {after[0]}"
        if "=" in bare:
            problems.append(f"{shown}: a setting has no dashes; write {bare}")
            words.append(bare)
        else:
            problems.append(f"{option}: unknown option; --hydra-help lists the options, --help the settings")
    if not strange and parser.parse_known_args(argv)[1]:
        flags = shlex.join([word for word in argv if word not in args.overrides])
        problems.append(f"{flags}: stands between settings; write it before them: {flags} {shlex.join(args.overrides)}")
    if args.config_dir and not Path(args.config_dir).is_dir():
        problems.append(f"--config-dir {args.config_dir}: there is no such folder")
        args.config_dir = None
    args.overrides, cut = _join(words)
    return args, [*problems, *cut]


def _join(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put together what spaces have cut apart, such as `norm = rmsnorm` or `norm=layernorm, rmsnorm`.

    Returns:
        the settings, and a line for each that was cut apart.
    """
    parts: list[list[str]] = []
    for word in words:
        before = "".join(parts[-1]) if parts else ""
        goes_on = before.endswith((",", "=")) and "=" not in word.lstrip("=")
        if before and (goes_on or word.startswith(",") or (word.startswith("=") and "=" not in before)):
            parts[-1].append(word)
        else:
            parts.append([word])
    cut = [f"{' '.join(part)}: a setting has no spaces; write {''.join(part)}" for part in parts if len(part) > 1]
    return ["".join(part) for part in parts], cut

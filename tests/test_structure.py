"""The rooms of the package: imports run one way, and no module or function is too long to be read."""

import ast
from pathlib import Path

import pytest

import gptexp

PACKAGE = Path(gptexp.__file__).parent
PLUGINS = PACKAGE.parent / "hydra_plugins"

ROOMS = ("errors", "registry", "perf", "config", "runs", "analysis", "data", "inference", "models", "tasks", "audits",
         "loggers", "processes", "training", "sweeps", "commands")  # fmt: skip
"""From the bottom up: a room imports those before it."""

COMMANDS = ("train", "sample", "compare", "audit", "dashboard", "__main__")
FILES = sorted([*PACKAGE.rglob("*.py"), *PLUGINS.rglob("*.py")])


def room(module: str) -> str:
    """The room of a module such as gptexp.models.gpt."""
    name = module.split(".")[1] if "." in module else "errors"  # the package itself has a version number alone
    return "commands" if name in COMMANDS else name


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gptexp"):
            deeper = {f"{node.module}.{alias.name}" for alias in node.names} & {module_of(p) for p in FILES}
            found |= deeper or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("gptexp")}
    return found


def test_the_root_holds_the_commands_and_the_rooms() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "conf")}
    assert there == {*ROOMS, *COMMANDS, "__init__"} - {"commands"}


@pytest.mark.parametrize("path", [f for f in FILES if PACKAGE in f.parents], ids=module_of)
def test_imports_run_downwards(path: Path) -> None:
    own = ROOMS.index(room(module_of(path)))
    upwards = [other for other in imports(path) if ROOMS.index(room(other)) > own]
    assert not upwards, f"{module_of(path)} imports {upwards}"
    if room(module_of(path)) == "commands":
        assert not [other for other in imports(path) if room(other) == "commands"], "a command imports another"


def test_there_is_no_cycle() -> None:
    arrows = {module_of(path): imports(path) for path in FILES}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                walk(other, (*way, module))
            done.add(module)

    for module in arrows:
        walk(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name

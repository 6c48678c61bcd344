"""The registry: components by name, from this package and from others."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptexp.errors import UserError
from gptexp.models.norms import NormSettings
from gptexp.registry import KINDS, NORMS, Kind, NoSettings
from tests.conftest import finish, spawn


def test_a_component_is_its_own_settings_if_it_is_a_dataclass() -> None:
    kind = Kind("thing")

    @kind.register("plain")
    class Plain:
        """A thing.

        That has more to it."""

    @kind.register("own")
    @dataclass(frozen=True)
    class Own:
        size: int = 3

    assert list(kind) == ["own", "plain"]  # in alphabetical order
    assert kind.settings("plain") == NoSettings()
    assert kind.settings("own") == Own(3)
    assert kind.defaults() == {"own": {"size": 3}}
    assert kind["plain"].summary == "A thing."
    kind.register("plain")(Plain)  # as a notebook's cell does that runs again
    with pytest.raises(UserError, match=r"^thing=plain: is .*Plain already; .*Own needs another name$"):
        kind.register("plain")(Own)


def test_the_default_comes_first_and_every_kind_has_components() -> None:
    for kind in KINDS:
        assert len(kind) > 1
        assert not kind.default or next(iter(kind)) == kind.default


def test_a_norm_without_settings_of_its_own() -> None:
    NORMS.register("nothing")(NORMS["none"].made)
    assert NORMS["nothing"].settings is NormSettings


BROKEN = {
    "taken": ("NORMS.register('rmsnorm')(type('Mine', (), {'__module__': 'mine'}))",
              "norm=rmsnorm: is gptexp.models.norms.RMSNorm already; mine.Mine needs another name"),
    "unbuildable": ("""
from dataclasses import dataclass

@dataclass
class Settings:
    size: int

class Mine:
    pass

NORMS.register('mine', Settings)(Mine)
""", "norm=mine: the settings of unbuildable.Mine cannot be built (Settings.__init__() missing 1 required positional "
     "argument: 'size'); each needs a default"),
    "missing": ("import nothing_of_the_kind",
                "GPTEXP_IMPORT=missing: cannot be imported (No module named 'nothing_of_the_kind')"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_component_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    source, line = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(f"from gptexp.registry import NORMS\n{source}\n")
    command = spawn("seed=1", cwd=tmp_path, env=os.environ | {"GPTEXP_IMPORT": name})
    assert finish(command) == (2, "", f"error: {line}\n")
    assert "mine" not in NORMS

import subprocess
import sys

import pytest

from gptexp.data.settings import DataConfig


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(),
        DataConfig(name="file", path="a.txt", tokenizer="byte"),
        DataConfig(name="names", documents=True, terminator=".", split_seed=1),
        DataConfig(name="pydocs", offline_fallback=None),
    ],
)
def test_settings_that_go_together(config):
    assert config.problems() == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (DataConfig(name="file"), "data.path=null: data.name=file needs"),
        (DataConfig(path="a.txt"), "data.path=a.txt: has no effect"),
        (DataConfig(terminator="."), "data.terminator='.': has no effect with data.documents=false"),
        (DataConfig(documents=True, terminator=""), "data.terminator='': allowed: exactly one"),
        (DataConfig(documents=True, terminator="ab"), "data.terminator='ab': allowed: exactly one"),
        (DataConfig(documents=True, terminator="\ud800"), "data.terminator='\\ud800': allowed: exactly one"),
        (DataConfig(documents=True, terminator=".", tokenizer="byte"), "data.terminator='.': has no effect with data"),
        (DataConfig(split_seed=1), "data.split_seed=1: has no effect"),
    ],
)
def test_settings_that_do_not(config, key):
    [problem] = config.problems()
    assert problem.startswith(key)
    assert "\n" not in problem


def test_all_problems_are_reported_at_once():
    assert len(DataConfig(path="a", terminator="..", split_seed=3).problems()) == 3


def test_importing_the_data_loads_nothing_heavy():
    heavy = "torch", "lightning", "pooch", "requests", "filelock"
    modules = "gptexp.data.batches, gptexp.data.corpora, gptexp.data.encoded, gptexp.data.settings"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

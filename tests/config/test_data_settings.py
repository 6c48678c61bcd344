import subprocess
import sys

import pytest

from gptexp.config.schema import read_config
from gptexp.config.sections import DataConfig
from gptexp.errors import UserError
from gptexp.registry import TASKS


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"data": {"name": "file", "path": "a.txt", "tokenizer": "byte"}},
        {"data": {"name": "names"}, "task": {"name": "documents", "split_seed": 1}},
        {"data": {"name": "names", "tokenizer": "byte"}, "task": {"name": "documents"}},
        {"data": {"name": "pydocs", "offline_fallback": None}},
    ],
)
def test_settings_that_go_together(tree):
    config = read_config(tree).tree()
    for section, settings in tree.items():
        assert config[section] | settings == config[section]


@pytest.mark.parametrize(
    ("data", "task", "problem"),
    [
        ({"name": "file"}, {}, "data.path=null: data.name=file needs"),
        ({"path": "a.txt"}, {}, "data.path=a.txt: has no effect"),
        ({}, {"terminator": "."}, "task.terminator=.: unknown key"),
        ({}, {"name": "documents", "terminator": ""}, "task.terminator='': allowed: exactly one"),
        ({}, {"name": "documents", "terminator": "ab"}, "task.terminator='ab': allowed: exactly one"),
        ({}, {"name": "documents", "terminator": "\ud800"}, "task.terminator='\\ud800': allowed: exactly one"),
        ({"tokenizer": "byte"}, {"name": "documents", "terminator": "."}, "task.terminator='.': has no effect with d"),
        ({"name": "shakspeare"}, {}, "data.name=shakspeare: must be one of file, names, none, pydocs, shakespeare"),
    ],
)
def test_settings_that_do_not(data, task, problem):
    with pytest.raises(UserError) as caught:
        read_config({"data": data, "task": task})
    [line] = caught.value.problems
    assert line.startswith(problem)
    assert "\n" not in line


def test_the_end_of_a_document_is_the_corpus_s_own():
    documents = TASKS["documents"].settings
    assert documents().document_end(DataConfig(name="names")) == "."
    assert documents(terminator="!").document_end(DataConfig(name="names")) == "!"
    assert documents().document_end(DataConfig(name="names", tokenizer="byte")) == "\n"
    assert TASKS["text"].settings().document_end(DataConfig(name="names")) is None


def test_importing_the_data_loads_nothing_heavy():
    heavy = "torch", "lightning", "pooch", "requests", "filelock"
    modules = "gptexp.data.batches, gptexp.data.corpora, gptexp.data.encoding, gptexp.tasks.text"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""The configuration: one default for each setting, and a line for every problem."""

from copy import copy
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gptexp.config.choices import VALUES, conf_dir, groups
from gptexp.config.composition import VERSION_BASE, plain, register_choices
from gptexp.config.reference import sections
from gptexp.config.schema import Config, flatten, known_keys, load_config, read_config, read_section
from gptexp.config.sections import DataConfig
from gptexp.config.settings import nearest
from gptexp.config.trainer import SHORT
from gptexp.errors import UserError
from gptexp.models.baselines import BigramConfig
from gptexp.registry import KINDS, MODELS, OPTIMIZERS, SCHEDULES, TASKS
from gptexp.training.optimizers import AdamWConfig
from gptexp.training.schedules import Cosine

CONF = Path(conf_dir())


def composed(*overrides: str) -> dict[str, Any]:
    register_choices()
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE):
        return plain(compose("config", list(overrides)))


def test_the_command_has_the_defaults_of_the_schema() -> None:
    tree = composed()
    assert list(tree.pop("logger")) == ["wandb"]  # the command's choice; a Config by itself has none
    assert set(SHORT) <= tree["trainer"].keys()
    assert read_config(tree) == Config()


def changed(section: Any) -> Any:
    """A section with another default in every setting, whether or not it is allowed."""
    made = copy(section)
    for f in fields(made):
        value = getattr(made, f.name)
        if f.name not in ("name", "vocab_size") and not isinstance(value, dict) and not is_dataclass(value):
            object.__setattr__(made, f.name, (not value) if isinstance(value, bool) else f"{value} changed")
    return made


@pytest.mark.parametrize("number", range(4))
def test_each_default_stands_in_the_schema_alone(number: int) -> None:
    """What it says is what a command gets: no file of conf/ says it, too."""
    kinds = {"model": MODELS, "task": TASKS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    chosen = {name: list(kind)[number % len(kind)] for name, kind in kinds.items()}
    others = {name: kinds[name][choice].settings() for name, choice in chosen.items()}
    others |= {name: getattr(Config(), name) for name in ("data", "hardware", "trainer", "sweep")}
    wanted = changed(replace(Config(), **{name: changed(section) for name, section in others.items()}))
    with initialize_config_dir(conf_dir(), version_base=VERSION_BASE):
        try:
            register_choices(wanted)
            tree: Any = OmegaConf.to_container(compose("config"))  # an output_dir of another name needs no resolving
        finally:
            register_choices()
    missing = {k: v for k, v in flatten(asdict(wanted)).items() if k not in ("model.vocab_size", "logger")}
    assert {k: v for k, v in flatten(tree).items() if k in missing} == missing


def test_every_choice_composes_into_a_valid_configuration() -> None:
    extra = {"file": ["data.path=x"], "h6": ["model.n_embd=96"], "h12": ["model.n_embd=96"],
             "none": ["task=arithmetic"], "problems": ["data=file", "data.path=x"],
             "transfer/pretrain": ["data.path=x"]}  # fmt: skip
    for group, choices in groups().items():
        assert choices, group
        for name in choices if group not in ("sweep", *VALUES) else ():
            read_config(composed(f"{group}={name}", *extra.get(name.partition("_")[0], [])))


def test_every_component_is_a_choice_and_every_setting_has_a_meaning() -> None:
    found = groups()
    for kind in KINDS:
        group = found["data" if kind.name == "corpus" else kind.name]
        assert list(group) == list(kind)
        assert all(len(meaning) > 5 for meaning in group.values())
    base = composed()
    for group, (section, _) in VALUES.items():
        for name in found[group]:
            assert composed(f"{group}={name}") == base | {section: base[section] | {group: name}}
    told = {s.key: s.meaning for settings in sections().values() for s in settings}
    assert all(len(meaning) > 7 for meaning in told.values()), [k for k, v in told.items() if len(v) <= 7]
    unnamed = {key for key in known_keys() if not key.endswith(".name") and key.removeprefix("trainer.") not in SHORT}
    assert unnamed <= told.keys()


def test_the_command_line_wins_over_an_experiment() -> None:
    model = composed("experiment=ladder/2_head", "norm=rmsnorm", "heads=h8", "activation=gelu")["model"]
    assert (model["norm"], model["n_head"], model["activation"], model["n_layer"]) == ("rmsnorm", 8, "gelu", 1)


def test_nanogpts_recipes() -> None:
    from gptexp.models.gpt import GPT

    for name, parameters, steps, batch in (("nanogpt_cpu", 804_096, 2000, 12), ("nanogpt_gpu", 10_745_088, 5000, 64)):
        config = read_config(composed(f"experiment={name}"))
        assert GPT(config.sized(65)).n_params == parameters
        assert config.optimizer == AdamWConfig("adamw", 1e-3, 0.9, 0.99, 1e-8, 0.1)
        assert config.schedule == Cosine(warmup_steps=100, decay_steps=None, min_lr_ratio=0.1)
        assert (config.max_steps, config.batch_size, config.grad_clip, config.eval_interval) == (steps, batch, 1.0, 250)


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [
        (["experiment=names_mlp"], 19_915), (["experiment=names_mlp", "norm=batchnorm"], 20_427),
        (["experiment/ladder=1_bigram"], 4_225), (["experiment/ladder=7_scaled"], 10_788_929),
        # Embeddings and head, n-grams, block and norms.
        (["experiment=fast_cpu"], 2 * 65 * 64 + (66**2 + 3 * 16384) * 64 + 12 * 64**2 + 3 * 64),
    ],
)  # fmt: skip
def test_published_parameter_counts(overrides: list[str], parameters: int) -> None:
    from gptexp.models.settings import build_model

    config = read_config(composed(*overrides))
    assert build_model(config.sized(27 if config.data.name == "names" else 65)).n_params == parameters


@pytest.mark.parametrize("experiment", ["nanogpt_cpu", "fast_cpu", "names_mlp"])
@pytest.mark.parametrize(("optimizer", "schedule"), [("adamw", "constant"), ("sgd", "cosine"), ("muon", "linear")])
def test_an_experiment_takes_another_optimizer_and_schedule(experiment: str, optimizer: str, schedule: str) -> None:
    config = read_config(composed(f"experiment={experiment}", f"optimizer={optimizer}", f"schedule={schedule}"))
    assert (config.optimizer.name, config.schedule.name) == (optimizer, schedule)


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = read_config(composed("norm=rmsnorm", "optimizer=sgd", "schedule=wsd", "logger=none", "seed=3"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.tree()))
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml").fingerprint() == config.fingerprint()


@pytest.mark.parametrize("content", ["", "[1, 2]", "{a: ", "model: {n_embd: 0}", "model: 3", "\xff"])
def test_a_damaged_file_is_told_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert all(str(path) in line and "\n" not in line for line in caught.value.problems)


def test_the_fingerprint_is_of_what_computes() -> None:
    base = Config().fingerprint()
    csv = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger"}}
    same = [{"name": "x"}, {"output_dir": "y"}, {"logger": csv},
            {"model": {"norms": {"rmsnorm": {"eps": 0.5}}}}]  # fmt: skip
    other = [{"seed": 1}, {"model": {"norm": "rmsnorm"}}, {"model": {"norms": {"layernorm": {"eps": 0.5}}}},
             {"hardware": {"precision": "64-true"}}, {"max_steps": 7}]  # fmt: skip
    assert {read_config(tree).fingerprint() for tree in same} == {base}
    assert len({base, *(read_config(tree).fingerprint() for tree in other)}) == len(other) + 1


@pytest.mark.parametrize(("tree", "lines"), [
    ({"optimizer": {"name": ["sgd"]}}, ['optimizer.name=["sgd"]: unknown; did you mean sgd? allowed: adamw']),
    ({"schedule": {"name": "cosin"}},
     ["schedule.name=cosin: unknown; did you mean cosine? allowed: cosine, constant, linear, step, wsd"]),
    ({"model": 3}, ["model=3: must be a group choice: gpt, bigram, counts, mlp"]),
    ({"hardware": 3, "trainer": {"devices": 2}}, ["hardware=3: must be a group of settings"]),
    ({"trainer": {"val_check_interval": 4}, "gradient_accumulation_steps": 0},
     ["trainer.val_check_interval=4: must be a number of batches, a multiple of gradient_accumulation_steps=0",
      "gradient_accumulation_steps=0: must be an integer of at least 1"]),
    ({"model": {"norms": {"rmsnorm": 3, "rmsnrom": {}}}}, [
        "model.norms.rmsnorm=3: must be a group of settings",
        "model.norms.rmsnrom: unknown norm; did you mean rmsnorm? allowed: batchnorm, "]),
    ({"callbacks": {"a": 3, "b": None}, "logger": {"c": {}}},
     ["callbacks.a: lacks _target_", "logger.c: lacks _target_"]),
    ({"seed": -1, "batch_size": 5, "gradient_accumulation_steps": 2},  # a wrong value hides no other problem
     ["seed=-1: must be", "batch_size=5: must be a multiple"]),
    ({"optimizer": {"momentum": 0.9}}, ["optimizer.momentum=0.9: unknown key; allowed: name, learning_rate, beta1"]),
])  # fmt: skip
def test_a_line_for_each_problem(tree: dict, lines: list[str]) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError) as caught:
        read_config(tree)
    for line, start in zip(caught.value.problems, lines, strict=True):
        assert line.startswith(start)


def test_a_section_by_itself() -> None:
    assert read_section("optimizer", None) == AdamWConfig()
    assert read_section("schedule", {}) == Cosine()
    assert read_section("model", {"name": "bigram", "vocab_size": 7}) == BigramConfig(vocab_size=7)
    given = BigramConfig(vocab_size=7)
    assert read_section("model", given) is given
    for name, wrong in {"model": AdamWConfig(), "data": DataConfig(path="x"), "optimizer": {"name": 3}}.items():
        with pytest.raises(UserError, match=name):
            read_section(name, wrong)


@given(st.sampled_from(known_keys()), st.integers(0, 30), st.sampled_from("abcxyz_"))
def test_a_misspelt_key_finds_a_near_one(key: str, at: int, letter: str) -> None:
    wrong = key[: at % len(key)] + letter + key[at % len(key) + 1 :]
    if wrong not in known_keys() and len(key) > 6:
        assert "did you mean" in nearest(wrong, known_keys())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(
    st.sampled_from(["seed", "max_steps", "batch_size", "grad_clip", "bogus", "model", "optimizer", "eval_windows"]),
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.lists(st.integers())),
))  # fmt: skip
@example({"seed": "\n"})
def test_any_tree_is_a_configuration_or_a_user_error(tree: dict) -> None:  # type: ignore[type-arg]
    try:
        config = read_config(tree)
    except UserError as mistake:
        problems = mistake.problems
        assert problems
        assert all(line and "\n" not in line for line in problems)
    else:
        assert flatten(config.tree())

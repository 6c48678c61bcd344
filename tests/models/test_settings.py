"""What the models' settings say of themselves, without a model: problems between them, and what has an effect."""

from collections.abc import Callable

import pytest

from gptexp.models.baselines import BigramConfig, MLPConfig
from gptexp.models.gpt_settings import GPTConfig
from gptexp.registry import ACTIVATIONS, PLACEMENTS, POSITIONS
from tests.models.conftest import NORM_VARIANTS

Small = Callable[..., GPTConfig]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_head": 3}, "n_head=3: must divide model.n_embd=16; nearest: 1, 2, 4"),
        ({"n_head": 4, "n_kv_head": 3}, "n_kv_head=3: must divide model.n_head=4; nearest: 1, 2, 4"),
        ({"head_dim": 5, "position": "rope"}, "position=rope: needs an even head size, but model.head_dim = 5"),
        ({"head_dim": 4, "projection": False}, "head_dim=4: times model.n_head must be model.n_embd with"),
        ({"rope_theta": 500.0}, "rope_theta=500: has no effect with model.position=learned"),
        ({"n_head": 16, "position": "rope"}, "position=rope: needs an even head size"),
        ({"n_embd": 15, "n_head": 3, "position": "sinusoidal"}, "position=sinusoidal: needs an even"),
        ({"norm": "batchnorm", "norms": {"batchnorm": {"stats": ["time"]}}}, "norms.batchnorm.stats=[time]: must be"),
        ({"norm": "rbn", "norms": {"rbn": {"stats": []}}}, "norms.rbn.stats=[]: must be [batch,time] or [batch]"),
        ({"norm": "groupnorm", "norms": {"groupnorm": {"groups": 3}}},
         "norms.groupnorm.groups=3: must divide the 16 channels"),
        ({"norm": "groupnorm", "norms": {"groupnorm": {"groups": 16}}}, "norms.groupnorm.groups=16: a group of one"),
        ({"norm": "groupnorm", "n_embd": 18}, "norms.groupnorm.groups=4: must divide the 18 channels"),
        ({"norms": {"layernorm": {"affine": False, "bias": True}}},
         "norms.layernorm.bias=true: has no effect with affine=false"),
        ({"placement": "deepnorm", "residual": False}, "residual=false: model.placement=deepnorm weighs the residual"),
        ({"placement": "dual", "residual": False}, "residual=false: model.placement=dual weighs the residual"),
        ({"n_inner": 32, "projection": False}, "n_inner=32: must be 0 or model.n_embd=16 with model.projection=false"),
        ({"final_norm": True, "norm": "none"}, "final_norm=true: has no effect with model.norm=none"),
        ({"norm_final": "rmsnorm", "placement": "post"}, "norm_final=rmsnorm: has no effect"),
        ({"norm_mlp": "rmsnorm", "n_inner": 0}, "norm_mlp=rmsnorm: has no effect with model.n_inner=0"),
        ({"placement": "hybrid", "norm": "batchnorm"}, "placement=hybrid: needs a norm within one position"),
        ({"placement": "hybrid", "qk_norm": "head"}, "placement=hybrid: has norms of queries and keys"),
        ({"ngram_rows": 100}, "ngram_rows=100: has no effect with model.ngram=1"),
        ({"zero_init": True, "projection": False}, "zero_init=true: has no effect with model.projection=false"),
        ({"init": "torch", "placement": "deepnorm"},
         "init=torch: model.placement=deepnorm has initial weights of its own"),
    ],
    ids=str,
)  # fmt: skip
def test_combinations_that_cannot_work_are_named(small: Small, changes: dict, problem: str) -> None:
    (line,) = small(**changes).problems()
    assert line.startswith(f"model.{problem}")


@pytest.mark.parametrize(
    "changes",
    [
        *({"norm": norm} for norm in NORM_VARIANTS), *({"placement": placement} for placement in PLACEMENTS),
        *({"position": position} for position in POSITIONS), *({"activation": name} for name in ACTIVATIONS),
        {"norm_attention": "rmsnorm", "norm_mlp": "batchnorm", "norm_final": "none"}, {"n_layer": 0},
        {"residual": False}, {"projection": False}, {"projection": False, "n_inner": 0},
        {"projection": False, "n_inner": 16}, {"n_inner": 0}, {"n_inner": 24, "activation": "swiglu"},
        {"final_norm": False, "norm": "none"}, {"final_norm": True, "placement": "deepnorm"}, {"init": "torch"},
        {"ngram": 3, "ngram_rows": 100}, {"zero_init": True, "placement": "deepnorm"}, {"qk_norm": "head"},
        {"qk_norm": "full", "attention_scale": False}, {"norms": {"layernorm": {"affine": False}}, "bias": True},
        {"norms": {"layernorm": {"bias": True}}},
        {"n_embd": 18},  # four groups, the default of groupnorm, would not divide it, but it is not used
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_work_pass(small: Small, changes: dict) -> None:
    assert small(**changes).problems() == []


def test_all_problems_are_named_at_once(small: Small) -> None:
    config = small(n_head=3, placement="deepnorm", residual=False, projection=False, n_inner=8, init="torch",
                   norm="groupnorm", norms={"groupnorm": {"groups": 5}})  # fmt: skip
    assert [line.partition("=")[0] for line in config.problems()] == [
        "model.n_head", "model.residual", "model.n_inner", "model.init", "model.norms.groupnorm.groups",
    ]  # fmt: skip


def test_settings_that_were_changed_are_checked_though_their_norm_is_not_used(small: Small) -> None:
    config = small(norms={"batchnorm": {"stats": ["time"]}, "groupnorm": {"groups": 3}})
    assert sorted(line.partition(":")[0] for line in config.problems()) == [
        "model.norms.batchnorm.stats=[time]", "model.norms.groupnorm.groups=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        (BigramConfig(), []),
        (MLPConfig(), []),
        (MLPConfig(residual=True, n_layer=2, norm="batchnorm"), []),
        (MLPConfig(residual=True), ["model.residual=true: has no effect with model.n_layer=1"]),
        (MLPConfig(norm="groupnorm", n_hidden=30), ["model.norms.groupnorm.groups=4: must divide the 30 channels"]),
    ],
    ids=str,
)
def test_problems_of_the_baselines(config: BigramConfig | MLPConfig, problems: list[str]) -> None:
    assert config.problems() == problems


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"layernorm": 16}),
        ({"bias": True, "norm": "dyt"}, {"dyt": 16}),
        ({"qk_norm": "head"}, {"rmsnorm": 8, "layernorm": 16}),
        ({"qk_norm": "full", "bias": True}, {"rmsnorm": 16, "layernorm": 16}),
        ({"qk_norm": "head", "norm": "rmsnorm"}, {"rmsnorm": 16}),
        ({"norm_mlp": "rmsnorm", "norm_final": "dyt"}, {"dyt": 16, "rmsnorm": 16, "layernorm": 16}),
        ({"norm_attention": "rmsnorm", "norm_mlp": "dyt", "placement": "post"}, {"dyt": 16, "rmsnorm": 16}),
        ({"placement": "hybrid", "norm_mlp": "rmsnorm"}, {"layernorm": 8, "rmsnorm": 16}),
    ],
    ids=str,
)
def test_used_norms_are_the_only_ones_in_the_tree(small: Small, changes: dict, expected: dict) -> None:
    config = small(**changes)
    assert {name: site.channels for name, site in config.used_norms.items()} == expected
    assert {site.positions for site in config.used_norms.values()} == {8}
    assert config.tree()["norms"] == {name: config.norms[name] for name in expected}


@pytest.mark.parametrize("norm", NORM_VARIANTS)
def test_only_statistics_over_the_batch_alone_need_two_sequences(small: Small, norm: str) -> None:
    expected = 2 if norm in ("batchnorm[batch]", "rbn[batch]") else 1
    config = small(norm=norm)
    assert config.min_sequences == expected
    assert MLPConfig(norm=config.norm, norms=config.norms).min_sequences == expected
    of_batch = ("batchnorm", "rbn", "causal_batchnorm")  # which need two values
    assert small(norm=norm, block_size=1).min_sequences == (2 if config.norm in of_batch else 1)
    assert BigramConfig().min_sequences == 1

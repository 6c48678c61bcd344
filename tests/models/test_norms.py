"""Every norm against its formula, and what all registered norms have in common: tests that read the registry."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptexp.models.norms import BatchStatistics, NormSite, build_norm
from gptexp.registry import NORMS
from tests.models.conftest import NORM_VARIANTS, assert_close, norm_settings
from tests.models.norm_formulas import FORMULAS, Formula, State, powernorm

N, L, C, BLOCK = 4, 5, 8, 7
# Four sequences reach the first two positions, three the third, one the fourth, none the fifth.
MASK = torch.arange(L) < torch.tensor([[4], [3], [3], [2]])
MASKS = {"unmasked": None, "all true": torch.ones(N, L, dtype=torch.bool), "masked": MASK}
SITE = NormSite(C, BLOCK, part="mlp", layer=2, n_layer=4)

every_formula = pytest.mark.parametrize(
    ("name", "options", "formula", "renamed"), FORMULAS, ids=lambda value: getattr(value, "__name__", str(value)))
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
every_norm = pytest.mark.parametrize("norm", NORM_VARIANTS)
CROSSING = [norm for norm in NORM_VARIANTS if issubclass(NORMS[norm.partition("[")[0]].made, BatchStatistics)]
every_crossing_norm = pytest.mark.parametrize("norm", CROSSING)


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5) * scale


def moved(norm: nn.Module) -> nn.Module:
    """The norm in float64, in training, with all its values away from where they start."""
    norm = norm.double().train()
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(random(*p.shape, seed=10 + i))
        for i, b in enumerate(norm.buffers()):
            b.copy_(random(*b.shape, seed=20 + i).abs() + 0.1)
    return norm


def made(norm: str, **options: Any) -> nn.Module:
    """The registered norm with these settings; `batchnorm[batch]` has stats=[batch]."""
    name, tables = norm_settings(norm)
    return moved(build_norm(name, NORMS[name].settings(**tables.get(name, {}) | options), SITE))


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask


def step(norm: nn.Module, x: Tensor, mask: Tensor | None = None, seed: int = 99) -> State:
    """A step on a loss of the outputs that are not padding, with the penalty: outputs, gradients and buffers."""
    x, keep = x.detach().clone().requires_grad_(), kept(x, mask)
    norm.zero_grad()
    y = norm(x, mask)
    penalty = getattr(norm, "penalty", None)
    ((y[keep] * random(*y.shape, seed=seed)[keep]).sum() + (0.0 if penalty is None else penalty)).backward()
    gradients = {f"{name}.grad": p.grad.clone() for name, p in norm.named_parameters()}
    buffers = {name: b.clone() for name, b in norm.named_buffers()}
    known = {"y": y.detach()[keep], "x.grad": x.grad, **gradients, **buffers}
    return known if penalty is None else {**known, "penalty": penalty.detach()}


def expected_step(formula: Formula, state: State, x: Tensor, mask: Tensor | None, parameters: set[str], training: bool,
                  **options: Any) -> State:  # fmt: skip
    """The same by the formula; moves the running averages in state."""
    x, keep = x.detach().clone().requires_grad_(), kept(x, mask)
    state |= {name: state[name].detach().clone().requires_grad_() for name in parameters}
    y, penalty = formula(x, keep, state, training, **options)
    ((y[keep] * random(*y.shape, seed=99)[keep]).sum() + penalty).backward()
    gradients = {f"{name}.grad": state[name].grad for name in parameters}
    rest = {name: value for name, value in state.items() if name not in parameters}
    return {"y": y.detach()[keep], "x.grad": x.grad, **gradients, **rest, "penalty": torch.as_tensor(penalty).detach()}


def check_against_formula(name: str, options: dict[str, Any], formula: Formula, renamed: dict[str, Any],
                          mask: Tensor | None, training: bool, steps: int = 3) -> nn.Module:  # fmt: skip
    norm = made(name, **options).train(training)
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    parameters = {key for key, _ in norm.named_parameters()}
    for i in range(steps):
        x = random(N, L, C, seed=i)
        mine = step(norm, x, mask)
        theirs = expected_step(formula, state, x, mask, parameters, training, **options | renamed)
        assert mine.keys() | {"penalty"} == theirs.keys()
        assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    return norm


@every_formula
@every_mask
def test_training_follows_the_formula(
    name: str, options: dict[str, Any], formula: Formula, renamed: dict[str, Any], mask: Tensor | None
) -> None:
    """Outputs, all gradients, running averages and the penalty, over three steps."""
    check_against_formula(name, options, formula, renamed, mask, training=True)


@every_formula
def test_evaluation_follows_the_formula_and_learns_nothing(
    name: str, options: dict[str, Any], formula: Formula, renamed: dict[str, Any]
) -> None:
    norm = check_against_formula(name, options, formula, renamed, None, training=False, steps=1)
    assert all(torch.equal(b, o) for b, o in zip(norm.buffers(), made(name, **options).buffers(), strict=True))
    assert getattr(norm, "penalty", None) is None
    x = random(N, BLOCK, C)
    torch.testing.assert_close(norm(x)[:, :2], norm(x[:, :2]))  # a shorter batch has the first positions


def test_every_norm_has_a_formula() -> None:
    assert {name for name, *_ in FORMULAS} == set(NORMS)


def test_powernorm_can_have_the_gradient_of_what_it_computes() -> None:
    """What an audit needs: psi is a constant, nu has no part in it, and nothing crosses positions."""
    for prescale in (False, True):
        norm = made("powernorm", prescale=prescale)
        norm.exact_gradient = True
        state = {key: value.clone() for key, value in norm.state_dict().items()}
        mine = step(norm, random(N, L, C), MASK)
        theirs = expected_step(powernorm, state, random(N, L, C), MASK, {"weight", "bias"}, True, prescale=prescale,
                               exact=True)  # fmt: skip
        assert_close(mine, theirs)


# --- what all registered norms have in common ----------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("content", [0.0, 1e3, 1e300, float("inf"), float("nan")])
def test_the_content_of_padding_changes_nothing(norm: str, content: float) -> None:
    results = []
    for fill in (5.0, content):
        layer = made(norm)
        for i in range(2):  # what the first step learned has an effect in the second
            found = step(layer, random(N, L, C, seed=i).masked_fill(~MASK.unsqueeze(-1), fill), MASK)
        if not issubclass(type(layer), BatchStatistics):  # within one position: padding is left to itself
            found = {"y": found["y"], "x.grad": found["x.grad"][MASK]}
        results.append(found)
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


@every_norm
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lower_precision_stays_near(norm: str, mode: str) -> None:
    """A layer of bfloat16 returns bfloat16; under autocast, a layer of float32 is near, too."""
    wide, x = made(norm).train(mode == "train"), random(N, L, C).bfloat16()
    half, single = copy.deepcopy(wide).bfloat16(), copy.deepcopy(wide).float()
    for mask in (None, MASKS["all true"]):
        expected, y = wide(x.double(), mask), half(x, mask)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(single(x, mask).double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("norm", [norm for norm in NORM_VARIANTS if norm not in CROSSING])
def test_squares_do_not_overflow_half_precision(norm: str) -> None:
    """float16 ends at 65504, but what is squared is float32."""
    x = random(N, L, C, scale=200.0).half()
    expected = made(norm)(x.double())
    torch.testing.assert_close(made(norm).half()(x).double(), expected, rtol=0.01, atol=0.02)


@every_norm
def test_a_state_dict_holds_all_that_a_layer_knows(norm: str) -> None:
    """And a layer can be copied after a step."""
    first = made(norm)
    step(first, random(N, L, C))
    copied, loaded = copy.deepcopy(first), made(norm)
    loaded.load_state_dict(first.state_dict())
    for i in (1, 2):
        results = [step(layer, random(N, L, C, seed=i)) for layer in (first, copied, loaded)]
        for key, value in results[0].items():
            assert all(torch.equal(other[key], value) for other in results[1:]), key


@every_norm
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_x_may_have_any_strides(norm: str, mode: str) -> None:
    x = random(L, N, C).transpose(0, 1)
    strided, contiguous = (made(norm).train(mode == "train")(part) for part in (x, x.contiguous()))
    torch.testing.assert_close(strided, contiguous, rtol=0, atol=1e-13)


@every_norm
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_norm_compiles(norm: str, mode: str) -> None:
    layer, other = made(norm).train(mode == "train"), made(norm).train(mode == "train")
    torch._dynamo.reset()
    y = torch.compile(layer, backend="eager")(random(N, L, C), MASK)
    torch.testing.assert_close(y, other(random(N, L, C), MASK))


@every_norm
def test_initial_values_are_constants(norm: str) -> None:
    name, tables = norm_settings(norm)
    site = NormSite(16, L, bias=True)
    layer = build_norm(name, NORMS[name].settings(**tables.get(name, {})), site)
    constants = {"bias": 0.0, "shift": 0.0, "alpha": 0.5, "weight": 4.0 if name == "scalenorm" else 1.0}  # sqrt(16)
    for key, p in layer.named_parameters():
        assert bool((p == constants[key]).all()), key
    starts = {"running_mean": 0.0, "running_var": 1.0, "running_psi": 1.0, "running_nu": 0.0}
    for key, b in layer.named_buffers():
        assert bool((b == starts[key]).all()), key


OTHER = {
    "eps": 0.25, "momentum": 0.25, "mean_penalty": 0.25, "std_penalty": 0.25, "fraction": 0.25, "alpha": 0.25,
    "groups": 2, "affine": False, "bias": True, "prescale": False, "stats": ["batch"],
}  # fmt: skip
"""A value other than the default of each setting."""


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in NORMS for field in NORMS[name].settings.__dataclass_fields__]
)
def test_settings_reach_the_layer(name: str, field: str) -> None:
    """Another value makes another layer: other names, or other numbers after two steps."""
    value = "batch" if (name, field) == ("powernorm", "stats") else OTHER[field]
    assert getattr(NORMS[name].settings(), field) != value
    first, second = (build_norm(name, NORMS[name].settings(**o), SITE).double() for o in ({}, {field: value}))
    for layer in (first, second):
        step(layer, random(N, L, C, scale=0.01))
    before, after = (step(layer, random(N, L, C, scale=0.01, seed=1)) for layer in (first, second))
    assert before.keys() != after.keys() or any(
        before[key].shape != after[key].shape or not torch.allclose(before[key], after[key]) for key in before)


def test_default_settings_are_the_published_ones() -> None:
    running = {"eps": 1e-5, "momentum": 0.1}
    layernorm, batchnorm = {"eps": 1e-5, "affine": True, "bias": None}, running | {"stats": ["batch", "time"]}
    assert {name: asdict(norm.settings()) for name, norm in NORMS.items()} == {
        "layernorm": layernorm, "layernorm_scaling": layernorm, "rmsnorm": {"eps": 1e-6},
        "prmsnorm": {"eps": 1e-6, "fraction": 1 / 16}, "scalenorm": {"eps": 1e-5}, "dyt": {"alpha": 0.5},
        "derf": {"alpha": 0.5}, "groupnorm": {"eps": 1e-5, "groups": 4}, "batchnorm": batchnorm,
        "rbn": batchnorm | {"mean_penalty": 0.1, "std_penalty": 0.01}, "causal_batchnorm": running,
        "powernorm": running | {"stats": "running", "prescale": True}, "none": {},
    }  # fmt: skip


# --- single norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize("own", [None, False, True])
def test_the_bias_of_layernorm_follows_the_model_unless_it_is_set(of_model: bool, own: bool | None) -> None:
    norm = build_norm("layernorm", NORMS["layernorm"].settings(bias=own), NormSite(C, L, of_model))
    assert (norm.bias is not None) == (of_model if own is None else own)
    plain = build_norm("layernorm", NORMS["layernorm"].settings(affine=False), NormSite(C, L, of_model))
    assert not plain.state_dict()


@pytest.mark.parametrize(("fraction", "channels", "k"), [(0.07, 100, 7), (0.071, 100, 8), (1e-9, 16, 1), (1.0, 7, 7)])
def test_prmsnorm_rounds_its_share_of_the_channels_up(fraction: float, channels: int, k: int) -> None:
    """Where it is not whole: the product of 0.07 and 100 is a little more than 7 in floating point."""
    norm = build_norm("prmsnorm", NORMS["prmsnorm"].settings(fraction=fraction, eps=1e-12), NormSite(channels, L))
    x = random(1, 1, channels).float()
    torch.testing.assert_close(norm(x), x / x[..., :k].square().mean().sqrt())


@every_crossing_norm
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_may_be_too_small(norm: str, masked: bool) -> None:
    """One value has no variance: an error before anything is learned. Evaluation needs no batch."""
    shapes = {"batchnorm[batch]": (1, L), "rbn[batch]": (1, L)}
    shape = shapes.get(norm, (1, 1))
    layer, mask = made(norm), torch.ones(shape, dtype=torch.bool) if masked else None
    before = [b.clone() for b in layer.buffers()]
    if "powernorm" in norm:
        assert layer(random(*shape, C), mask).isfinite().all()
        return
    with pytest.raises(ValueError, match="no variance over fewer than two values: use a larger batch_size"):
        layer(random(*shape, C), mask)
    assert all(torch.equal(b, old) for b, old in zip(layer.buffers(), before, strict=True))
    assert layer.eval()(random(*shape, C), mask).isfinite().all()
    if norm not in shapes:  # a single sequence is enough
        assert layer.train()(random(1, L, C)).isfinite().all()


def test_the_first_position_of_causal_batchnorm_in_a_batch_of_one_is_as_in_evaluation() -> None:
    norm, x = made("causal_batchnorm"), random(1, L, C)
    before, expected = norm.running_mean.clone(), norm.eval()(x)[:, 0]
    torch.testing.assert_close(norm.train()(x)[:, 0], expected)
    assert (norm.running_mean == before).all(-1).tolist() == [True, *[False] * (L - 1), True, True]


def test_a_large_mean_does_not_cost_the_variance_in_float32() -> None:
    """The variance of 1 around 1000, where float32 has squares to within 0.06, once the running mean is near."""
    norm = build_norm("causal_batchnorm", NORMS["causal_batchnorm"].settings(), NormSite(C, L))
    for i in range(100):
        x = torch.randn(8, L, C, generator=torch.Generator().manual_seed(i)) + 1000
        y = norm(x).detach()
    for t in range(L):
        seen = x.double()[:, : t + 1].flatten(0, 1)
        expected = (x.double()[:, t] - seen.mean(0)) / torch.sqrt(seen.var(0, unbiased=False) + 1e-5)
        torch.testing.assert_close(y[:, t].double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.running_mean, torch.full((L, C), 1000.0), rtol=0, atol=1.0)


# --- two processes must be as one with their batches put together --------------------------------------------------

# With the uneven split, an average of the ranks' means is not the mean.
CASES = [(norm, masked, first) for norm in CROSSING for masked in (False, True) for first in (2, 1)]


def steps(norm: str, masked: bool, rows: slice) -> tuple[nn.Module, State]:
    layer = made(norm)
    mask = MASK[rows] if masked else None
    for i in range(3):
        x, g = random(N, L, C, seed=i)[rows].requires_grad_(), random(N, L, C, seed=50 + i)[rows]
        layer.zero_grad()
        y, keep = layer(x, mask), kept(x, mask)
        loss = (y[keep] * g[keep]).sum()
        if getattr(layer, "penalty", None) is not None:  # every rank has that of the global batch: each takes its share
            loss = loss + layer.penalty / (dist.get_world_size() if dist.is_initialized() else 1)
        loss.backward()
    rows_of = {"y": y.detach() * keep.unsqueeze(-1), "x": x.grad}
    shares_of = {name: p.grad for name, p in layer.named_parameters()}
    return {"rows": rows_of, "shares": shares_of, "same": dict(layer.named_buffers())}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = [steps(norm, masked, slice(first) if rank == 0 else slice(first, N)) for norm, masked, first in CASES]
    error = ""
    try:  # one sequence in all: rank 0 has none that counts
        made("batchnorm[batch]")(random(1, L, C), torch.full((1, L), rank == 1))
    except ValueError as e:
        error = str(e)
    torch.save({"results": results, "error": error}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_are_as_one(ranks: list[dict[str, Any]], case: tuple[str, bool, int]) -> None:
    norm, masked, _ = case
    first, second = (rank["results"][CASES.index(case)] for rank in ranks)
    whole = steps(norm, masked, slice(None))
    for key, value in whole["rows"].items():  # each rank has its rows
        torch.testing.assert_close(torch.cat([first["rows"][key], second["rows"][key]]), value)
    for key, value in whole["shares"].items():  # each rank has its rows' share of the sum
        torch.testing.assert_close(first["shares"][key] + second["shares"][key], value)
    for key, value in whole["same"].items():  # every rank has the global batch's
        torch.testing.assert_close(first["same"][key], value)
        assert torch.equal(first["same"][key], second["same"][key])


def test_too_few_sequences_in_all_is_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert all("fewer than two values" in rank["error"] for rank in ranks)

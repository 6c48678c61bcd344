"""What is measured inside a model, against independent computations; and that measuring changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gptexp.analysis.plots import plot_diagnostics
from gptexp.config.schema import Config, read_config
from gptexp.config.sections import ModelConfig
from gptexp.errors import UserError
from gptexp.models.baselines import MLPConfig
from gptexp.models.gpt_settings import GPTConfig
from gptexp.models.norms import NormSettings, NormSite, build_norm
from gptexp.models.settings import build_model
from gptexp.registry import NORMS
from gptexp.runs.files import Measurement, read_diagnostics, read_metrics
from gptexp.runs.run import Run
from gptexp.training.callbacks.diagnostics import Values, watch
from gptexp.training.load import load_data
from tests.cli.wandb_file import read_run
from tests.conftest import timeless, train

Tiny = Callable[..., Run]

TINY = [
    "data.name=file", "hardware.accelerator=cpu", "model.block_size=16", "model.n_embd=16",
    "batch_size=4", "max_steps=7", "log_interval=1", "eval_interval=100", "eval_windows=2", "sample_tokens=0",
    "schedule.warmup_steps=1",
]  # fmt: skip
GPT = ["model.n_layer=1", "model.n_head=2"]
LOGGERS = [
    "logger.tensorboard._target_=lightning.pytorch.loggers.TensorBoardLogger", "logger.tensorboard.name=''",
    "logger.tensorboard.version=tensorboard", "logger.wandb._target_=gptexp.loggers.wandb.WandbLogger",
]  # fmt: skip


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Trains a run of seven steps without the command line and without pictures, and returns it."""
    for name in ("plots.plot_curves", "plots.plot_diagnostics"):
        monkeypatch.setattr(f"gptexp.analysis.{name}", lambda *_: None)

    def run(name: str, *overrides: str) -> Run:
        other = any(o.startswith("model.name") for o in overrides)
        settings = OmegaConf.from_dotlist([*TINY, f"data.path={corpus}", *([] if other else GPT), *overrides])
        tree: Any = OmegaConf.to_container(settings)
        if tree["model"].get("name") == "bigram":
            del tree["model"]["n_embd"]
        train(read_config(tree), tmp_path / name)
        return Run.open(tmp_path / name)

    return run


@pytest.fixture
def names(tmp_path: Path) -> str:
    """The setting of a corpus of documents of unequal lengths."""
    (tmp_path / "names.txt").write_text("\n".join(["ada", "bobo", "clementine"] * 20))
    return f"data.path={tmp_path / 'names.txt'}"


def measured(run: Run, step: int = 0) -> dict[tuple[str, str], float]:
    return {(row.layer, row.quantity): row.value for row in read_diagnostics(run.diagnostics_path) if row.step == step}


def first_batch(run: Run) -> tuple[Any, Any]:
    """The initial model and the rows of step 0, made anew."""
    config = run.config
    data = load_data(run, config)
    model = build_model(config.sized(data.vocab_size), config.seed).double()
    return model, data.train.train_batch(config.seed, 0, config.batch_size, slice(0, config.batch_size))


def slope_of_gelu(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def slope_of_silu(z: Tensor) -> Tensor:
    s = 1 / (1 + torch.exp(-z))
    return s * (1 + z * (1 - s))


@pytest.mark.parametrize(("overrides", "slope"), [
    ("grad_clip=0.01", slope_of_gelu),
    ("model.activation=swiglu model.position=rope model.tie_weights=false model.bias=true", slope_of_silu),
    ("model.activation=relu model.norm=rmsnorm model.placement=post", lambda z: (z > 0).double()),
])  # fmt: skip
def test_every_quantity_of_a_gpt(overrides: str, slope: Callable[[Tensor], Tensor], tiny: Tiny) -> None:
    run = tiny("run", "max_steps=1", "diagnostics_interval=1", "model.n_layer=2", "gradient_accumulation_steps=2",
               "batch_size=6", "model.init=torch", *overrides.split())  # fmt: skip
    model, rows = first_batch(run)
    expected: dict[tuple[str, str], float] = {}
    x = torch.from_numpy(rows.x)[:3]  # the first micro-batch
    h = model.wte(x) + (model.wpe.weight[: x.shape[1]] if hasattr(model.wpe, "weight") else 0)
    rope = model.wpe.relative(slice(x.shape[1]))
    expected["embedding", "activation_rms"] = float(h.detach().pow(2).mean().sqrt())
    for i, block in enumerate(model.blocks):
        normed = h if block.residual1.before is None else block.residual1.before(h)
        middle = block.residual1(h, lambda y, block=block: block.attn(y, rope), None)
        q, k = (part.detach() for part in block.attn.heads(normed, rope)[:2])
        entropies, largest = [], -math.inf
        for t in range(x.shape[1]):  # each query sees the keys up to its own
            logits = (q[:, :, t, None] * k[:, :, : t + 1]).sum(-1) / math.sqrt(8)
            p = logits.exp() / logits.exp().sum(-1, keepdim=True)
            entropies.append(-(p * p.log()).sum(-1))
            largest = max(largest, float(logits.max()))
        expected[f"blocks.{i}.attn", "attention_entropy"] = float(torch.stack(entropies).mean())
        expected[f"blocks.{i}.attn", "max_attention_logit"] = largest
        inner = middle if block.residual2.before is None else block.residual2.before(middle)
        z = (block.mlp.fc if block.mlp.gate is None else block.mlp.gate)(inner)
        expected[f"blocks.{i}.mlp", "saturated"] = float((slope(z).abs() < 0.05).double().mean())
        h = block(h, None, rope)
        expected[f"blocks.{i}", "activation_rms"] = float(h.detach().pow(2).mean().sqrt())
    expected["head", "max_logit"] = float(model(x).detach().abs().max())

    log_probs = model(torch.from_numpy(rows.x)).log_softmax(-1)  # the gradient is the whole step's
    (-log_probs.gather(-1, torch.from_numpy(rows.y)[..., None]).mean()).backward()
    after = torch.load(run.checkpoint("last"), weights_only=True)["state_dict"]
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        layer = next(p for p in (name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0])
                     if p.rpartition(".")[2] not in ("qkv", "proj", "fc", "gate"))  # fmt: skip
        layers.setdefault(layer, []).append(name)
    for layer, names in layers.items():
        parameters = [model.get_parameter(n) for n in names]
        old = torch.cat([p.detach().flatten() for p in parameters])
        new = torch.cat([after[f"model.{n}"].flatten() for n in names]).double()
        expected[layer, "grad_norm"] = float(torch.cat([p.grad.flatten() for p in parameters]).norm())
        expected[layer, "update_ratio"] = float((new - old).norm() / old.norm())
    assert measured(run) == pytest.approx(expected, rel=2e-3)
    assert (("head", "grad_norm") in expected) == (not run.config.model.tie_weights)


def test_saturated_tanh(tiny: Tiny) -> None:
    gpt = tiny("gpt", "max_steps=1", "diagnostics_interval=1", "model.norm=dyt", "model.norms.dyt.alpha=60")
    model, rows = first_batch(gpt)
    x = model.wte(torch.from_numpy(rows.x)) + model.wpe.weight[:16]
    share = float(((60 * x).tanh().abs() > 0.97).double().mean())
    assert 0 < share < 1
    assert measured(gpt)["blocks.0.residual1.before", "saturated"] == pytest.approx(share, abs=2e-3)

    layers = ["model.name=mlp", "model.n_layer=2", "model.norm=layernorm"]
    mlp = tiny("mlp", "max_steps=1", "diagnostics_interval=1", *layers)
    model, rows = first_batch(mlp)
    padded = np.pad(rows.x, ((0, 0), (2, 0)))
    h = torch.cat([model.wte(torch.from_numpy(padded[:, i : i + 16])) for i in range(3)], dim=-1)
    expected = {("embedding", "activation_rms"): float(h.detach().pow(2).mean().sqrt())}
    for i in range(2):
        h = model.norms[i](model.hidden[i](h)).tanh()
        expected[f"hidden.{i}", "activation_rms"] = float(h.detach().pow(2).mean().sqrt())
        expected[f"hidden.{i}", "saturated"] = float((h.abs() > 0.97).double().mean())
    found = measured(mlp)
    assert {names: found[names] for names in expected} == pytest.approx(expected, rel=1e-3)
    assert {layer for layer, quantity in found if quantity == "grad_norm"} == {
        "wte", "hidden.0", "hidden.1", "norms.0", "norms.1", "head",
    }  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "options"), [
    ("batchnorm", {}), ("batchnorm", {"stats": ["batch"]}), ("rbn", {}), ("causal_batchnorm", {}),
    ("powernorm", {"prescale": False}), ("powernorm", {}),
])  # fmt: skip
def test_drift(name: str, options: dict[str, Any], masked: bool) -> None:
    draw = np.random.default_rng(0)
    norm = build_norm(name, NORMS[name].settings(**options), NormSite(channels=5, positions=9)).train()
    for buffer in norm.buffers():
        buffer.copy_(torch.from_numpy(draw.uniform(0.5, 2, tuple(buffer.shape))))
    x = draw.normal(1, 3, (4, 7, 5)).astype(np.float32)
    mask = np.arange(7) < np.array([[7], [3], [5], [7]]) if masked else np.ones((4, 7), bool)
    x[~mask] = np.inf

    def statistics(values: Any) -> tuple[Any, Any]:  # (positions, C)
        if name == "powernorm":
            rms = np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5)
            return 0, ((values if "prescale" in options else values / rms) ** 2).mean(0)
        return values.mean(0), values.var(0)

    groups = [x[mask]]
    if options.get("stats") == ["batch"]:
        groups = [x[mask[:, t], t] for t in range(7)]
    elif name == "causal_batchnorm":
        groups = [x[:, : t + 1][mask[:, : t + 1]] for t in range(7)]
    mean, var = (np.stack(parts) for parts in zip(*map(statistics, groups), strict=True))
    if name == "powernorm":
        running_mean, running_var = 0, norm.running_psi.numpy()
    else:
        running = (norm.running_mean, norm.running_var)
        running_mean, running_var = (b.numpy().reshape(-1, 5)[: len(groups)] for b in running)
    std = np.sqrt(var + norm.eps)
    expected = {"std_drift": np.abs(np.sqrt(running_var + norm.eps) / std - 1).mean()}
    if name != "powernorm":
        expected["mean_drift"] = (np.abs(running_mean - mean) / std).mean()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    found = norm.discrepancy(torch.from_numpy(x), torch.from_numpy(mask) if masked else None)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


class Outside(nn.Module):
    """A norm from outside the package, which measures a drift of its own."""

    def __init__(self, settings: NormSettings, shape: NormSite) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.channels))

    def discrepancy(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        return {"std_drift": 0.25}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * (1 + self.weight)


@pytest.mark.parametrize("overrides", [
    "model.norm=batchnorm model.dropout=0.2 gradient_accumulation_steps=2 task.name=documents",
    "model.norm=rbn hardware.precision=bf16-mixed model.placement=sandwich",
    "model.norm=powernorm hardware.precision=bf16-true model.qk_norm=head",
    "model.norm=outside",
    "model.name=mlp model.norm=batchnorm task.name=documents",
    "model.name=bigram",
])  # fmt: skip
def test_measuring_changes_nothing(overrides: str, tiny: Tiny, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*overrides.split(), *([names] if "documents" in overrides else [])]
    NORMS.register("outside", NormSettings)(Outside)
    drawn: list[Tensor] = []
    dropout = nn.functional.dropout

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(dropout(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(nn.functional, "dropout", noted)
    off = tiny("off", *options)
    count = len(drawn)
    on = tiny("on", *options, "diagnostics_interval=3")
    assert len(drawn) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(drawn[:count], drawn[count:], strict=True))
    assert timeless(on) == timeless(off)
    states = [torch.load(run.checkpoint("last"), weights_only=True)["state_dict"] for run in (on, off)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not off.diagnostics_path.exists()
    assert not off.heat_maps_path.exists()
    assert on.info["fingerprints"]["config"] == off.info["fingerprints"]["config"]

    rows = read_diagnostics(on.diagnostics_path)
    assert {row.step for row in rows} == {0, 3, 6}
    assert all(math.isfinite(row.value) for row in rows)
    quantities = {row.quantity for row in rows}
    everything = {"grad_norm", "update_ratio", "max_logit"}
    if "bigram" not in overrides:
        everything |= {"activation_rms", "saturated", "std_drift"}
        everything |= set() if "powernorm" in overrides or "outside" in overrides else {"mean_drift"}
        everything |= set() if "mlp" in overrides else {"attention_entropy", "max_attention_logit"}
    assert quantities == everything
    if "outside" in overrides:
        assert [row.step for row in rows if row[1:3] == ("norm_f", "update_ratio")] == [3, 6]  # at 0, all weights are 0
        assert all(row.value == 0.25 for row in rows if row.quantity == "std_drift")


def test_the_gradients_of_the_layers_make_up_the_whole_gradient(tiny: Tiny) -> None:
    run = tiny("run", "diagnostics_interval=2", "gradient_accumulation_steps=2", "grad_clip=0.1")
    whole = {row["step"] - 1: row["grad_norm"] for row in read_metrics(run.metrics_path) if "grad_norm" in row}
    for step in (0, 2, 4, 6):
        squares = sum(v**2 for (_, quantity), v in measured(run, step).items() if quantity == "grad_norm")
        assert math.sqrt(squares) == pytest.approx(whole[step], rel=1e-5)


@pytest.mark.parametrize("config", [
    GPTConfig(norm="batchnorm", n_layer=2), GPTConfig(norm="dyt"), GPTConfig(norm="powernorm", activation="swiglu"),
    MLPConfig(norm="causal_batchnorm"),
])  # fmt: skip
def test_padding_enters_nothing(config: ModelConfig) -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    ids = torch.randint(65, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    seen: list[Values] = [{}, {}]
    for other, values in zip(ids, seen, strict=True):
        model = build_model(config)
        hooks = watch(model, mask, values)
        model(torch.where(mask, ids[0], other), mask)
        for hook in hooks:
            hook.remove()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    a, b = ({names: float(value) for names, value in values.items()} for values in seen)
    assert len(a) > 5
    assert a == pytest.approx(b, rel=1e-6)


def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tiny: Tiny, killed: Callable[..., Run]) -> None:
    """Checkpoints are at steps 5, 10, 15 and 20; measurements, before steps 4, 12 and 20, on either side of them."""
    options = ["diagnostics_interval=4", "max_steps=24", "checkpoint_interval=5"]
    whole = tiny("whole", *options)
    for at in (6, 14, 22):
        run = killed(f"killed{at}", at, *options)
        assert run.diagnostics_path.read_bytes() == whole.diagnostics_path.read_bytes()
        assert timeless(run) == timeless(whole)


def test_the_loggers_hold_what_is_in_the_file(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", "gptexp")
    monkeypatch.setattr("gptexp.analysis.plots.plot_diagnostics", plot_diagnostics)
    run = tiny("run", "diagnostics_interval=3", *LOGGERS)
    assert f"picture: {run.heat_maps_path}" in run.log_path.read_text()
    assert run.heat_maps_path.read_bytes().startswith(b"\x89PNG")
    rows = read_diagnostics(run.diagnostics_path)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    names = {f"diagnostics/{row.quantity}/{row.layer}" for row in rows}
    assert {name for name in events.Tags()["scalars"] if name.startswith("diagnostics/")} == names
    logged = {(e.step, name): e.value for name in names for e in events.Scalars(name)}
    written = {(row.step, f"diagnostics/{row.quantity}/{row.layer}"): row.value for row in rows}
    assert logged == pytest.approx(written, rel=1e-6)

    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    history = [h for h in read_run(file).history if names & h.keys()]
    assert [h["trainer/global_step"] for h in history] == [0, 3, 6]
    logged = {(h["trainer/global_step"], key): value
              for h in history for key, value in h.items() if key in names}  # fmt: skip
    assert logged == pytest.approx(written, rel=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes(tiny: Tiny) -> None:
    """Gradients, updates and shared statistics are those of all ranks, and training is as it would be without."""
    both = ["hardware.strategy=ddp", "hardware.devices=2"]
    options = ["model.norm=batchnorm", "gradient_accumulation_steps=2"]
    off, on = tiny("off", *options, *both), tiny("on", *options, *both, "diagnostics_interval=3")
    one = tiny("one", *options, "diagnostics_interval=3")
    assert timeless(on) == timeless(off)
    for step in (0, 3, 6):
        a, b = measured(on, step), measured(one, step)
        assert a.keys() == b.keys()
        shared = [k for k in a if k[1] in ("grad_norm", "update_ratio", "mean_drift", "std_drift")]
        # The first micro-batch is the same four rows' first half, whichever rank holds which of them.
        assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, rel=1e-3)


@pytest.mark.parametrize("values", [[1e-5, 1.0, 3.0], [-1.0, math.nan, 2.0], [0.5], [math.inf], [0.0, 0.0], []])
def test_a_figure_of_any_values(values: list[float], tmp_path: Path) -> None:
    rows = [Measurement(10 * i, layer, "grad_norm", v) for i, v in enumerate(values) for layer in ("wte", "head")]
    plot_diagnostics(rows, "a title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists() == bool(values)


def test_a_model_that_hides_its_layers_is_a_mistake() -> None:
    assert Config(diagnostics_interval=5).fingerprint() == Config().fingerprint()
    for hidden in ({"compile": True}, {"strategy": "fsdp", "devices": 2}):
        with pytest.raises(UserError) as caught:
            read_config({"diagnostics_interval": 100, "hardware": hidden})
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith("diagnostics_interval=100: ")

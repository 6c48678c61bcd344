"""Looks inside training: gradients, updates, activations and attention of every layer, every so many steps.

What is measured, of the step to come. The first two are of the whole step, the drifts of the first micro-batch on all
ranks, the others of rank 0's share of it. Padding is left out everywhere.

    grad_norm            |gradient| (L2) of a layer's own parameters, before clipping
    update_ratio         |change of the parameters by the step| / |parameters before it|; none while they are all 0
    activation_rms       root mean square of a block's output; "embedding" is what enters the first block
    attention_entropy    mean entropy, in nats, of the attention weights of a query, over heads and queries
    max_attention_logit  the largest number that a softmax of the attention sees
    max_logit            the largest |logit| of the output
    saturated            fraction of (hidden unit, position) at which the slope of the activation function is less than
                         0.05 in magnitude, so that hardly any gradient passes; with swiglu, of the gate's SiLU. Of a
                         tanh, in DynamicTanh and in the MLP's hidden layers: the fraction with |tanh| > 0.97
    mean_drift           distance of a norm's running mean from the batch's, in the batch's standard deviations
    std_drift            distance of its running standard deviation from the batch's, as a fraction of that

A layer is an embedding, an attention or a feed-forward sub-layer, a norm, or a linear map outside those, by its name
in the model; a tied head counts under `wte`. The drifts are those of norms that are `BatchStatistics`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gptexp.audits.influence import named_layers
from gptexp.data.batches import Batch
from gptexp.models.attention import CausalSelfAttention
from gptexp.models.baselines import MLP
from gptexp.models.gpt import Block, FeedForward
from gptexp.models.norms import BatchStatistics, DynamicTanh
from gptexp.models.positions import NOTHING, Relative
from gptexp.runs.files import Measurement, append_rows
from gptexp.runs.run import Run
from gptexp.training.module import GPTModule

FLAT, FLAT_TANH = 0.05, 0.97
"""A slope below the one, or a |tanh| above the other (whose slope is then below 0.06), is saturated."""

AT_ONCE = 2**24
"""Attention weights that are held in memory at a time."""

Values = dict[tuple[str, str], Tensor | float]
"""By layer and quantity; tensors of one number, which are read only once the step is over."""


class Diagnostics(Callback):
    """Measures before step s, for s = 0 and every `interval` steps, into diagnostics.csv and to the loggers.

    Training is the same with it and without: the model is hooked for one forward pass, and the hooks draw no random
    number and change nothing. It comes before `Throughput`, which so counts its time as training.
    """

    def __init__(self, run: Run, interval: int) -> None:
        self.run, self.interval = run, interval
        self._step = -1  # that is measured, or was last
        self._values: Values = {}
        self._hooks: list[RemovableHandle] = []
        self._before: dict[str, list[Tensor]] = {}  # each layer's parameters before the step

    def on_train_batch_start(self, trainer: Trainer, module: GPTModule, batch: Batch, i: int) -> None:
        """Hook the model before the first micro-batch of a step that is due."""
        step = trainer.global_step
        if step % self.interval == 0 and step != self._step:
            self._step, self._values = step, {}
            # All ranks do, because the drifts are of statistics that they share.
            self._hooks = watch(module.model, batch.mask, self._values)

    def on_before_backward(self, trainer: Trainer, module: GPTModule, loss: Tensor) -> None:
        """Unhook the model: the forward pass is over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, module: GPTModule, optimizer: Any) -> None:
        """Measure the gradient, which is that of all micro-batches and ranks by now, unscaled and not yet clipped."""
        if trainer.global_step == self._step and trainer.is_global_zero:
            for layer, parameters in own_parameters(module.model).items():
                self._values[layer, "grad_norm"] = norm([p.grad for p in parameters if p.grad is not None])
                self._before[layer] = [p.clone() for p in parameters]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: GPTModule, *_: Any) -> None:
        """Measure what the step has changed, and write everything."""
        if not self._before:  # not measured, or between its micro-batches
            return
        for layer, parameters in own_parameters(module.model).items():
            before = self._before[layer]
            size = float(norm(before))
            if size:
                change = norm([_wide(p) - _wide(old) for p, old in zip(parameters, before, strict=True)])
                self._values[layer, "update_ratio"] = float(change) / size
        self._before = {}
        rows = [Measurement(self._step, *names, float(value)) for names, value in self._values.items()]
        append_rows(self.run.diagnostics_path, Measurement._fields, (row._asdict() for row in rows))
        logged: dict[str, float] = {f"diagnostics/{row.quantity}/{row.layer}": row.value for row in rows}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=self._step)


def watch(model: nn.Module, mask: Tensor | None, values: Values) -> list[RemovableHandle]:
    """Hook a model so that its forward passes are measured into `values`, until the hooks are removed.

    The mask, if any, is (N, L) bool, False at the padding of the batch to come.
    """
    hooks: list[RemovableHandle] = []

    def note(name: str, measure: Callable[..., Mapping[str, Tensor | float]], *tensors: Any) -> None:
        # A weight that autocast converts without gradient must not be kept for the pass that needs the gradient.
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            values.update({(name, quantity): value for quantity, value in measure(*tensors).items()})

    def before(module: nn.Module, name: str, measure: Callable[..., Mapping[str, Tensor | float]]) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: note(name, measure, *inputs)))

    def after(module: nn.Module, name: str, measure: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        hooks.append(module.register_forward_hook(lambda _, inputs, output: note(name, measure, output)))

    def real(x: Tensor) -> Tensor:  # (N, L, ...) to (positions, ...)
        return _wide(x.flatten(0, 1) if mask is None else x[mask])

    def rms(x: Tensor, *_: Any) -> dict[str, Tensor]:
        return {"activation_rms": real(x).square().mean().sqrt()}

    def flat(act: Callable[[Tensor], Tensor], z: Tensor) -> dict[str, Tensor]:
        return {"saturated": (slope(act, real(z)).abs() < FLAT).float().mean()}

    def flat_tanh(x: Tensor) -> dict[str, Tensor]:
        return {"saturated": (real(x).tanh().abs() > FLAT_TANH).float().mean()}

    def scaled_tanh(layer: DynamicTanh, x: Tensor, *_: Any) -> dict[str, Tensor]:
        return flat_tanh(layer.alpha * x)

    for name, layer in named_layers(model):
        if isinstance(layer, BatchStatistics):
            before(layer, name, layer.discrepancy)
        if isinstance(layer, CausalSelfAttention):
            before(layer, name, partial(attention, layer, real))
        elif isinstance(layer, FeedForward):
            linear = layer.fc if layer.gate is None else layer.gate
            after(linear, name, partial(flat, layer.act))
        elif isinstance(layer, DynamicTanh):
            before(layer, name, partial(scaled_tanh, layer))

    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    if blocks:
        before(blocks[0][1], "embedding", rms)
    for name, block in blocks:
        after(block, name, rms)
    if isinstance(model, MLP):  # what a hidden layer passes on is what the next one, or the head, is given
        names = [f"hidden.{i}" for i in range(len(model.hidden))]
        for name, following in zip(["embedding", *names], [*model.hidden, model.head], strict=True):
            before(following, name, rms)
        for name, normed in zip(names, model.norms, strict=True):
            after(normed, name, flat_tanh)
    after(model, "head", lambda logits: {"max_logit": real(logits).abs().max()})
    return hooks


def attention(
    layer: CausalSelfAttention, real: Callable[[Tensor], Tensor], x: Tensor, relative: Relative = NOTHING
) -> dict[str, Tensor]:
    """attention_entropy and max_attention_logit of the layer's input x (N, L, C), in the precision of its weights.

    The function `real` picks the positions that are not padding: (N, L, H) to (positions, H).
    """
    L, x = x.shape[1], x.to(layer.qkv.weight.dtype)
    entropy, largest = [], []
    for some in torch.split(x, max(1, AT_ONCE // (layer.n_head * L * L))):
        logits = _wide(layer.logits(some, relative))  # (n, H, L, L)
        entropy.append(torch.special.entr(logits.softmax(-1)).sum(-1))
        largest.append(logits.amax(-1))  # (n, H, L)
    mean, most = (real(torch.cat(parts).transpose(1, 2)) for parts in (entropy, largest))
    return {"attention_entropy": mean.mean(), "max_attention_logit": most.max()}


def slope(act: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The derivative of an element-wise function at each element of z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(act(z).sum(), z)[0]


def own_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each layer that has any; one that several share belongs to the first of them."""
    layers: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, layer in named_layers(model):
        own = [p for p in layer.parameters() if p not in seen]
        seen.update(own)
        if own:
            layers[name] = own
    return layers


def norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of all elements of some tensors together."""
    return torch.stack([torch.linalg.vector_norm(_wide(t)) for t in tensors]).norm() if tensors else torch.zeros(())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

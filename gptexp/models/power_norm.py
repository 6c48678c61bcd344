"""PowerNorm, which divides by a running quadratic mean over positions and sequences; see `batch_norms` for shapes."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gptexp.config.settings import settings
from gptexp.models.batch_norms import RunningSettings, sum_over_ranks, weighted
from gptexp.models.norms import Norm, NormSite
from gptexp.registry import NORMS


@settings
class PowerNormSettings(RunningSettings):
    """The settings of PowerNorm."""

    stats: Literal["running", "batch"] = "running"
    """Divide by the running average, or by the batch's own statistics."""
    prescale: bool = True
    """First divide each position's vector by its root mean square."""

    def min_sequences(self, positions: int) -> int:
        """One value has a mean square."""
        return 1


@NORMS.register("powernorm", PowerNormSettings)
class PowerNorm(Norm):
    """y = x / sqrt(psi + eps) * weight + bias, where psi (C,) is the mean of x^2 over sequences and positions.

    No mean is subtracted. With stats=running, the forward pass divides by psi's running average over the previous
    steps, and the backward pass corrects for that with another running average, nu:
    dx = (dz - nu z) / sqrt(psi + eps), z = x / sqrt(psi + eps), dz = weight dy,
    nu <- nu (1 - m mean(z^2)) + m mean(dz z), with m the momentum. With stats=batch ("PN-V"), training divides by the
    batch's own psi and differentiates through it, so it looks ahead. Evaluation uses the running average.
    prescale first divides each position's vector by its root mean square, as the authors' own layer does.
    Source: Shen et al. 2020, "PowerNorm: Rethinking Batch Normalization in Transformers", algorithms 1 and 2.
    """

    running_psi: Tensor
    running_nu: Tensor
    exact_gradient = False  # see `ApproximateGradient`

    def __init__(self, settings: PowerNormSettings, site: NormSite) -> None:
        super().__init__(settings, site, bias=True)
        self.momentum, self.prescale, self.of_batch = settings.momentum, settings.prescale, settings.stats == "batch"
        self.register_buffer("running_psi", torch.ones(self.size))
        self.register_buffer("running_nu", torch.zeros(self.size))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        wide, weight = self._prepared(x, mask if self.training else None)
        if not self.training:
            z = wide * torch.rsqrt(self.running_psi + self.eps)
        else:
            with torch.set_grad_enabled(self.of_batch):
                psi, count = self._mean_square(wide, weight)
            if self.of_batch or self.exact_gradient:
                z = wide * torch.rsqrt((psi if self.of_batch else self.running_psi.clone()) + self.eps)
            else:
                scale = torch.rsqrt(self.running_psi + self.eps)
                z = _Power.apply(wide, scale, self.running_nu, weight * (self.momentum / count))
            with torch.no_grad():
                self.running_psi.lerp_(psi.to(self.running_psi.dtype), self.momentum)
        y: Tensor = z.to(x.dtype) * self.weight + self.bias
        return y

    def _prepared(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is divided by the root of psi, in float32 at least, and its weight; see `weighted`."""
        wide, weight = weighted(x, mask)
        return (F.rms_norm(wide, wide.shape[-1:], None, self.eps) if self.prescale else wide), weight

    def _mean_square(self, wide: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The psi of a batch, and over how many positions."""
        count = sum_over_ranks(weight.sum()).clamp(min=1)
        return sum_over_ranks((wide.square() * weight).sum((0, 1))) / count, count

    @torch.no_grad()
    def discrepancy(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How far the running psi is from this batch's: std_drift, as batch norm's, with std = sqrt(psi + eps)."""
        psi, _ = self._mean_square(*self._prepared(x, mask))
        drift = ((self.running_psi + self.eps) / (psi + self.eps)).sqrt() - 1
        return {"std_drift": float(drift.abs().mean())}


class _Power(torch.autograd.Function):
    """z = x * scale, with PowerNorm's approximate gradient; the backward pass moves nu, in place.

    weight (N, L, 1) is the momentum over the number of positions, 0 where there is padding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, nu: Tensor, weight: Tensor) -> Tensor:
        z = x * scale
        ctx.save_for_backward(z, scale, weight)
        ctx.nu = nu
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, scale, weight = ctx.saved_tensors
        nu, dz = ctx.nu, grads[0]
        dx = (dz - nu.to(z.dtype) * z) * scale
        sums = torch.stack([(z.square() * weight).sum((0, 1)), (dz * z * weight).sum((0, 1))])
        gamma, lam = sum_over_ranks(sums).to(nu.dtype)
        nu.copy_(nu * (1 - gamma) + lam)
        return dx, None, None, None

"""The non-linearity of the feed-forward layer."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from gptexp.registry import ACTIVATIONS


class Activation:
    """An element-wise function of the hidden layer or, if gated, of a gate that multiplies it.

    A gated layer is proj(function(gate(x)) * fc(x)), with a third matrix. Its hidden layer is a third narrower, so the
    number of parameters stays the same. Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    gated = False
    function: Callable[[Tensor], Tensor]


@ACTIVATIONS.register("gelu")
class GELU(Activation):
    """x Phi(x), with Phi the normal distribution: Hendrycks, Gimpel 2016."""

    function = staticmethod(F.gelu)


@ACTIVATIONS.register("gelu_tanh")
class TanhGELU(Activation):
    """GELU by its approximation with a tanh, as in GPT-2."""

    function = staticmethod(partial(F.gelu, approximate="tanh"))


@ACTIVATIONS.register("relu")
class ReLU(Activation):
    """max(x, 0)."""

    function = staticmethod(F.relu)


@ACTIVATIONS.register("relu_squared")
class SquaredReLU(Activation):
    """max(x, 0)^2: So et al. 2021, "Primer"."""

    @staticmethod
    def function(x: Tensor) -> Tensor:
        """max(x, 0)^2 of each element."""
        return F.relu(x).square()


@ACTIVATIONS.register("swiglu")
class SwiGLU(Activation):
    """A gate with x sigmoid(x): Shazeer 2020."""

    gated = True
    function = staticmethod(F.silu)


@ACTIVATIONS.register("geglu")
class GEGLU(Activation):
    """A gate with GELU: Shazeer 2020."""

    gated = True
    function = staticmethod(F.gelu)

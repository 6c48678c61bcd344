"""Torch's optimizers without their care for torch.compile, for which they would import its package."""

import inspect

import torch


class Optimizer(torch.optim.Optimizer):
    """The base of all optimizers here: nothing of it is ever compiled.

    Torch marks these methods as not to be compiled, and to do so imports a package that takes as long to import as
    all else of torch. They are its own, without the mark.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`, whose step is wrapped in the same way, to be without gradients."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(Optimizer, torch.optim.SGD):
    """`torch.optim.SGD`, in the same way."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))

r"""Virtual steps: where an optimizer would take the parameters, without moving anything.

Parameters and gradients are dicts by name. No function here changes what it is given: an optimizer, a module's
parameters and their ``.grad`` are only read, results are new tensors. A look-ahead of K steps is

.. code-block:: python

    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    virtual = virtual_start(optimizer, named)
    for _ in range(K):
        loss = with_parameters(module, virtual.parameters, loss_of, batch)
        gradients = virtual_gradients(loss, virtual.parameters)
        virtual = virtual_step(optimizer, named, virtual, averaged_gradients(gradients))
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.core.distributed import mean_across_ranks, world_size
from zoo.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Virtual:
    """Where virtual steps have led.

    Attributes:
        parameters: by name, leaves that require a gradient.
        state: by name, what the optimizer keeps for each parameter, such as its moments.
    """

    parameters: dict[str, Tensor]
    state: dict[str, dict[str, Any]]


def check_virtual(optimizer: Any) -> None:
    """Refuse an optimizer whose step cannot be taken virtually.

    Raises:
        UserError: unless it is one of torch's own, which keep all they know in their groups and their state; LBFGS
            evaluates the loss by itself.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or kind is torch.optim.LBFGS:
        raise UserError(
            f"virtual steps need one optimizer of torch.optim, such as SGD or AdamW, and not LBFGS; got {kind.__name__}"
        )


def virtual_start(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> Virtual:
    """The parameters ``named`` and the optimizer's state as they are: references, to be read only."""
    return Virtual(dict(named), {name: optimizer.state.get(p, {}) for name, p in named.items()})


@torch.no_grad()
def virtual_step(
    optimizer: Optimizer,
    named: Mapping[str, nn.Parameter],
    start: Virtual,
    gradients: Mapping[str, Tensor],
    lr: float | None = None,
) -> Virtual:
    r"""One step of ``optimizer`` from ``start``, :math:`\tilde\theta = \theta - \eta\, d(g; s)`, bit for bit its own.

    It is torch's step itself, in its fused or foreach form where the optimizer has chosen one, on copies: momentum,
    Nesterov, weight decay, bias correction and what else the group asks for come with it.

    Args:
        optimizer: whose groups' settings hold, learning rates included.
        named: the real parameters by name; those of other optimizers stay.
        start: from where.
        gradients: by name; a parameter without one stays, as in torch.
        lr: replaces the learning rate; groups that have an ``lr_multiplier`` multiply it.

    Returns:
        New parameters, leaves that require a gradient, and the new state.

    Raises:
        UserError: for optimizers that :func:`check_virtual` refuses.
    """
    check_virtual(optimizer)
    names = {id(p): name for name, p in named.items()}
    copies: dict[str, Tensor] = {}
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(optimizer.__dict__)
    shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    shadow.param_groups, shadow.state = [], defaultdict(dict)
    for group in optimizer.param_groups:
        chosen = [name for p in group["params"] if (name := names.get(id(p))) is not None and name in gradients]
        for name in chosen:
            copy = start.parameters[name].detach().clone()
            copy.grad = in_layout_of(copy, gradients[name])
            copies[name] = copy
            if state := start.state.get(name):  # torch initialises where there is none
                shadow.state[copy] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        rate = group["lr"] if lr is None else lr * group.get("lr_multiplier", 1.0)
        shadow.param_groups.append({**group, "params": [copies[name] for name in chosen], "lr": rate})
    type(optimizer).step(shadow)  # of the class: schedulers replace the instance's by one that steps the original
    state = {**start.state, **{name: dict(shadow.state[copy]) for name, copy in copies.items()}}
    for copy in copies.values():
        copy.grad = None
        copy.requires_grad_()
    return Virtual({**start.parameters, **copies}, state)


def virtual_gradients(loss: Tensor, parameters: Mapping[str, Tensor], keep_graph: bool = False) -> dict[str, Tensor]:
    """Gradients of ``loss`` by name; ``.grad`` stays as it is, and so does what DDP hears of.

    Args:
        loss: a scalar.
        parameters: by name.
        keep_graph: for another backward pass through the same graph.

    Returns:
        Of the parameters on which the loss depends.
    """
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=keep_graph, allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's order of memory, which torch's fused optimizers take for granted.

    Backward passes see to it for what they leave in ``.grad``, but not for gradients that are asked for.
    """
    if gradient.layout != torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype, requires_grad=False).copy_(gradient)


def averaged_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the ranks, in one collective; every rank must bring the same names."""
    if world_size() == 1 or not gradients:
        return gradients
    flat = mean_across_ranks(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    parts = flat.split([gradient.numel() for gradient in gradients.values()])
    return {name: part.view_as(g).to(g.dtype) for part, (name, g) in zip(parts, gradients.items(), strict=True)}


def clipped_gradients(
    gradients: dict[str, Tensor], limit: float | None, algorithm: str | None = "norm"
) -> dict[str, Tensor]:
    """What clipping makes of gradients.

    Args:
        gradients: by name.
        limit: the largest total norm, or the largest absolute value; ``None`` or 0 clips nothing, as in the Trainer.
        algorithm: ``"norm"`` (also ``None``) or ``"value"``.
    """
    if not limit or not gradients:
        return gradients
    values = list(gradients.values())
    if algorithm == "value":
        clipped = torch._foreach_clamp_max(torch._foreach_clamp_min(values, -limit), limit)
    else:
        share = (limit / (nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
        clipped = torch._foreach_mul(values, share)
    return dict(zip(gradients, clipped, strict=True))


class _Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor], function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` while ``module`` holds other ``parameters``, named as in its ``named_parameters``."""
    named = {f"module.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(_Holder(module), named, (function, *args))


@contextmanager
def kept_buffers(module: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Let ``module`` work on copies of its buffers, and give it its own back afterwards.

    Args:
        module: with all its sub-modules.
        but: sub-modules that keep what happens to them.
    """
    left_out = {id(part) for root in but for part in root.modules()}
    own = [
        (part, name, buffer)
        for part in module.modules()
        if id(part) not in left_out
        for name, buffer in part.named_buffers(recurse=False)
    ]
    for part, name, buffer in own:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in own:
            setattr(part, name, buffer)

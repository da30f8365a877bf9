"""Sharpness-aware minimization: the gradient of the worst weights nearby."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.errors import UserError
from zoo.optim.virtual import averaged_gradients, virtual_gradients


class SAM:
    r"""Looks for weights whose whole neighbourhood has a low loss.

    .. math:: \min_\theta \max_{\lVert \epsilon \rVert \le \rho} L(\theta + \epsilon), \qquad
        \hat\epsilon = \rho \frac{g}{\lVert g \rVert}, \quad g = \nabla L(\theta), \qquad
        \theta \leftarrow \theta - \eta \nabla L(\theta + \hat\epsilon)

    the norm being that of all parameters together. Adaptive SAM measures the neighbourhood by the size of the weights,
    :math:`T = |\theta| + \tau`, so that a rescaling of the network which leaves its function alone leaves the
    neighbourhood alone too:

    .. math:: \hat\epsilon = \rho \frac{T^2 g}{\lVert T g \rVert}

    Nothing here steps: base optimizer and schedule are whatever they are. There are two ways to the second gradient.

    *With one automatic optimizer*, by parameters that are the real ones plus a constant. Nothing is changed, so nothing
    has to be put back, and clipping, schedule, accumulation and DDP are the Trainer's:

    .. code-block:: python

        loss = cross_entropy(self.network(x), y)
        above = self.sam.perturbed(loss, dict(self.network.named_parameters()))
        with frozen_batch_norm(self.network):  # running statistics move in the first pass alone
            logits = with_parameters(self.network, above, self.network, x)
        return cross_entropy(logits, y)  # its gradient with respect to θ is the gradient at θ + ε

    *With manual optimization*, in place, from gradients by name:

    .. code-block:: python

        with self.sam.ascended(self.network, gradients):
            self.manual_backward(cross_entropy(self.network(x), y))
        optimizer.step()  # θ is what it was, bit for bit: it was copied, for θ + ε - ε is not θ in floating point

    On several ranks ε comes from the mean gradient of all of them, so that every rank climbs to the same point and two
    ranks equal one on the joint batch. (m-SAM, where each has an ε of its own, is another algorithm.)

    Args:
        rho: :math:`\rho` ≥ 0; 0 is no perturbation. 0.05 in the paper; adaptive SAM wants more, 0.5 to 2.
        adaptive: measure by the weights' size.
        stability: :math:`\tau` ≥ 0 of adaptive SAM, 0.01 in its paper.

    Raises:
        UserError: if ``rho`` or ``stability`` is negative.

    Source: Foret et al. 2021, arXiv 2010.01412, equation 2 and algorithm 1; Kwon et al. 2021, arXiv 2102.11600,
    equation 4 (there biases have T = 1; here T is the same for every parameter).
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False, stability: float = 0.01) -> None:
        for name, value in (("rho", rho), ("stability", stability)):
            if not value >= 0.0:
                raise UserError(f"SAM: {name}={value} must not be negative")
        self.rho, self.adaptive, self.stability = rho, adaptive, stability

    @torch.no_grad()
    def perturbation(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        r""":math:`\hat\epsilon` by name.

        Args:
            gradients: by name, those of all ranks already averaged. Where all are 0, so is the perturbation.
            parameters: by name; needed by adaptive SAM alone.
        """
        values: Any = [gradient.detach() for gradient in gradients.values()]
        if not values:
            return {}
        if self.adaptive:
            if parameters is None:
                raise UserError("SAM: adaptive=True needs the parameters beside the gradients")
            scales = torch._foreach_add(
                torch._foreach_abs([parameters[name].detach() for name in gradients]), self.stability
            )
            values = torch._foreach_mul(values, scales)
        share = self.rho / nn.utils.get_total_norm(values).clamp(min=1e-30)
        steps = torch._foreach_mul(values, share)
        if self.adaptive:
            steps = torch._foreach_mul(steps, scales)
        return dict(zip(gradients, steps, strict=True))

    def perturbed(self, loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r""":math:`\theta + \hat\epsilon` by name, for :func:`~zoo.optim.virtual.with_parameters`.

        What is computed with them has, with respect to :math:`\theta`, the gradient at :math:`\theta + \hat\epsilon`:
        :math:`\hat\epsilon` is a constant. The graph of ``loss`` is freed and no ``.grad`` is touched.

        Args:
            loss: the scalar to climb; an unscaled one, on this rank's samples.
            parameters: by name; those that need no gradient, or that the loss does not depend on, stay.
        """
        learning = {name: p for name, p in parameters.items() if p.requires_grad}
        steps = self.perturbation(averaged_gradients(virtual_gradients(loss, learning)), learning)
        deltas: Any = list(steps.values())
        moved = torch._foreach_add([parameters[name] for name in steps], deltas) if steps else ()
        return {**parameters, **dict(zip(steps, moved, strict=True))}

    @contextmanager
    def ascended(self, module: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        r"""Inside, ``module`` has the weights :math:`\theta + \hat\epsilon`, and BatchNorm remembers nothing.

        Args:
            module: whose parameters are moved in place; afterwards they are what they were, also after an error.
            gradients: by the names of ``named_parameters``, averaged over ranks; the parameters' own ``.grad`` unless
                given. Under DDP these are averaged only when a backward pass through the wrapped module has synced.
        """
        named = dict(module.named_parameters())
        if gradients is None:
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        steps = self.perturbation(gradients, named)
        moving: Any = [named[name] for name in steps]
        deltas: Any = list(steps.values())
        kept = [p.detach().clone() for p in moving]
        with torch.no_grad():
            if moving:
                torch._foreach_add_(moving, deltas)
        torch.clear_autocast_cache()  # it holds 16-bit casts of θ
        try:
            with frozen_batch_norm(module):
                yield
        finally:
            with torch.no_grad():
                if moving:
                    torch._foreach_copy_(moving, kept)
            torch.clear_autocast_cache()

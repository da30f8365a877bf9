"""Steps in which only a part of a method learns, with one optimizer and one step of the Trainer a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.core.errors import UserError
from zoo.optim.virtual import averaged_gradients, clipped_gradients, in_layout_of, virtual_gradients


class PartialSteps(LightningModule):
    """A method of several updates a batch, or one in which parts rest for a while.

    The last update of a batch, often the only one, is the Trainer's: it returns a loss, and schedules, clipping,
    checkpoints and ``global_step`` see one step a batch. Updates before it are taken by :meth:`take_step`. What
    :attr:`resting` names has no gradient at the Trainer's step, so that no momentum and no weight decay moves it.
    """

    @property
    def resting(self) -> Iterable[nn.Module]:
        """What the Trainer's step leaves alone."""
        return ()

    def at_rest(self) -> Tensor:
        """0, with a gradient of 0 for what rests: ``ddp`` waits for every parameter."""
        terms = [p.sum() for module in self.resting for p in module.parameters() if p.requires_grad]
        return 0.0 * torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let rest what rests."""
        for module in self.resting:
            for parameter in module.parameters():
                parameter.grad = None

    def take_step(self, loss: Tensor, *modules: nn.Module) -> None:
        """One step of the optimizer down ``loss``, of these modules alone, by the mean gradient of all ranks."""
        parts = enumerate(modules)
        named: dict[str, Tensor] = {
            f"{i}.{name}": p for i, part in parts for name, p in part.named_parameters() if p.requires_grad
        }
        gradients = averaged_gradients(virtual_gradients(loss, named))
        if self._trainer is not None:
            clip: Any = self.trainer.gradient_clip_algorithm
            gradients = clipped_gradients(gradients, self.trainer.gradient_clip_val, clip and clip.value)
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()  # of the last batch
        for name, gradient in gradients.items():
            named[name].grad = in_layout_of(named[name], gradient)
        optimizer.step()
        optimizer.zero_grad()
        torch.clear_autocast_cache()  # it holds the weights as they were

    def check_partial(self) -> None:
        """Refuse, before training, what :meth:`take_step` does not follow.

        Raises:
            UserError: for ``accumulate_grad_batches``, 16-bit precision other than bfloat16, and sharded strategies.
        """
        name, trainer = type(self).__name__, self.trainer
        if (batches := trainer.accumulate_grad_batches) != 1:
            raise UserError(f"{name}: accumulate_grad_batches={batches} must be 1, as it steps several times a batch")
        if (precision := str(trainer.precision)).startswith("16"):
            raise UserError(f"{name}: precision={precision} scales the loss of one step only: take bf16-mixed or 32")
        refuse_shards(self)


def refuse_shards(module: LightningModule) -> None:
    """Refuse, before training, strategies under which a parameter may not be whole.

    Raises:
        UserError: naming the strategy.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
        kind = type(strategy).__name__
        raise UserError(f"{type(module).__name__}: {kind} may shard the parameters whose gradients are asked for: ddp")

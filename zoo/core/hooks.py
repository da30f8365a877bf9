"""Less of what Lightning's hooks cost per step: on a small network a third of what the Trainer itself costs."""

from typing import Any

from lightning.pytorch import Callback, LightningModule

PER_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class LeanHooks(LightningModule):
    """A module that the Trainer's hooks pass by quickly; nothing that a hook does changes."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the name of the running hook, as Lightning does some 40 times per step, past torch's look for weights."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        """Take the empty hooks out of the way."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            skip_empty_hooks(callback)


def skip_empty_hooks(callback: Callback) -> None:
    """Let the Trainer pass over those per-step hooks that ``callback`` leaves as the empty ones of the base class.

    The Trainer calls what is callable, inside a profiler's context, and a call costs microseconds also where the hook
    is empty. Only the instance is marked, so that ``super()`` of a subclass works as ever.
    """
    for name in PER_STEP:
        if name not in vars(callback) and getattr(type(callback), name, None) is getattr(Callback, name):
            setattr(callback, name, None)

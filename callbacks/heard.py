"""What a method's own forward gives while it is evaluated, without another forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HeardLogits:
    """The first and the last logits (B, C) that a module has given since it was last asked.

    Evaluation passes a batch to the module once; a method that adapts to the batch does so before and after.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._logits: list[Tensor] = []

    def listen(self, module: nn.Module) -> None:
        """Begin, with nothing; an earlier module is left."""
        self.leave()
        self._hook = module.register_forward_hook(self._keep)

    def leave(self) -> None:
        """Leave no hook behind."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._logits = None, []

    def take(self, batch: Any) -> list[tuple[Tensor, Tensor]]:
        """What was heard of a batch, with its labels (B,), once: nothing where they are not as many."""
        heard, self._logits = self._logits, []
        label = batch.get("label") if isinstance(batch, dict) else None
        if not isinstance(label, Tensor):
            return []
        return [(logits, label) for logits in heard if label.shape == logits.shape[:1]]

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            self._logits = [*self._logits[:1], output.detach()]

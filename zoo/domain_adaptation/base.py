"""What methods with a labelled source and an unlabelled target share."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zoo.core.errors import UserError, suggest
from zoo.core.method import Method


class DomainAdaptation(Method):
    """Base of methods on ``source`` {image, label} and ``target`` {image}.

    ``source_views`` and ``target_views`` name the views that a subclass reads: the data makes these and no others.
    ``image`` is the weak view; ``weak`` and ``strong``, with a number where several are wanted, such as ``strong_2``.
    ``settings`` names the relations of the domains' classes for which a subclass is made: ``closed`` (the same),
    ``partial`` (the target has some of the source's) and ``open`` (it has others); the data refuses any other.

    Args:
        forward_pass: ``"joint"`` sends both domains through the network in one batch, so that BatchNorm normalises them
            together; ``"split"`` normalises each by its own statistics, which aligns the first two moments by itself,
            and mixes both into the running averages. The same for networks without BatchNorm. ``None`` is what the
            method was published with.
        **kwargs: see :class:`~zoo.core.method.Method`. TLlib learns a pretrained backbone at a tenth of the rate:
            ``lr_multipliers={"network.backbone": 0.1}``.

    Raises:
        UserError: for another ``forward_pass``.
    """

    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ("image",)
    settings: ClassVar[tuple[str, ...]] = ("closed",)
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "joint"

    def __init__(self, forward_pass: Literal["joint", "split"] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if forward_pass not in (None, "joint", "split"):
            near = suggest(str(forward_pass), ["joint", "split"])
            raise UserError(
                f"{type(self).__name__}: forward_pass={forward_pass!r} must be 'joint', 'split' or null.{near}"
            )
        self.forward_pass = forward_pass or self.published_forward_pass

    def both(
        self, source: Tensor, target: Tensor, call: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the network makes of both domains.

        Args:
            source: inputs of the source.
            target: inputs of the target, as many or not.
            call: what is called; ``self.network.features`` unless given.
        """
        call = call or self.network.features
        if self.forward_pass == "split":
            return call(source), call(target)
        source_outputs, target_outputs = call(torch.cat([source, target])).split([len(source), len(target)])
        return source_outputs, target_outputs

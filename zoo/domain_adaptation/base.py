"""What methods with a labelled source and an unlabelled target share."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.errors import UserError, check_choice
from zoo.core.method import Method


class DomainAdaptation(Method):
    """Base of methods on ``source`` {image, label} and ``target`` {image}.

    ``source_views`` and ``target_views`` name the views that a subclass reads: the data makes these and no others.
    ``image`` is the weak view; ``weak`` and ``strong``, with a number where several are wanted, such as ``strong_2``.
    ``settings`` names the relations of the domains' classes for which a subclass is made: ``closed`` (the same),
    ``partial`` (the target has some of the source's), ``open`` (it has others) and ``universal`` (both have others);
    the data refuses any other.

    Args:
        forward_pass: ``"joint"`` sends both domains through the network in one batch, so that BatchNorm normalises them
            together; ``"split"`` normalises each by its own statistics, which aligns the first two moments by itself,
            and mixes both into the running averages. The same for networks without BatchNorm. ``None`` is what the
            method was published with.
        running_statistics: whose statistics BatchNorm's running averages, and with them every evaluation, take up where
            the domains are passed one by one: of ``"both"``, as in the authors' codes and TLlib, or of the ``"target"``
            alone (AdaBN, Li et al. 2016, arXiv 1603.04779). The target is then evaluated as it was trained, and the
            source, in ``val``, is not.
        **kwargs: see :class:`~zoo.core.method.Method`. TLlib learns a pretrained backbone at a tenth of the rate:
            ``lr_multipliers={"network.backbone": 0.1}``.

    Raises:
        UserError: for another ``forward_pass`` or ``running_statistics``, and for those of the target alone in a joint
            pass.
    """

    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ("image",)
    settings: ClassVar[tuple[str, ...]] = ("closed",)
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "joint"

    def __init__(
        self,
        forward_pass: Literal["joint", "split"] | None = None,
        running_statistics: Literal["both", "target"] = "both",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if forward_pass is not None:
            check_choice(type(self).__name__, "forward_pass", forward_pass, ("joint", "split"))
        self.forward_pass = forward_pass or self.published_forward_pass
        check_choice(type(self).__name__, "running_statistics", running_statistics, ("both", "target"))
        if running_statistics == "target" and self.forward_pass == "joint":
            raise UserError(
                f"{type(self).__name__}: running_statistics='target' needs forward_pass='split': in a joint pass both "
                "domains are one batch"
            )
        self.running_statistics = running_statistics

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
            return self.on_source(call, source), call(target)
        source_outputs, target_outputs = call(torch.cat([source, target])).split([len(source), len(target)])
        return source_outputs, target_outputs

    def on_source(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A pass of source samples alone: BatchNorm remembers it only with ``running_statistics="both"``."""
        if self.running_statistics == "both":
            return call(x)
        with frozen_batch_norm(self):
            return call(x)

"""Self-Training with Noisy Student Improves ImageNet Classification.

Xie et al., CVPR 2020, https://arxiv.org/abs/1911.04252
"""

from typing import Any, ClassVar, Literal

from zoo.core.card import Card
from zoo.semi_supervised.self_training import SelfTraining


class NoisyStudent(SelfTraining):
    r"""A noised student learns the soft labels that its teacher, without noise, gave to balanced samples.

    .. math:: L = \frac1n \sum_b H(y_b, p^{noised}(A(x_b))) + \frac1m \sum_b H(q_b, p^{noised}(A(u_b))),
        \quad q_b = p^{teacher}(u_b)

    The noise of the student is the strong view :math:`A`, of labeled and unlabeled samples, and what the network is
    given: ``dropout`` of :class:`~zoo.Network`, stochastic depth (``drop_path_rate`` among the ``arguments`` of a timm
    backbone). The teacher is the student of the round before in evaluation mode, on images as they are.

    Rounds with students of one size are made by ``PseudoLabeler(select=Balanced, restart=True)``. A larger student is a
    run of its own, whose data reads the labels of the teacher's run: ``configs/pipelines/noisy_student_mnist5k.yaml``.

    Batch: ``labeled`` {image, strong, label}, ``unlabeled`` {strong, pseudo_label, pseudo_label_weight}.

    Args:
        view: the student's view of unlabeled samples.
        **kwargs: see :class:`~zoo.semi_supervised.self_training.SelfTraining`.

    Source: Xie et al. 2020, arXiv 1911.04252, algorithm 1.
    """

    card = Card(
        title="Self-Training with Noisy Student Improves ImageNet Classification",
        year=2020,
        paper="arXiv:1911.04252",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_views: ClassVar[tuple[str, ...]] = ("strong",)
    labeled_view = "strong"

    def __init__(self, view: Literal["weak", "strong"] = "strong", **kwargs: Any) -> None:
        super().__init__(view=view, **kwargs)

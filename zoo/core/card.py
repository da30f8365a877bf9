"""What a method is, in a form that tools can read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """The identity of a method, shown by ``zoo list`` and written into model cards.

    Write it with literal keyword arguments: ``zoo list`` reads it from the source without importing torch.

    Args:
        title: the paper's title, or the method's common name where there is no paper.
        year: year of first publication.
        paper: ``"arXiv:2001.07685"``, a DOI, or ``""``.
        family: the package that holds the method, such as ``"semi_supervised"``.
        roles: the batch roles that ``training_step`` reads, such as ``("labeled", "unlabeled")``.
    """

    title: str
    year: int
    paper: str
    family: str
    roles: tuple[str, ...]

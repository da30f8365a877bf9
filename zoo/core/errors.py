"""Errors that say what to do next."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend: the command line prints the message alone and exits with 2."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """The nearest known name as a sentence, or nothing.

    Returns:
        ``" Did you mean 'FixMatch'?"`` with its leading space, or ``""``.
    """
    known = {choice.lower(): choice for choice in choices}
    match = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f" Did you mean {known[match[0]]!r}?" if match and known[match[0]] != name else ""


def check_choice(owner: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of a few names.

    Args:
        owner: the class whose argument it is.
        argument: its name.
        value: what was given.
        choices: what may be.

    Raises:
        UserError: with the choices and the nearest of them.
    """
    if value not in choices:
        allowed = " or ".join(map(repr, choices))
        raise UserError(f"{owner}: {argument}={value!r} must be {allowed}.{suggest(str(value), choices)}")

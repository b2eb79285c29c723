"""What an error says of a name that is not known."""

import difflib
from collections.abc import Iterable

FEW = 30


def hint(name: object, known: Iterable[str]) -> str:
    """Behind a message: the nearest of the names that are known; without one that is near all of them, if few."""
    known = list(known)
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(known)}" if len(known) <= FEW else ""

"""Packages that come with an extra of this one, and that not everything needs."""

import importlib.util


def need(module: str, what: str) -> None:
    """Raise ImportError, before any work, where a package of the extra `eval` is not installed.

    Args:
        what: needs it, for the error.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what} needs {module}: pip install 'carve-attention[eval]'")

"""Compiled CPU kernels of the attention operators."""


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot be used, or None if they can."""
    return 'the compiled kernels were not built'

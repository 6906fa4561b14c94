"""The one exception that means "the user can mend this"."""

__all__ = ['UserError']


class UserError(Exception):
    """Bad input: a file, an option or a value that the user can correct.

    The message is one sentence that says what is wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with code 2 (:func:`ppsr.cli.main`); Python callers catch it like any exception.
    """

"""The exceptions that mean "the user can mend this"."""

__all__ = ['DataError', 'UserError']


class UserError(Exception):
    """Bad input: a file, an option or a value that the user can correct.

    The message is one sentence that says what is wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with code 2 (:func:`ppsr.cli.main`); Python callers catch it like any exception.
    """


class DataError(UserError):
    """A data set, or one file in it, that cannot be used.

    torch's DataLoader raises the exception of a worker process again with that worker's traceback in the message; only
    the sentence at its end is kept.
    """

    def __init__(self, message: str):
        if message.startswith('Caught '):
            message = message.rsplit(f'{type(self).__name__}: ', 1)[-1].strip()
        super().__init__(message)

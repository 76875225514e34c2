"""The error class for everything that a user can fix."""


class InputError(ValueError):
    """Bad input: the message says what is wrong, where, and how to fix it.

    `train.py` and `eval.py` print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

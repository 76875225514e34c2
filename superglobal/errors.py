"""The one error class for everything a user can mend."""


class InputError(ValueError):
    """Bad input: the message names the thing, the place and the mend.

    `train.py` and `eval.py` print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

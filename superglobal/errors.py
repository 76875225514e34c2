"""Define `InputError`, which is raised for every problem that the user can fix."""

from superglobal.utils.escape import printable

_MAX_LINE = 2000  # maximum number of characters of a line of a message


class InputError(ValueError):
    """Error for invalid input. The message says what is wrong, where it is wrong, and how to fix it.

    All commands print the message without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        # The message may contain file names with control characters or bytes that are not UTF-8, and long values.
        lines = (printable(line) for line in super().__str__().split("\n"))
        return "\n".join(line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..." for line in lines)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 200 characters.

    If the error has no message, return the name of the error's type.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

"""Errors that the user can mend, and how they list things."""

from collections.abc import Iterable


class UserError(Exception):
    """The user must change something.

    The message is one line: what came, what was needed, and the command that mends it. The command line
    prints it on stderr and ends with exit code 2; anything else that escapes is a bug and keeps its traceback.
    """


def some(items: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first few, and how many more there are: 'a, b, c and 2 more'."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{separator.join(listed[:most])}{more}"

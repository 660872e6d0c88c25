"""Errors that the user can mend, and how they quote and list things."""

from collections.abc import Iterable

_LONGEST = 120
# for what Python says of a damaged file, which may quote all of it
LONGEST_ERROR = 300


class UserError(Exception):
    """The user must change something.

    The message is one line: what came, what was needed, and the command that mends it. The command line
    prints it on stderr and ends with exit code 2; anything else that escapes is a bug and keeps its traceback.
    """


class DiskFull(UserError):
    """A disk is full. `told`: of which file, and to free some space; `again`: what to do then."""

    def __init__(self, told: str, again: str = "run the same command again"):
        super().__init__(f"{told} and {again}")
        self.told = told


class Stopped(Exception):
    """A signal ended the work at a good place; the message says where, and how to go on. The command line prints it and
    ends as a process that the signal ended."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal


def some(items: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first few, and how many more there are: 'a, b, c and 2 more'."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{separator.join(listed[:most])}{more}"


def printable(text: object, longest: int | None = _LONGEST) -> str:
    """Text of a file that nobody vouches for, safe for a terminal: control characters escaped, long text cut."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return safe if longest is None or len(safe) <= longest else f"{safe[:longest]}…"

"""Errors that the user can mend."""


class UserError(Exception):
    """The user must change something.

    The message is one line: what came, what was needed, and the command that mends it. The command line
    prints it on stderr and ends with exit code 2; anything else that escapes is a bug and keeps its traceback.
    """

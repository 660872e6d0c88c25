"""One file per command of `hiendmae`: HELP, `add_arguments(parser)` and `run(args)`, an exit code or None for 0.

Heavy imports belong inside `run`: all files are imported by every command, and `hiendmae env` runs in every shell.
"""

"""Commands in the process of the test."""

from nnunetv2_hiendmae import cli


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, and what went to stdout and stderr."""
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err

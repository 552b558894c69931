"""A user's mistake is one line: what is wrong, where, and what to do. Anything else keeps its traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user, or a damaged file: the message is one line that helps."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[], None]) -> None:
    """Run a command line: a UserError becomes one line on stderr and exit status 1, Ctrl-C becomes status 130."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

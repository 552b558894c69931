"""A mistake of the user gives one line: what is wrong, where, and what to do. Other errors keep their traceback."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

# What a terminal obeys instead of showing it: control characters except newline and tab, and the marks that reverse the
# direction of the text. A surrogate (a byte of a file name that is not UTF-8) cannot be printed at all.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text of unknown origin (data, names from files) for a terminal: an escape character becomes \x1b."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake of the user, or a damaged file. The message is one line that says what to do."""

    def __init__(self, message: str):
        if len(message) > 1500:  # it quotes a value from a file, which can have any length
            message = f"{message[:1000]} … {message[-300:]}"
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, and knows flags by their whole name only."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[], None]) -> None:
    """Run a command: a UserError prints one line to stderr and exits with status 1, Ctrl-C exits with status 130."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit("error: " + printable(str(error)).replace("\n", "\\n"))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, for example `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

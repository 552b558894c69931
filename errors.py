"""A user's mistake is one line: what is wrong, where, and what to do. Anything else keeps its traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user, or a damaged file: the message is one line that helps."""


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

"""The one error that users see as a line instead of a traceback."""

import os
import sys
from contextlib import contextmanager

import torch


class UserError(ValueError):
    """Something the user can mend. The message names the value, the limit and the remedy, in one line.

    alone: whether one process may meet it while the others do not, and so has to print it itself.
    """

    def __init__(self, message, alone=False):
        super().__init__(message)
        self.alone = alone


def first_line(error):
    """An exception of a library in one line, to quote in a message of ours."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


@contextmanager
def one_line_errors():
    """Print a UserError as one line on stderr, once a machine unless one process alone met it; exit with code 2."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is too small ({first_line(error)}); lower --micro-batch, which changes a run's"
            " numbers by no more than rounding, or --batch-size",
            file=sys.stderr,
        )
        sys.exit(2)
    except UserError as error:
        # Every process meets the same mistake but for those that a DataLoader's worker met; these come with its
        # traceback, of which the last line is the message.
        *traceback, message = str(error).splitlines()
        if traceback or error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", message.removeprefix("moco.errors.UserError: "), file=sys.stderr)
        sys.exit(2)

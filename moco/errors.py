"""UserError, which users see as a line instead of a traceback, and what ends a script with such a line."""

import errno
import io
import os
import signal
import sys
from contextlib import contextmanager

import torch


class UserError(ValueError):
    """Something the user can correct. The message names the value, the limit and the remedy, in one line.

    alone: whether one process may meet it while the others do not, and so has to print it itself.
    """

    def __init__(self, message, alone=False):
        super().__init__(message)
        self.alone = alone


def first_line(error):
    """An exception of a library in one line, to quote in a message of ours."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # which only says that there was one
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


@contextmanager
def explained(what, remedy, *kinds, alone=False):
    """Turn an exception inside, of one of these kinds if some are named, into a UserError of one line.

    what: is wrong. remedy: what to do about it; the exception stands between them. alone: see UserError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        raise UserError(f"{what} ({first_line(error)}); {remedy}", alone) from error


@contextmanager
def one_line_errors():
    """Around a script's main: what the user can correct, memory, a full disk and Ctrl-C end it in one line on stderr.

    Exit code 2, after Ctrl-C 130. Every process meets most mistakes, and one for each machine prints them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may have characters that a terminal lacks
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    message, code, alone = None, 2, True
    try:
        yield
    except UserError as error:
        # An error of a DataLoader's worker comes with its traceback; the last line is the message.
        *traceback, last = str(error).splitlines()
        message, alone = last.removeprefix("moco.errors.UserError: "), bool(traceback) or error.alone
    except torch.OutOfMemoryError as error:
        message = (
            f"the GPU's memory is too small ({first_line(error)}); lower --micro-batch, which changes no number by"
            " more than rounding, or --batch-size"
        )
    except RuntimeError as error:  # PyTorch's own, or of a worker that the system killed
        if "shared memory" not in str(error):
            raise
        reason = str(error).strip().splitlines()[-1][:200]
        message = (
            f"/dev/shm, where workers leave batches, is full ({reason}); make it larger (docker run --shm-size 8g),"
            " or lower --workers or --batch-size"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        message = f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, then add --resume"
    except KeyboardInterrupt:
        message, code, alone = "stopped by Ctrl-C before there was a step to save", 128 + signal.SIGINT, False
    if message:
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", message, file=sys.stderr)
        sys.exit(code)


class Stream:
    """stdout or stderr whose reader may go away: a training is worth more than its messages.

    What cannot be written is dropped, and the stream then leads nowhere, so that nothing fails at the process's end.
    """

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")

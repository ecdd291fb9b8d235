"""Where a run's lines go: files and a terminal, each of which may fail without ending the run.

Another program fills the disk, whoever reads the pipe goes away (`| head`), an ssh session is
closed. Then the first failure is said, where something can still be said; lines that cannot be
written are lost; and when the place takes lines again, they go on there, on a line of their own.

    out = Lines(path, say)            say(text): tells of a failure, and how many lines are missing
    out.write("a line")               never raises
    print_line(text) -> bool          prints; False where nobody can read it any more
    complain(text)                    the same on stderr
"""

import contextlib
import os
import sys
from collections.abc import Callable


class Lines:
    """Appends lines to the file at `path`, unbuffered: what write() took is in the file when it
    returns.

    Raises OSError where the file cannot be opened: at the start of a run that can be mended."""

    def __init__(self, path: str | os.PathLike, say: Callable[[str], None]):
        self.path, self.say, self.lost = path, say, 0
        self.file = open(path, "ab", buffering=0)
        self.torn = False  # does the file end in the middle of a line?

    def write(self, line: str) -> None:
        data = b"\n" * self.torn + line.encode("utf-8", "replace") + b"\n"
        try:
            while data:  # a disk that fills up takes a part, and the next call raises
                done = self.file.write(data)
                self.torn, data = done < len(data), data[done:]
        except (OSError, ValueError) as error:  # ValueError: closed
            self.lost += 1
            if self.lost == 1:
                why = getattr(error, "strerror", None) or error
                self.say(
                    f"{self.path} cannot be written ({why}): training goes on without these lines"
                )
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.say(f"{self.path} is written again; {lost} lines are missing")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a network disk may refuse only now
            self.file.close()


def print_line(text: str) -> bool:
    """Prints a line, flushed; letters that the terminal lacks become question marks. False where it
    cannot be printed; where nobody reads any more, later prints go nowhere, and Python ends without
    a complaint.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except (OSError, ValueError):
        to_nowhere(sys.stdout)
        return False
    return True


def complain(text: str) -> None:
    """A line on stderr, if anybody reads there."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        to_nowhere(sys.stderr)


def to_nowhere(stream) -> None:
    """What is still to be written to stdout or stderr is dropped."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

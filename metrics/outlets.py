"""Where a run's lines go: files and a terminal, each of which may fail without ending the run.

Another program fills the disk, whoever reads the pipe goes away (`| head`), an ssh session is
closed. Then the first failure is reported where something can still be written. Lines that cannot
be written are lost. When the place takes lines again, the next ones are written there, each on a
line of its own.

A command that is there for its output ends with its reader instead, and says nothing.

    out = LineFile(path, log)         log(text): hears of a failure, and how many lines are missing
    out.write("a line")               never raises
    print_line(text) -> bool          prints; False where nobody can read it any more
    complain(text)                    the same on stderr
    command(name, main)               main(the words typed), a mistake as one line, and the end
    with reader_may_leave(): ...      for a command that tells of its mistakes itself
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator


class LineFile:
    """Appends lines to the file at `path`, unbuffered: after write() its line is in the file.

    Raises OSError where the file cannot be opened: at the start of a run somebody can mend that.
    """

    def __init__(self, path: str | os.PathLike, log: Callable[[str], None]):
        self.path = path
        self.log = log
        self.file = open(path, "ab", buffering=0)
        self.n_lost = 0
        self.ends_in_line = False  # the disk took only a part of the last line

    def write(self, line: str) -> None:
        data = line.encode("utf-8", "replace") + b"\n"
        if self.ends_in_line:
            data = b"\n" + data
        try:
            # A disk that fills up takes a part, and the next call raises.
            while data:
                n = self.file.write(data)
                self.ends_in_line = n < len(data)
                data = data[n:]
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self.n_lost += 1
            # One report for a failure, not one for each line.
            if self.n_lost == 1:
                why = getattr(error, "strerror", None) or error
                self.log(
                    f"{self.path} cannot be written ({why}): training continues without these lines"
                )
            return
        if self.n_lost:
            n_lost = self.n_lost
            self.n_lost = 0
            self.log(f"{self.path} is written again; {n_lost} lines are missing")

    def close(self) -> None:
        # A network disk may refuse only now.
        with contextlib.suppress(OSError):
            self.file.close()


def print_line(text: str) -> bool:
    """Prints a line, flushed; letters that the terminal lacks become question marks.

    False where it cannot be printed. Then nobody reads any more: later prints go nowhere, and
    Python ends without a complaint.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except (OSError, ValueError):
        to_nowhere(sys.stdout)
        return False
    return True


def complain(text: str) -> None:
    """Prints a line on stderr, if anybody reads there."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        to_nowhere(sys.stderr)


def command(name: str, main: Callable[[list[str]], int | None], *mistakes: type) -> None:
    """main(the words typed). The process ends with the status that it returns, if that is not 0.

    A ValueError, or one of `mistakes`, is a line on stderr, and status 2.
    """
    with reader_may_leave():
        try:
            status = main(sys.argv[1:])
        except BrokenPipeError:  # an OSError, but nobody's mistake
            raise
        except (ValueError, *mistakes) as error:
            complain(f"{name}: {error}")
            status = 2
        if status:
            sys.exit(status)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is inside ends early, and without an error, when nobody reads stdout any more."""
    try:
        yield
    except BrokenPipeError:
        # Another pipe, or a socket, may have broken. Then stdout still takes a line.
        if print_line(""):
            raise
    finally:
        # Here, for Python complains of what it cannot write at its end.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            to_nowhere(sys.stdout)


def to_nowhere(stream) -> None:
    """Whatever is still written to this stream, stdout or stderr, is dropped."""
    # In a notebook or a service there may be no file behind the stream.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

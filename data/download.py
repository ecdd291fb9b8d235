"""Downloads that survive a bad line: continued where they broke off, named when whole and verified.

    URL --Range--> file.part --sha256--> file      while file.lock is held: of two runs one waits

The checksum is a known one, or the one that the server names (Hugging Face's `X-Linked-Etag`, sent
before it redirects). A damaged file is fetched once more. Offline, the error says what else to use.
"""

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetches `url` to `path` unless it is there; only a whole, verified file gets that name.

    sha256: what the file must have; None takes the one that the server names, as Hugging Face does.
    A `.part` left by an earlier try is continued; a damaged file is fetched once more. Raises
    ValueError if nothing helps.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with making(path) as missing:
        if not missing:
            return path
        for _ in range(2):
            promised = _receive(url, part)
            wanted = sha256 or promised
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if wanted in (None, found):
                os.replace(part, path)
                return path
            # Damaged: a new start may help, continuing cannot.
            part.unlink()
    raise ValueError(
        f"{url} came twice with sha256 {found} instead of {wanted}: use another mirror with "
        "--data_url=, or --data=python"
    )


@contextlib.contextmanager
def making(path: Path) -> Iterator[bool]:
    """`with` this as missing: True where this process, and no other, must make the file `path`.

    Another process that wants the same file waits here until the first one is done, or has died.
    Otherwise each would write into the other's unfinished file. Where files cannot be locked
    (Windows, some network disks) nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None or path.exists():
        yield not path.exists()
        return
    lock_path = path.with_name(path.name + ".lock")
    announced = False
    while True:
        with open(lock_path, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not announced:
                    print(
                        f"{path} is being made by another process; waiting for it", file=sys.stderr
                    )
                announced = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                # This disk knows no locks.
                pass
            # The process that held the lock has deleted its file: then ours locks nothing, and we
            # begin again.
            try:
                is_ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock_path))
            except FileNotFoundError:
                continue
            if is_ours:
                try:
                    yield not path.exists()
                finally:
                    lock_path.unlink(missing_ok=True)
                return


def _receive(url: str, part: Path) -> str | None:
    """Completes the file `part`; returns the sha256 that the server names, if it names one.

    After a broken connection it continues where that ended, as long as each try brings something.
    """
    reason = "the connection ended early"
    before = -1
    size = _size(part)
    while size > before:
        before = size
        redirect = _Redirect()
        # Asking for the last byte again makes a complete file an ordinary case.
        have = max(size - 1, 0)
        headers = {"User-Agent": "nanoscale"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            # A server that is silent for half a minute counts as a broken connection.
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.build_opener(redirect).open(request, timeout=30) as reply:
                total = _write(reply, part, have)
            # Where the server tells no size, the end of its answer counts as the end of the file.
            if total in (None, part.stat().st_size):
                etag = reply.headers.get("X-Linked-Etag") or redirect.etag
                is_sha256 = re.fullmatch('"?[0-9a-f]{64}"?', etag)
                return etag.strip('"') if is_sha256 else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error
            # `part` is longer than the file on the server: it is a part of another file.
            if getattr(error, "code", None) == 416 and size:
                part.unlink()
                before = -1
        size = _size(part)
    raise ValueError(
        f"cannot download {url} ({reason}): give a mirror with --data_url=, or use "
        "--data=python or a text file, which need no network"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(reply, part: Path, have: int) -> int | None:
    """Writes an answer into `part` from byte `have` on; returns the size of the whole file.

    None where the server does not tell that size.
    """
    # A server may ignore Range and send all of it.
    if reply.status != 206:
        have = 0
    length = reply.headers.get("Content-Length")
    total = None if length is None else have + int(length)
    with (
        open(part, "r+b" if have else "wb") as file,
        progress(part.stem, total, have) as bar,
    ):
        file.seek(have)
        while chunk := reply.read(2**20):
            bar.update(file.write(chunk))
        file.flush()
        os.fsync(file.fileno())
    return total


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Remembers the sha256 of a redirect.

    Hugging Face names it in its own answer, then sends us on to a storage server that does not.
    """

    etag = ""

    def redirect_request(self, request, reply, code, message, headers, new_url):
        self.etag = headers.get("X-Linked-Etag") or self.etag
        return super().redirect_request(request, reply, code, message, headers, new_url)


def hexdigest(content) -> str:
    return hashlib.sha256(content).hexdigest()


def progress(title: str, total: int | None, start: int = 0):
    """A bar that counts bytes on the terminal; hidden where stderr is none."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    return tqdm(desc=title, total=total, initial=start, unit="B", unit_scale=True, disable=hidden)

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
    """Fetches `url` to `path` unless it is there; the file gets its name only when it is whole and
    verified.

    A `.part` left by an earlier try is continued. The result must have `sha256`, or else the one
    that the server names, as Hugging Face does; a damaged file is fetched once more. ValueError if
    nothing helps.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with making(path) as missing:
        for _ in range(2 * missing):
            promised = _receive(url, part)
            with open(part, "rb") as file:
                wanted, found = sha256 or promised, hashlib.file_digest(file, "sha256").hexdigest()
            if wanted in (None, found):
                os.replace(part, path)
                return path
            part.unlink()
    if missing:
        raise ValueError(
            f"{url} came twice with sha256 {found} instead of {wanted}: use another mirror with "
            "--data_url=, or --data=python"
        )
    return path


@contextlib.contextmanager
def making(path: Path) -> Iterator[bool]:
    """Whether the file `path` is still to be made, which this process then does alone: another one
    waits here until the first is done, or has died. Each would otherwise write into the other's
    unfinished file.

    Where files cannot be locked (Windows, some network disks) nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None or path.exists():
        yield not path.exists()
        return
    lock, told = path.with_name(path.name + ".lock"), False
    while True:
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    print(
                        f"{path} is being made by another process; waiting for it", file=sys.stderr
                    )
                told = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:  # the first is done, and took the lock away
                continue
            if ours:
                try:
                    yield not path.exists()
                finally:
                    lock.unlink(missing_ok=True)
                return


def _receive(url: str, part: Path) -> str | None:
    """Completes `part`; returns the sha256 that the server names, if any. A broken connection is
    taken up again where it ended, as long as each try brings something."""
    before, reason = -1, "the connection ended early"
    while (size := part.stat().st_size if part.exists() else 0) > before:
        before, redirect = size, _Redirect()
        # Asking for the last byte again makes a complete file an ordinary case
        have = max(size - 1, 0)
        headers = {"User-Agent": "nanoscale"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.build_opener(redirect).open(request, timeout=30) as reply:
                have = have if reply.status == 206 else 0  # a server may ignore Range
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
            if total in (None, part.stat().st_size):
                etag = reply.headers.get("X-Linked-Etag") or redirect.etag
                return etag.strip('"') if re.fullmatch('"?[0-9a-f]{64}"?', etag) else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error
            # Longer than the file: a part of another one
            if getattr(error, "code", None) == 416 and size:
                part.unlink()
                before = -1
    raise ValueError(
        f"cannot download {url} ({reason}): give a mirror with --data_url=, or use "
        "--data=python or a text file, which need no network"
    )


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Hugging Face names the sha256 in its own answer, then sends us on to a storage server that
    does not."""

    etag = ""

    def redirect_request(self, request, reply, code, message, headers, new_url):
        self.etag = headers.get("X-Linked-Etag") or self.etag
        return super().redirect_request(request, reply, code, message, headers, new_url)


def hexdigest(content) -> str:
    return hashlib.sha256(content).hexdigest()


def progress(title: str, total: int | None, start: int = 0):
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    return tqdm(desc=title, total=total, initial=start, unit="B", unit_scale=True, disable=hidden)

"""A mark that one of a host's processes makes, so that they need no store to agree on who tells."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

STALE = 60.0  # s after which a mark that nobody has kept counts for nothing


class HostMark:
    """A file that is there while something lasts.

    Processes of one user on one host, or in one container, share it; so does whoever else shares
    the folder.  Where the folder can't be written, each process tells for itself.

    Args:
        folder: where it lies.
        name: what tells it from others.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.store-lost"

    def take(self, since: int) -> bool:
        """Make it, and note since when (s) it lasts; False if another process has made it."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if time.time() - self._path.stat().st_mtime > STALE:
                self._path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            return True
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            handle = os.open(self._path, flags, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(str(since))
        except FileExistsError:
            return False
        except OSError:
            pass
        return True

    def keep(self) -> None:
        """It still lasts."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def give_back(self, since: int) -> int | None:
        """Take it away, and say since when it has lasted (if that can't be read: ``since``); None
        if another process has taken it away."""
        try:
            noted = self._path.read_text()
            self._path.unlink()
        except FileNotFoundError:
            return None
        except OSError:
            return since
        return int(noted) if re.fullmatch(r"[0-9]{1,12}", noted) else since

"""The lock of a path: only one live run at a time saves there."""

from __future__ import annotations

import contextlib
import os
import platform

from gdopt._errors import InputError

try:
    import fcntl
except ImportError:  # On Windows, a second run at the same path goes unnoticed.
    fcntl = None


def acquire(base: str) -> int:
    """Take the lock of a path, which ends with this process, however that ends."""
    lock = f"{base}.lock"
    while True:
        try:
            # A link in its place would lead to a file that is then emptied.
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise InputError(
                f"checkpoint path={base!r} cannot be used: {lock!r} cannot be written, {error.strerror}. Pass another "
                "path."
            ) from error
        try:
            _flock(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "not known which"
            os.close(descriptor)
            raise InputError(
                f"checkpoint path={base!r} is in use by a live run ({holder}). Wait for its end, or pass another path."
            ) from None
        with contextlib.suppress(OSError):  # Its last holder may have removed the file after it was opened here.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    return descriptor


def _flock(descriptor: int) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # The file system has no locks.
            pass


def holder_of(base: str) -> str:
    """Return the holder of a path's lock, as its file reports it; "" if there is none."""
    try:
        with open(f"{base}.lock", encoding="utf-8", errors="replace") as stream:
            return stream.read(200)
    except OSError:
        return ""


def release(base: str, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{base}.lock")
    os.close(descriptor)

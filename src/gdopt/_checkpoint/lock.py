"""The lock of a path: only one live run at a time saves there."""

from __future__ import annotations

import contextlib
import os
import platform
import stat

from gdopt._errors import InputError

try:
    import fcntl
except ImportError:  # On Windows, a second run at the same path goes unnoticed.
    fcntl = None

_OURS = "gdopt lock of "  # the beginning of a lock file; a file with any other text is somebody else's
_LONGEST = 200  # bytes
# A link in the place of the lock would lead to another file, and opening a pipe there would block.
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def lock_of(base: str) -> str:
    """Return the lock file of a path. Its name is gdopt's own: tools name theirs ``uv.lock`` or ``poetry.lock``."""
    return f"{base}.gdopt.lock"


def acquire(base: str) -> int:
    """Take the lock of a path, which ends with this process, however that ends."""
    file = lock_of(base)
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | _CAREFULLY, 0o666)
        except OSError as error:
            raise InputError(
                f"checkpoint path={base!r} cannot be used: {file!r} cannot be written, {error.strerror}. Pass another "
                "path."
            ) from error
        try:
            _flock(descriptor)
            if not _is_ours(descriptor):
                raise InputError(
                    f"checkpoint path={base!r} cannot be used: {file!r} is not a lock of gdopt. Move it away, or pass "
                    "another path."
                )
        except BlockingIOError:
            holder = _holder(descriptor) or "not known which"
            os.close(descriptor)
            raise InputError(
                f"checkpoint path={base!r} is in use by a live run ({holder}). Wait for its end, or pass another path."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(file, descriptor):  # Its last holder may have removed the file after it was opened here.
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{_OURS}process {os.getpid()} on {platform.node()}".encode()[:_LONGEST])
    return descriptor


def _flock(descriptor: int) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # The file system has no locks.
            pass


def _is_at(file: str, descriptor: int) -> bool:
    """Tell whether an open file still has its name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    return False


def _is_ours(descriptor: int) -> bool:
    """Tell whether an open file is a lock: a regular file of one name that is empty, or begins as a lock does."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    text = _text(descriptor)
    return not text or text.startswith(_OURS)


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, _LONGEST).decode(errors="replace")


def _holder(descriptor: int) -> str:
    return _text(descriptor).removeprefix(_OURS)


def holder_of(base: str) -> str:
    """Return the holder of a path's lock, as its file reports it; "" if there is none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(lock_of(base), os.O_RDONLY | _CAREFULLY)
        try:
            return _holder(descriptor)
        finally:
            os.close(descriptor)
    return ""


def release(base: str, descriptor: int) -> None:
    """Give the lock back, and remove its file if it is still this lock."""
    file = lock_of(base)
    with contextlib.suppress(OSError):
        if _is_at(file, descriptor) and _is_ours(descriptor):
            os.unlink(file)
    os.close(descriptor)

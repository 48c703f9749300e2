"""Files that appear complete or not at all."""

import contextlib
import os
import secrets

from blogkeras.arguments import check_path


@contextlib.contextmanager
def replace_file(path):
    """A path to write to, which becomes `path` where no error occurs.

    A program that is stopped while it writes leaves the old file as it was.
    Missing folders are made; the new file has the mode that the umask gives.

    Args:
        path: String or path-like object.

    Yields:
        Path of an empty file in the same folder, with the same ending.

    Example:

    >>> with replace_file("notes/today.txt") as part:
    ...     pathlib.Path(part).write_text("complete")
    """
    # A link is followed: the file that it names is replaced, not the link.
    path = os.path.realpath(check_path("path", path))
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # In the same folder, because a file can be renamed only within its file
    # system.
    part = os.path.join(
        folder, f".{secrets.token_hex(8)}{os.path.splitext(name)[1]}"
    )
    # `tempfile` would keep its file from all other users.
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)

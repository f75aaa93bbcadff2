"""Files that appear whole or not at all, and one clear line when the disk is full."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastsae.errors import FastsaeError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException | None) -> bool:
    """True if the error, or one that caused it, says that the disk (or the quota) is full.

    safetensors reports it as text: its errors carry no errno.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if "os error 28" in str(error) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def disk_errors(what: str, path: Path, hint: str = "") -> Iterator[None]:
    """A full disk or an unwritable place inside the block becomes one line naming it."""
    try:
        yield
    except FastsaeError:
        raise
    except Exception as error:
        if is_disk_full(error):
            reason = "the disk is full; free some space and run the same command again"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        raise FastsaeError(f"output: cannot write {what} in {path}: {reason}{hint}") from error


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(draft: Path, final: Path) -> None:
    """Make `draft` durable and rename it to `final`, which it replaces if it exists."""
    for file in draft.iterdir():
        sync(file)
    sync(draft)
    if final.exists():
        shutil.rmtree(final)
    os.rename(draft, final)
    sync(final.parent)


def write_json(path: Path, record: dict) -> None:
    """Replace a JSON file in one step."""
    draft = path.with_name(path.name + ".partial")
    with open(draft, "w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)

"""Writing so that nothing half-written is ever seen: beside the target, to the disk, then into its place."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from laco.errors import LacoError

# What saved models and compressors consist of; an existing directory with anything else is not replaced.
OUR_SUFFIXES = frozenset({".json", ".jinja", ".jsonl", ".md", ".model", ".safetensors", ".txt"})
# One of these makes a directory a saved model or compressor; what has neither is not replaced unless it is empty.
OUR_MARKS = ("config.json", "compressor_config.json")
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Writes a directory as a whole: gives a new one to write into, which takes the place of `path` at the
    end.

    After an exception, a full disk or a kill, `path` is as it was. A kill may leave the unfinished directory
    behind, hidden beside `path`.

    Raises:
        LacoError: the disk is full or may not be written, `path` is a file, or a directory that holds no saved
            model, or other things beside it. Nothing has changed then.
    """
    path = Path(path).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise LacoError(f"{path} is a file; give the name of a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield beside
            refuse_foreign(path, [entry.name for entry in beside.iterdir()])
            beside.chmod(0o777 & ~current_umask())
            sync(beside)
            put_in_place(beside, path)
            sync_entry(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LacoError(f"cannot write {path}: {reason}; nothing has changed") from error


@contextmanager
def alone_in(directory: str | Path) -> Iterator[None]:
    """While no other process does the same, which would write to the same files; `LacoError` if one does."""
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held: AbstractContextManager[object] = FileLock(directory / ".lock").acquire(timeout=0)
    except NotImplementedError:  # a file system without locks
        held = nullcontext()
    except Timeout:
        raise LacoError(f"another process is at work in {directory}; wait for it, or write elsewhere") from None
    except OSError as error:
        raise LacoError(f"cannot write {directory}: {error.strerror}") from error
    with held:
        yield


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file as a whole; after an error or a kill `path` is as it was. Raises as above."""
    path = Path(path).absolute()
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o666 & ~current_umask())
            os.replace(beside, path)
            sync_entry(path.parent)
        finally:
            Path(beside).unlink(missing_ok=True)
    except OSError as error:
        raise LacoError(f"cannot write {path}: {error.strerror or error}; nothing has changed") from error


def refuse_foreign(old: Path, new: Collection[str] = ()) -> None:
    """A directory is replaced only if nothing but a saved model can be lost by it; `new` are names that come again."""
    there = sorted(old.iterdir()) if old.exists() else []
    for entry in there:
        if entry.name not in new and (entry.is_dir() or entry.suffix not in OUR_SUFFIXES):
            raise LacoError(f"{old} holds other things, such as {entry.name}; give a new or empty directory")
    if there and not holds_model(old):
        raise LacoError(f"{old} holds no saved model, but {there[0].name}; give a new or empty directory")


def holds_model(directory: Path) -> bool:
    """Whether a model or a compressor was saved there."""
    return any((directory / name).is_file() for name in OUR_MARKS)


def refuse_source(output: str | Path, source: str | Path) -> None:
    """`LacoError` if what is written would replace the very directory that it is made from, by whatever name."""
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise LacoError(f"{output} is the model that is read, which would be lost; give another output")


def put_in_place(new: Path, path: Path) -> None:
    """Moves a directory to `path`; what was there is afterwards at `new`. One step where the system can."""
    if not path.exists():
        os.rename(new, path)
    elif not exchange(new, path):
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.rename(path, old)
        os.rename(new, path)
        os.rename(old, new)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (renameat2 of Linux); False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def sync(directory: Path) -> None:
    """Brings everything below a directory to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync_entry(Path(root) / name)
        sync_entry(Path(root))


def sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Directories and files that are written as a whole or not at all."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from laco import LacoError
from laco.files import alone_in, atomic_directory, exchange, refuse_source, write_file


def write(directory: Path, tag: str, count: int = 20) -> None:
    with atomic_directory(directory) as beside:
        for name in ["config.json", *(f"{index}.txt" for index in range(1, count))]:
            (beside / name).write_text(tag)


def tags(directory: Path) -> set[str]:
    return {entry.read_text() for entry in directory.iterdir()}


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "a" / "b", "old", count=30)
    write(tmp_path / "a" / "b", "new")
    assert len(list((tmp_path / "a" / "b").iterdir())) == 20
    assert tags(tmp_path / "a" / "b") == {"new"}
    assert os.listdir(tmp_path / "a") == ["b"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_what_was_there(tmp_path):
    write(tmp_path / "d", "old")

    def interrupted() -> None:
        with atomic_directory(tmp_path / "d") as beside:
            (beside / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tags(tmp_path / "d") == {"old"}
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("foreign", ["notes.py", "checkpoint-500"])
def test_a_directory_with_other_things_is_not_replaced(foreign, tmp_path):
    write(tmp_path / "d", "old")
    if "." in foreign:
        (tmp_path / "d" / foreign).touch()
    else:
        (tmp_path / "d" / foreign).mkdir()
    with pytest.raises(LacoError, match=f"holds other things, such as {foreign}"):
        write(tmp_path / "d", "new")
    assert (tmp_path / "d" / "config.json").read_text() == "old"


def test_only_models_and_empty_directories_are_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", "new")
    (tmp_path / "work").mkdir()
    for name in ("thesis.md", "data.json"):
        (tmp_path / "work" / name).write_text("precious")
    with pytest.raises(LacoError, match=r"work holds no saved model, but data\.json; give a new or empty directory"):
        write(tmp_path / "work", "new")
    assert tags(tmp_path / "work") == {"precious"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "compressor_config.json").write_text("old")
    write(tmp_path / "adapter", "new")
    assert tags(tmp_path / "adapter") == {"new"}


def test_what_is_read_is_not_what_is_written(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for one, other in (("model", "model"), ("link", "model"), ("model", "link"), ("model/../link", "model")):
        with pytest.raises(LacoError, match="is the model that is read, which would be lost"):
            refuse_source(tmp_path / one, tmp_path / other)
    refuse_source(tmp_path / "new", tmp_path / "model")
    refuse_source(tmp_path / "model", "on-the/hub")


def test_a_file_is_no_directory_and_the_reverse(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(LacoError, match="is a file"):
        write(tmp_path / "file", "new")
    (tmp_path / "directory").mkdir()
    with pytest.raises(LacoError, match="cannot write"):
        write_file(tmp_path / "directory", "new")
    with pytest.raises(LacoError, match="cannot write"):
        write_file(tmp_path / "file" / "below", "new")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_file(tmp_path / "a" / "f.json", "old")
    write_file(tmp_path / "a" / "f.json", b"new")
    assert (tmp_path / "a" / "f.json").read_text() == "new"
    assert os.listdir(tmp_path / "a") == ["f.json"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a" / "f.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_on_and_on(directory: Path) -> None:
    while True:
        write(directory, "one")
        write(directory, "two")


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """A process of its own writes the directory again and again, until it is killed."""
    process = multiprocessing.get_context("fork").Process(target=write_on_and_on, args=(directory,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def test_a_kill_at_any_moment_leaves_one_whole_directory(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot swap two names in one step")
    write(tmp_path / "d", "one")
    with writing(tmp_path / "d"):
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert (tmp_path / "d").exists()
    for attempt in range(10):
        with writing(tmp_path / "d"):
            time.sleep(0.02 + 0.0037 * attempt)
        assert len(list((tmp_path / "d").iterdir())) == 20
        assert len(tags(tmp_path / "d")) == 1


def test_one_process_at_a_time(tmp_path):
    wanted = f"another process is at work in {tmp_path / 'd'}"
    with alone_in(tmp_path / "d"), pytest.raises(LacoError, match=wanted), alone_in(tmp_path / "d"):
        pytest.fail("two at work")
    with alone_in(tmp_path / "d"), alone_in(tmp_path / "e"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(LacoError, match="cannot write"), alone_in(tmp_path / "file"):
        pass

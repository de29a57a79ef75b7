"""A file is what it was, or all of what is written; never a part."""

import errno
import os
from pathlib import Path

import pytest

from covrl_lab import RunConfig
from covrl_lab.files import write_whole


def test_content_is_written_as_given(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "π\n")
    assert path.read_bytes() == b"\xcf\x80\n"
    write_whole(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["write", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_the_old_content_and_nothing_beside_it(tmp_path, monkeypatch, place, error):
    path, working = tmp_path / "config.json", Path.write_bytes
    config = RunConfig(seed=1)
    config.save(path)

    def half(self, content):
        working(self, content[: len(content) // 2])
        if place == "write":
            raise error

    def no_rename(source, target):
        assert Path(source).parent == path.parent and path.read_text()
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(type(error)):
        RunConfig(seed=2).save(path)
    assert RunConfig.load(path) == config and list(tmp_path.iterdir()) == [path]


def test_processes_do_not_write_into_each_others_files(tmp_path, monkeypatch):
    """A second process writes the same file between a first one's write and its rename."""
    path, replace, seen = tmp_path / "done.json", os.replace, []

    def interleaved(source, target):
        seen.append(source)
        if len(seen) == 1:
            monkeypatch.setattr(os, "getpid", lambda: 0)
            write_whole(path, "second")
            assert path.read_text() == "second"
        replace(source, target)

    monkeypatch.setattr(os, "replace", interleaved)
    write_whole(path, "first")
    assert path.read_text() == "first" and len(set(seen)) == 2 and list(tmp_path.iterdir()) == [path]

"""File names and writing: never overwritten, never half written, whatever the prompt."""

from __future__ import annotations

import errno
import os
import stat
import threading
from datetime import datetime
from pathlib import Path

import pytest

from multimodal_gen.errors import InvalidValue
from multimodal_gen.media.files import file_name, slug, write_exactly, write_new

pytestmark = [pytest.mark.unit]

NOON = datetime(2026, 3, 4, 12, 5, 9)


def test_name_has_time_seed_and_slug():
    assert file_name(7, "A red apple, on blue!", "png", NOON) == "20260304-120509_7_a-red-apple-on-blue.png"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("a\0b\nc", "a-b-c"),
        ("  ", "image"),
        ("<script>", "script"),
        ("\u202eabc", "abc"),
        ("\ud800", "image"),
        ("....", "image"),
        ("x" * 500, "x" * 40),
        ("りんご 青", "りんご-青"),
        ("Cafe\u0301", "café"),
    ],
)
def test_slug_keeps_letters_and_digits_only(prompt, expected):
    assert slug(prompt) == expected


def test_name_fits_a_file_system_for_wide_letters():
    name = file_name(2**63 - 1, "\U00020000" * 100, "webp", NOON)
    assert len(name.encode()) <= 200


def test_taken_names_get_numbers_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "deep" / "outputs"
    paths = [write_new(folder, "a.png", str(i).encode()) for i in range(3)]
    assert [p.name for p in paths] == ["a.png", "a_1.png", "a_2.png"]
    assert [p.read_bytes() for p in paths] == [b"0", b"1", b"2"]
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a_1.png", "a_2.png"]  # no temporary files


def test_files_have_the_permissions_of_ordinary_files(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    written = write_new(tmp_path, "a.png", b"x")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_exact_name_is_written_once(tmp_path):
    path = tmp_path / "new" / "x.png"
    assert write_exactly(path, b"one") == path
    with pytest.raises(InvalidValue, match=r"x\.png exists already"):
        write_exactly(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_dangling_link_is_not_followed(tmp_path):
    link = tmp_path / "x.png"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidValue):
        write_exactly(link, b"data")
    assert not (tmp_path / "elsewhere").exists()


def test_threads_racing_for_one_name_lose_nothing(tmp_path):
    threads = [threading.Thread(target=write_new, args=(tmp_path, "a.png", bytes([i]))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.read_bytes()[0] for p in tmp_path.iterdir()) == list(range(16))


def test_a_folder_that_is_a_file_is_an_os_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write_new(tmp_path / "file", "a.png", b"x")


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(_source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "link", refuse)
    paths = [write_new(tmp_path, "a.png", str(i).encode()) for i in range(2)]
    assert [(p.name, p.read_bytes()) for p in paths] == [("a.png", b"0"), ("a_1.png", b"1")]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_error_once_the_file_is_there(tmp_path, monkeypatch, call):
    """FUSE and CIFS answer EINVAL, a write-only folder EACCES."""
    real = {"open": os.open, "fsync": os.fsync}[call]
    refused: list[str] = []

    def refuse_folders(what, *rest, **options):
        if os.path.isdir(f"/proc/self/fd/{what}" if call == "fsync" else what):
            refused.append(call)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(what, *rest, **options)

    monkeypatch.setattr(os, call, refuse_folders)
    assert write_new(tmp_path, "a.png", b"x").read_bytes() == b"x"
    assert write_exactly(tmp_path / "b.png", b"y").read_bytes() == b"y"
    assert refused == [call, call]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path, "a.png", b"x")
    assert list(tmp_path.iterdir()) == []

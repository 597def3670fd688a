"""Lists of inputs, names of outputs, files written whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgtool import files
from imgtool.errors import ImgtoolError
from imgtool.files import Item

SUFFIXES = {".jpg", ".png", ".cr2"}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(call, *arguments) -> ImgtoolError:
    with pytest.raises(ImgtoolError) as caught:
        call(*arguments)
    return caught.value


# Writing


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write(tmp_path / "a.png", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == mode


def test_write_replaces_and_makes_folders(tmp_path):
    target = tmp_path / "new" / "sub" / "a.png"
    files.write(target, b"one")
    files.write(target, b"two")
    assert target.read_bytes() == b"two"
    assert left(target.parent) == ["a.png"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, ValueError])
def test_nothing_is_left_when_the_block_fails(tmp_path, fault):
    target = touch(tmp_path, "a.png") / "a.png"

    def fail():
        with files.atomic(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".png"
            assert temporary.name.startswith(".")
            temporary.write_bytes(b"half")
            raise fault

    with pytest.raises(fault):
        fail()
    assert target.read_bytes() == b"x"
    assert left(tmp_path) == ["a.png"]


def test_two_writers_do_not_meet(tmp_path):
    with files.atomic(tmp_path / "a") as one, files.atomic(tmp_path / "a") as two:
        assert one.name.startswith(f".imgtool-{os.getpid()}-")  # whoever kills it knows whose it was
        assert one != two


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only file system"),
    ],
)
@pytest.mark.parametrize("where", ["open", "replace"])
def test_faults_of_the_system(tmp_path, monkeypatch, number, words, where):
    def fail(*arguments, **_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, fail)
    fault = refused(files.write, tmp_path / "a.png", b"data")
    monkeypatch.undo()
    assert fault.what == f"cannot write {tmp_path / 'a.png'}: {words}"
    assert fault.hint
    assert fault.code == 1
    assert left(tmp_path) == []


def test_disk_full_in_the_middle(tmp_path, monkeypatch):
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
    fault = refused(files.write, tmp_path / "a.png", b"data")
    assert "no space left on device" in fault.what
    assert "free some space" in fault.hint
    assert left(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the shell are POSIX's")
def test_real_limit_of_the_system(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from imgtool import files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write(Path(sys.argv[1]), bytes(100_000))\n"
        "except files.ImgtoolError as fault: print(fault.what)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "file too large" in done.stdout
    assert left(tmp_path) == []


def test_a_file_is_no_folder(tmp_path):
    touch(tmp_path, "file")
    fault = refused(files.write, tmp_path / "file" / "a.png", b"")
    assert str(tmp_path / "file" / "a.png") in fault.what
    assert "not a folder" in fault.hint


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.png").mkdir()
    assert "is a directory" in refused(files.write, tmp_path / "a.png", b"").what
    assert left(tmp_path) == ["a.png"]


def test_longest_and_longer_name(tmp_path):
    files.write(tmp_path / ("a" * 251 + ".png"), b"")
    fault = refused(files.write, tmp_path / ("a" * 300 + ".png"), b"")
    assert "name too long" in fault.what
    assert "shorter" in fault.hint


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are POSIX's")
def test_special_files_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(files.write, tmp_path / "pipe", b"").what
    assert (tmp_path / "pipe").is_fifo()


def test_links_are_followed(tmp_path):
    touch(tmp_path, "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    files.write(tmp_path / "link.png", b"new")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"


def test_faults_of_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic(tmp_path / "a.png"):
        (tmp_path / "other").read_bytes()
    assert left(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_permissions_of_the_system(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "permission denied" in refused(files.read, tmp_path / "a.png").what
    tmp_path.chmod(0o500)
    try:
        assert "permission denied" in refused(files.write, tmp_path / "b.png", b"").what
    finally:
        tmp_path.chmod(0o700)


def test_read(tmp_path):
    assert files.read(touch(tmp_path, "a") / "a") == b"x"
    assert refused(files.read, tmp_path / "b").code == 2
    assert "is a directory" in refused(files.read, tmp_path).what
    assert "not a directory" in refused(files.read, tmp_path / "a" / "b").what


def test_existing_output(tmp_path):
    path = touch(tmp_path, "a.png") / "a.png"
    fault = refused(files.check_new, path, False)
    assert (fault.code, fault.what) == (1, f"{path} exists")
    assert "--force" in fault.hint
    assert "--skip-existing" in fault.hint
    files.check_new(path, True)
    files.check_new(tmp_path / "b.png", False)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("IMGTOOL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == Path("/home/someone/.cache/imgtool")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert files.cache_folder() == Path("/var/xdg/imgtool")
    monkeypatch.setenv("IMGTOOL_CACHE", "~/own")
    assert files.cache_folder() == Path("/home/someone/own")


# Inputs


def names(items: list[Item]) -> list[str]:
    return [item.relative.as_posix() for item in items]


def test_folder_is_searched_and_sorted(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", ".hidden.png", "sub/c.cr2", "sub/.git/d.png", "A/z.jpg")
    items = files.expand([str(tmp_path)], SUFFIXES)
    assert names(items) == ["A/z.jpg", "a.png", "b.JPG", "sub/c.cr2"]
    assert items[3].source == tmp_path / "sub" / "c.cr2"
    assert all(item.folder for item in items)


def test_hidden_folder_named_in_full(tmp_path):
    touch(tmp_path, ".photos/a.png")
    assert names(files.expand([str(tmp_path / ".photos")], SUFFIXES)) == ["a.png"]


def test_named_file_of_any_suffix(tmp_path):
    path = touch(tmp_path, "photo.xyz") / "photo.xyz"
    assert files.expand([str(path)], SUFFIXES) == [Item(path, Path("photo.xyz"))]


def test_globs(tmp_path):
    touch(tmp_path, "x/a.png", "x/b.jpg", "x/y/c.png", "x/d.txt")
    assert names(files.expand([f"{tmp_path}/x/*"], SUFFIXES)) == ["a.png", "b.jpg"]
    assert names(files.expand([f"{tmp_path}/**/*.png"], SUFFIXES)) == ["x/a.png", "x/y/c.png"]
    assert names(files.expand([f"{tmp_path}/*/[ab].*"], SUFFIXES)) == ["x/a.png", "x/b.jpg"]


def test_name_with_glob_characters(tmp_path):
    touch(tmp_path, "a[1].png", "a1.png")
    assert names(files.expand([str(tmp_path / "a[1].png")], SUFFIXES)) == ["a[1].png"]


def test_relative_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "a.png", "b.png"))
    assert files.expand(["*.png"], SUFFIXES)[1] == Item(Path("b.png"), Path("b.png"), folder=True)


def test_duplicates_and_order(tmp_path):
    touch(tmp_path, "b.png", "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    words = [str(tmp_path / "b.png"), str(tmp_path), f"{tmp_path}/../{tmp_path.name}/a.png", "-", "-"]
    items = files.expand(words, SUFFIXES)
    assert names(items) == ["b.png", "a.png", "stdin"]
    assert items[2].source is None
    assert items[2].name == "-"


def test_own_outputs_are_left_out(tmp_path):
    touch(tmp_path, "a.png", "a-deblur.png", "b-deblur.jpg", "sub/a-deblur.png")
    found = names(files.expand([str(tmp_path)], SUFFIXES, "deblur"))
    assert found == ["a.png", "b-deblur.jpg", "sub/a-deblur.png"]
    named = str(tmp_path / "a-deblur.png")
    assert len(files.expand([str(tmp_path / "a.png"), named], SUFFIXES, "deblur")) == 2
    assert len(files.expand([str(tmp_path)], SUFFIXES)) == 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("none.png", "no such file"),
        ("none*.png", "matches"),
        ("empty", "no photo in the folder"),
        ("", "no such"),
    ],
)
def test_nothing_found(tmp_path, monkeypatch, word, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(touch(tmp_path, "empty/notes.txt"))
    fault = refused(files.expand, [word], SUFFIXES)
    assert fault.code == 2
    assert message in fault.what
    assert fault.hint


# Outputs


def item(name: str, folder: bool = False, root: str = "in") -> Item:
    return Item(Path(root, name), Path(name) if folder else Path(Path(name).name), folder)


def places(items, out):
    return [
        None if path is None else path.as_posix()
        for path in files.outputs(items, "deblur", out, lambda item: item.relative.suffix[1:] or "png")
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    (tmp_path / "plain").touch()
    return tmp_path


STDIN = Item(None, Path("stdin"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("items", "out", "expected"),
    [
        ([item("a.jpg")], None, ["in/a-deblur.jpg"]),
        ([item("sub/a.jpg", True)], None, ["in/sub/a-deblur.jpg"]),
        ([item("a.jpg")], "b.png", ["b.png"]),
        ([item("a.jpg")], "b", ["b.jpg"]),
        ([item("a.jpg")], "new/", ["new/a.jpg"]),
        ([item("a.jpg")], "existing", ["existing/a.jpg"]),
        ([item("a.jpg")], "plain", ["plain"]),
        ([item("a.jpg")], "-", [None]),
        ([STDIN], None, [None]),
        ([STDIN], "-", [None]),
        ([STDIN], "b.jpg", ["b.jpg"]),
        ([STDIN], "new/", ["new/stdin.png"]),
        ([STDIN, item("a.jpg")], None, [None, "in/a-deblur.jpg"]),
        ([item("a.jpg"), item("b.png")], "new", ["new/a.jpg", "new/b.png"]),
        ([item("sub/a.jpg", True)], "new", ["new/sub/a.jpg"]),
        ([item("a.b.jpg"), item("x/a.jpg", True)], "new/", ["new/a.b.jpg", "new/x/a.jpg"]),
        ([item("a/p.jpg", True), item("b/p.jpg", True)], "new", ["new/a/p.jpg", "new/b/p.jpg"]),
    ],
)
def test_outputs(items, out, expected):
    assert places(items, out) == expected


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("items", "out", "said"),
    [
        ([item("a.jpg"), item("b.jpg")], "c.jpg", ["c.jpg"]),
        ([item("a.jpg"), item("b.jpg")], "plain", ["plain"]),
        ([item("a.jpg", True)], "c.jpg", ["c.jpg"]),
        ([item("a.jpg"), item("b.jpg")], "-", ["standard output"]),
        ([item("a.jpg")], "", ["empty"]),
        ([item("x/a.jpg"), item("y/a.jpg")], "new/", ["in/x/a.jpg", "in/y/a.jpg", "new/a.jpg"]),
        ([item("a.jpg")], "in/a.jpg", ["in/a.jpg"]),
        ([item("a.jpg"), item("b.jpg")], "in/", ["in/a.jpg"]),
        ([item("a.jpg"), item("a-deblur.jpg")], None, ["in/a.jpg", "in/a-deblur.jpg"]),
    ],
)
def test_outputs_refused(items, out, said):
    fault = refused(places, items, out)
    assert fault.code == 2
    assert all(words in fault.what for words in said)
    assert fault.hint


def test_files_is_light():
    code = (
        "import sys, imgtool.files; print([m for m in ('numpy', 'cv2', 'PIL', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

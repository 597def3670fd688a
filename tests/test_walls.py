"""The walls of the house: who may import whom, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "imgtool"
FILES = sorted(PACKAGE.rglob("*.py"))
VERBS = {f"imgtool.{verb}" for verb in ("train", "infer", "export", "bench", "data")}
LIGHT = {
    f"{name}.py"
    for name in ("__init__", "__main__", "cli", "console", "engine", "errors", "files", "flags", "settings")
}
HEAVY = set(
    "torch torchvision numpy cv2 PIL imageio rawpy tifffile matplotlib jinja2 rich safetensors".split()
)


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name of a file, which for ``__init__.py`` is that of its folder."""
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def names(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the full name of everything that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = ".".join([*package.split(".")[: 1 - node.level or None], base]).rstrip(".")
        yield from (f"{base}.{alias.name}" for alias in node.names)


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top: bool = False, package: Path = PACKAGE) -> set[str]:
    """Return what a file imports when it runs; ``top`` leaves out what its functions import."""
    module = module_of(path, package)
    parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [parsed(path)]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        found.update(names(node, parent))
        if for_types_only(node) or (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        waiting.extend(ast.iter_child_nodes(node))
    return found


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def each(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def engine_of(path: Path) -> str:
    """Return the dotted name of the engine whose folder a file lies in, however deep; "" for no engine."""
    parts = path.relative_to(PACKAGE).parts
    return f"imgtool.engines.{parts[1]}" if parts[0] == "engines" and len(parts) > 2 else ""


@pytest.mark.parametrize("path", FILES, ids=each)
def test_only_the_door_knows_the_command_line(path: Path) -> None:
    for name in imports(path):
        if within(name, "typer"):
            assert path.name == "cli.py", f"{path} imports {name}"
        if within(name, "rich"):
            assert path.name == "console.py", f"{path} imports {name}"
        if within(name, "imgtool.cli"):
            assert path.name == "__main__.py", f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if not engine_of(p)], ids=each)
def test_nothing_outside_imports_a_concrete_engine(path: Path) -> None:
    engines = tuple(
        f"imgtool.engines.{folder.name}" for folder in (PACKAGE / "engines").iterdir() if folder.is_dir()
    )
    assert not [name for name in imports(path) if within(name, *engines)]


@pytest.mark.parametrize("path", [p for p in FILES if engine_of(p)], ids=each)
def test_an_engine_knows_no_verb_no_console_and_no_sibling(path: Path) -> None:
    own = engine_of(path)
    for name in imports(path):
        assert not within(name, "imgtool.console", "imgtool.flags", *VERBS), f"{path} imports {name}"
        assert within(name, own) or not within(name, "imgtool.engines"), f"{path} imports {name}"


LIGHT_FILES = [
    path
    for path in FILES
    if each(path) in LIGHT or ("engines" in path.parts and path.stem in ("settings", "__init__"))
]


@pytest.mark.parametrize("path", LIGHT_FILES, ids=each)
def test_light_modules_import_nothing_heavy_at_the_top(path: Path) -> None:
    assert not [name for name in imports(path, top=True) if name.split(".")[0] in HEAVY]


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    package = tmp_path / "imgtool"
    path = package / "engines" / "awb" / "engine.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn\n"
        "from imgtool import train\nfrom ..deblur import model\n"
        "if TYPE_CHECKING:\n    import rich\ndef f():\n    import cv2\n"
    )
    seen = {"typing.TYPE_CHECKING", "torch.nn", "imgtool.train", "imgtool.engines.deblur.model"}
    assert imports(path, top=True, package=package) == seen
    assert imports(path, package=package) == seen | {"cv2"}

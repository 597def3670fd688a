"""The examples of docs/export.md run as they stand, and give what the package gives."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from imgtool import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```sh\n(imgtool export [^\n]*)\n```\n\n```python\n(.*?)```", PAGE, re.S)
"""A command that exports, and the program that runs its file."""

MADE = {
    "deblur --to onnx": ("sharp-onnx.png", "infer deblur examples/blurred.jpg"),
    "filter --weights bilateral --to tflite --size 576x576": (
        "smooth-tflite.png", "infer filter examples/sharp.jpg --target bilateral",
    ),
    "filter --weights tv --to openvino": (
        "smooth-openvino.png", "infer filter examples/sharp.jpg --target tv",
    ),
    "isp --to pt2": ("night-pt2.png", "infer isp examples/night.dng --noise 6e-3,1e-6 --depth 8"),
}  # fmt: skip
"""What a program writes, and the command that writes the same."""

NEEDS = {"tflite": "litert_torch", "openvino": "openvino"}


def words(command: str) -> str:
    return command.removeprefix("imgtool export ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(program: str, folder: Path) -> None:
    child = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_every_format_has_an_example() -> None:
    kinds = [re.search(r"--to (\S+)", command).group(1) for command, _ in EXAMPLES]  # type: ignore[union-attr]
    assert kinds == ["onnx", "tflite", "openvino", "pt2", "npz"]
    assert {words(command) for command, _ in EXAMPLES[:4]} == set(MADE)
    assert not any("imgtool" in program for _, program in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "program"), EXAMPLES[:4], ids=[words(command) for command, _ in EXAMPLES[:4]]
)
def test_an_example_gives_what_infer_gives(
    command: str, program: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, module in NEEDS.items():
        if kind in command and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.chdir(folder)
    assert cli.run([*command.split()[1:], "--largest", "96x160"]) == 0
    run(program, folder)
    name, same = MADE[words(command)]
    ours = folder / f"ours-{name}"
    assert cli.run([*same.split(), "-o", str(ours)]) == 0
    one, two = (
        cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED).astype(int) for path in (folder / name, ours)
    )
    assert one.shape == two.shape
    assert np.abs(one - two).max() <= 1


def test_the_network_of_the_page_is_the_packages_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgtool.runtime import open as opened

    monkeypatch.chdir(folder)
    assert cli.run(["export", "awb", "--to", "npz", "-o", "awb-hist.npz"]) == 0
    space: dict[str, object] = {}
    exec(EXAMPLES[4][1], space)  # the page's own text
    rng = np.random.default_rng(3)
    given = (
        rng.random((3, 32, 32)) * 3, rng.uniform(-1.5, 1.5, (360, 2)), rng.random((360, 3)), -rng.random(360)
    )  # fmt: skip
    right = opened(ROOT / "imgtool" / "weights" / "awb-hist.onnx")(
        *(each[None].astype(np.float32) for each in given)
    )
    found = space["log_posterior"](*given)  # type: ignore[operator]
    assert np.abs(found - right[0][0]).max() < 1e-4

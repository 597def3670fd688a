"""Archives of torch: what they compute, and what they hold."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import toys

from imgtool.export import pt2


def loaded(path: Path) -> tuple[torch.nn.Module, dict]:
    extra = {"imgtool.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert program.example_inputs is None
    return program.module(), json.loads(extra["imgtool.json"])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a picture's network, with free sizes."""
    path = tmp_path_factory.mktemp("pt2") / "picture.pt2"
    pt2.write(toys.order(toys.picture()), path)
    return path


@pytest.mark.slow
def test_an_archive_equals_the_network_in_every_size(archive: Path) -> None:
    run, about = loaded(archive)
    port = toys.picture()
    assert about == toys.ABOUT
    for batch, height, width in ((1, 4, 4), (3, 22, 10)):
        inputs = toys.made(port.inputs, {"batch": batch, "height": height, "width": width})
        found = run(*map(torch.from_numpy, inputs)).detach().numpy()
        assert abs(found - toys.outputs(port, inputs)[0]).max() < 1e-5


@pytest.mark.slow
def test_an_archive_says_nothing_of_where_it_was_made(archive: Path) -> None:
    with zipfile.ZipFile(archive) as parts:
        content = b"".join(parts.read(name) for name in parts.namelist())
        assert all(name.startswith("archive/") for name in parts.namelist())
    for word in (b".py", b"/work", b"/home", b"toys", str(Path.cwd()).encode()):
        assert word not in content


def test_half_precision_is_inside_alone_and_the_bytes_are_always_the_same(tmp_path: Path) -> None:
    port, paths = toys.ends(), [tmp_path / "x.pt2", tmp_path / "other.pt2"]
    for path in paths:
        facts = pt2.write(toys.order(port, precision="fp16"), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert facts["operators"]["aten.conv2d.default"] == 1
    assert "aten._assert_tensor_metadata.default" not in facts["operators"]
    run, _ = loaded(paths[0])
    assert {value.dtype for value in run.state_dict().values()} == {torch.float16}
    inputs = toys.made(port.inputs, {})
    found = run(torch.from_numpy(inputs[0]))
    assert found.dtype == torch.float32
    assert 1e-6 < abs(found.detach().numpy() - toys.outputs(port, inputs)[0]).max() < 1 / 255

"""Devices, threads, precision, memory, and torchvision beside another build of torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
import torch
from torch import nn

from imgtool import compute
from imgtool.errors import USAGE, ImgtoolError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_is_always_there() -> None:
    assert compute.device("cpu") == torch.device("cpu")
    assert compute.device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "meta", "vulkan", "hpu", "cpu:x"])
def test_a_device_that_is_not_there_is_asked_wrongly(name: str) -> None:
    with pytest.raises(ImgtoolError, match=f"no device {name}") as caught:
        compute.device(name)
    assert caught.value.code == USAGE


def test_auto_prefers_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: asked.append(name) or "cpu")
    compute.device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    compute.device("auto")
    assert asked == ["cuda", "mps"]


def test_threads() -> None:
    assert compute.use_threads(1) == 1 == torch.get_num_threads() == cv2.getNumThreads()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert compute.use_threads(0) == allowed == torch.get_num_threads()


@pytest.mark.parametrize(
    ("precision", "kind", "bf16", "expected"),
    [
        ("auto", "cpu", True, None),
        ("auto", "mps", True, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp32", "cuda", True, None),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cuda", True, torch.float16),
    ],
)
def test_precision(
    precision: str, kind: str, bf16: bool, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    where: Any = SimpleNamespace(type=kind)
    assert compute.autocast_type(precision, where) is expected


def test_a_network_is_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    net, said = nn.Linear(2, 1), []
    monkeypatch.setattr(torch, "compile", lambda what, **_: lambda *x: what(*x) + 1)
    before = net(torch.ones(1, 2))
    compute.compile_net(net, torch.device("cpu"), said.append)
    assert torch.equal(net(torch.ones(1, 2)), before + 1)
    assert net.state_dict().keys() == {"weight", "bias"}
    assert said == []


def test_a_compiler_that_fails_when_first_run_leaves_the_network_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise OSError("cl is not found")

    net, said = nn.Linear(2, 1), []
    monkeypatch.setattr(torch, "compile", lambda what, **_: fails)
    compute.compile_net(net, torch.device("cpu"), said.append)
    assert net(torch.ones(1, 2)).shape == (1, 1)
    assert said == ["--compile does not work here (OSError: cl is not found): going on without"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_is_compiled_here_gives_the_same() -> None:
    net, said = nn.Sequential(nn.Linear(4, 4), nn.SiLU()), []
    x = torch.rand(3, 4)
    before = net(x)
    compute.compile_net(net, torch.device("cpu"), said.append)
    torch.testing.assert_close(net(x), before)


def test_channels_last_changes_no_value() -> None:
    net = nn.Conv2d(3, 8, 3)
    before = net.weight.clone()
    assert compute.channels_last(net).weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(net.weight, before)


def test_memory_that_ran_out_is_known_by_what_torch_really_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert compute.out_of_memory(caught.value)
    assert compute.out_of_memory(MemoryError())
    assert compute.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not compute.out_of_memory(RuntimeError("shapes do not match"))
    assert not compute.out_of_memory(ValueError("can't allocate memory"))


def _failing(*faults: Exception | None) -> Any:
    """Stand in for the import: raise one fault after the other, then give a module."""
    left = iter(faults)

    def load(name: str) -> object:
        fault = next(left)
        if fault is not None:
            raise fault
        return SimpleNamespace(name=name)

    return load


NMS = RuntimeError("operator torchvision::nms does not exist")


def test_torchvision_of_another_build_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    schemas: list[str] = []

    class Library:
        def __init__(self, name: str, kind: str) -> None:
            assert (name, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            schemas.append(schema.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(importlib, "import_module", _failing(NMS, None))
    monkeypatch.setattr(compute, "_declared", [])
    assert compute.torchvision().name == "torchvision"
    assert schemas == ["nms", "qnms"]
    assert len(compute._declared) == 1  # kept, for the library ends with the object


@pytest.mark.parametrize(
    ("fault", "words", "advice"),
    [
        (ImportError("no torchvision"), "torchvision is not installed", "pip install torchvision"),
        (RuntimeError("undefined symbol"), "does not import: undefined symbol", "fits this torch"),
    ],
)
def test_torchvision_that_does_not_import(
    fault: Exception, words: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", _failing(fault))
    with pytest.raises(ImgtoolError, match=words) as caught:
        compute.torchvision()
    assert advice in caught.value.hint


@pytest.mark.slow
def test_the_torchvision_that_is_installed_here_works() -> None:
    """In a process of its own: what the import registers stays for good."""
    program = (
        "import torch; from imgtool import compute; v = compute.torchvision();"
        "from torchvision.transforms import functional as f;"
        "assert f.center_crop(torch.zeros(3, 9, 9), [3, 3]).shape == (3, 3, 3); print(v.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""Where the arithmetic runs: device, threads, precision, memory, and torchvision's door."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import cv2
import torch
from torch import Tensor, nn

from imgtool.errors import USAGE, ImgtoolError
from imgtool.runtime import cores

T = TypeVar("T")


def device(name: str) -> torch.device:
    """Return the device that a setting names; "auto" takes CUDA, then Apple's GPU, then the CPU.

    On a CUDA device float32 then means float32: torch would round what is convolved to 10 bits (TF32).

    Raises:
        ImgtoolError: Code 2, when the device is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen).tolist()  # the device "meta" is always there, but holds nothing
    except (RuntimeError, AssertionError, ImportError):
        raise ImgtoolError(f"no device {name} here", "take --device auto or cpu", USAGE) from None
    if name.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # of convolutions alone, torch's exporter takes no answer
    return chosen


def use_threads(threads: int) -> int:
    """Set the CPU threads of torch and OpenCV, 0 for all cores that this process may use; return them."""
    count = threads or cores()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    return count


def autocast_type(precision: str, where: torch.device) -> torch.dtype | None:
    """Return the type that a precision means on a device, None for plain float32."""
    if precision == "auto":
        if where.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def channels_last(net: nn.Module) -> nn.Module:
    """Lay a network's weights out with channels last: 1.1 to 2.3 times as fast on CPUs (measured)."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def compile_net(net: nn.Module, where: torch.device, say: Callable[[str], None]) -> None:
    """Compile a network in place, if compiling works here; the names of its parameters stay.

    Compilers are missing or of another kind in many places, which shows only when something is first
    run: so something small is compiled before.

    Args:
        net: The network.
        where: The device that it is on.
        say: Told in words where it stays as it is.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=where))
    except Exception as fault:  # noqa: BLE001 - whatever the compilers of this platform raise
        first = (str(fault).splitlines() or [""])[0]
        say(f"--compile does not work here ({type(fault).__name__}: {first}): going on without")
        return
    net.compile()


_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")
"""What PyTorch says on the CPU, on Apple's GPU, and where it passes on what C++ says."""


def out_of_memory(fault: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(words in str(fault) for words in _NO_MEMORY)


def torchvision() -> ModuleType:
    """Import torchvision, also a CUDA build of it beside a CPU build of torch.

    The CUDA build's library does not load there, so the operators that its Python code registers
    against are unknown and the import fails; declaring their schemas first is all it takes. The
    operators themselves stay unavailable; networks and transforms do not use them.

    Raises:
        ImgtoolError: When torchvision is missing or does not import for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        raise ImgtoolError("torchvision is not installed", "pip install torchvision") from None
    except RuntimeError as fault:
        if "torchvision::nms does not exist" not in str(fault):
            raise ImgtoolError(
                f"torchvision does not import: {fault}", "install the torchvision that fits this torch"
            ) from None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _declared.append(library)
    return importlib.import_module("torchvision")


def take_features(path: Path, into: Callable[[dict[str, Tensor]], T], network: str, otherwise: str) -> T:
    """Hand on the features of a network of torchvision's: from its whole file, or one of less.

    No code of the file is run.

    Args:
        path: File of weights.
        into: Takes weights by their names below "features."; raises ``RuntimeError`` where they do not fit.
        network: What messages call it.
        otherwise: What else a user may do, for messages.

    Returns:
        What ``into`` returns.

    Raises:
        ImgtoolError: A file that is damaged or of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # noqa: BLE001 - torch raises whatever the unpickler met
        what = f"{path} is no readable file of PyTorch weights ({type(fault).__name__})"
        raise ImgtoolError(what, otherwise) from None
    if not isinstance(state, Mapping) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ImgtoolError(f"{path} holds something else than the weights of a network", otherwise)
    wanted = {
        name.removeprefix("features."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if not name.startswith("classifier.")
    }
    if not all(bool(value.isfinite().all()) for value in wanted.values()):
        raise ImgtoolError(f"{path} is damaged: its weights are not finite", otherwise)
    try:
        return into(wanted)
    except RuntimeError as fault:
        first = (str(fault).splitlines()[1:] or [str(fault)])[0].strip()
        raise ImgtoolError(f"{path} is not of {network}: {first[:160]}", otherwise) from None


def download(url: str, folder: Path, otherwise: str) -> Path:
    """Download a file of weights whose name ends in its SHA-256's first digits, as PyTorch's do.

    Args:
        url: Where it is.
        folder: Where to put it.
        otherwise: What a user can do instead of putting it there by hand.

    Raises:
        ImgtoolError: It cannot be had, or is not what its name says.
    """
    target = folder / url.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), target.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as fault:
        hint = f"put {target.name} into {folder}, or {otherwise}"
        raise ImgtoolError(f"cannot download {url}: {fault}", hint) from None
    return target


_declared: list[torch.library.Library] = []

"""What a machine is: processor, system, the versions of Python and torch, a GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def facts(device: str, threads: int) -> dict[str, object]:
    """Return what figures and results may depend on besides code and settings.

    Args:
        device: As ``--device`` names it.
        threads: CPU threads of torch, 0 for all cores.

    Returns:
        "cpu", "cores", "threads", "device", "system", "python", "torch"; of CUDA also "gpu", "gpu_memory_mb"
        (10^6 bytes), "driver", "cuda", "cudnn".
    """
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_gpu(device),
    }


def _gpu(device: str) -> dict[str, object]:
    """Return what there is to say of a CUDA device, {} where none is used."""
    import torch

    from imgtool import compute

    where = compute.device(device)
    if where.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(where)
    return {
        "gpu": found.name,
        "gpu_memory_mb": found.total_memory / 1e6,
        "driver": _driver(str(found.uuid)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _driver(gpu: str) -> str | None:
    """Return version and clocks as NVIDIA's tool tells them of a GPU, None where it does not."""
    query = ["--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    words = ["nvidia-smi", f"--id=GPU-{gpu}", *query]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.splitlines()[0] if told else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

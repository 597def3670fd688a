"""What a network of the original's kind costs, measured in a process of its own, here or on another machine.

``python -m imgtool.engines.awb.measure`` reads an order and writes an answer, both JSON, by standard input
and output. It takes NumPy and the few modules in ``SOURCES``, which the system's ssh carries to wherever
there is python3 with NumPy.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from imgtool.errors import USAGE, ImgtoolError
from imgtool.memory import peak_mb
from imgtool.search.cost import Cost, Unmeasured, cpu_times

Structure = Mapping[str, Any]
"""A network's shape: "channels", "kernels" and "strides" of the blocks, "widths" of the MLP's hidden layers,
"height" and "width" of the input."""

SOURCES = (
    "imgtool/__init__.py",
    "imgtool/errors.py",
    "imgtool/memory.py",
    "imgtool/search/__init__.py",
    "imgtool/search/cost.py",
    "imgtool/engines/__init__.py",
    "imgtool/engines/awb/__init__.py",
    "imgtool/engines/awb/camera.py",
    "imgtool/engines/awb/stats.py",
    "imgtool/engines/awb/features.py",
    "imgtool/engines/awb/forward.py",
    "imgtool/engines/awb/measure.py",
)
"""All that a measurement runs, below the package's own parent."""

FRAME = (432, 648)
"""Rows and columns of the frame that is measured on: those of SimpleCube++."""
BLACK, WHITE = 2048, 16383

FASTEST = 1e9
"""Multiplications in a millisecond that no core reaches."""
ROUNDS = 3
"""Rounds of timed calls, of which the fastest counts."""
PATIENCE = 300
"""Seconds after which a measurement is given up."""

_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ONE_THREAD = dict.fromkeys(_COUNTS, "1")
_MODULE = "imgtool.engines.awb.measure"
_SCRIPT = """
import json, os, subprocess, sys, tempfile
order = json.loads({order!r})
with tempfile.TemporaryDirectory() as folder:
    for name, text in order.pop("files").items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    done = subprocess.run(
        [sys.executable, "-m", {module!r}], input=json.dumps(order).encode(), cwd=folder,
        env=dict(os.environ, **{environment!r}),
    )
sys.exit(done.returncode)
"""


# --- what can be known without a measurement ---


def _blocks(net: Structure) -> Iterator[tuple[int, int, int, int]]:
    """Yield inputs, outputs, kernel, and output pixels of each block's convolution.

    Raises:
        ImgtoolError: The blocks shrink the input to nothing.
    """
    rows, columns, wide = net["height"], net["width"], 3
    for channels, kernel, stride in zip(net["channels"], net["kernels"], net["strides"]):  # noqa: B905
        rows, columns = -(-rows // stride), -(-columns // stride)
        if min(rows, columns) < 2:
            raise ImgtoolError(f"strides {net['strides']} shrink {net['width']}x{net['height']} to nothing")
        yield wide, channels, kernel, rows * columns
        rows, columns, wide = rows // 2, columns // 2, channels


def least(net: Structure) -> Cost:
    """Return what a network costs at the very least, by its multiplications and its largest array.

    Raises:
        ImgtoolError: Its blocks shrink the input to nothing.
    """
    blocks = list(_blocks(net))
    products = sum(wide * channels * kernel**2 * pixels for wide, channels, kernel, pixels in blocks)
    largest = max(4 * wide * kernel**2 * pixels for wide, _, kernel, pixels in blocks)
    return Cost(products / FASTEST, largest / 1e6, measured=False, parameters=parameters(net))


def parameters(net: Structure) -> int:
    """Return how many parameters a network has: weights, two for each channel's normalisation, and biases."""
    sizes: list[int] = [3, *net["channels"]]
    blocks: int = sum(
        wide * channels * kernel**2 + 2 * channels
        for wide, channels, kernel in zip(sizes, sizes[1:], net["kernels"])  # noqa: B905
    )
    layers: list[int] = [sizes[-1], *net["widths"], 2]
    return blocks + sum((wide + 1) * size for wide, size in zip(layers, layers[1:]))  # noqa: B905, RUF007


def fingerprint(net: Structure) -> str:
    """Return the hash of a network's shape and of the code that runs it."""
    digest = hashlib.sha256(json.dumps(net, sort_keys=True).encode())
    for name in SOURCES:
        digest.update(hashlib.sha256((_root() / name).read_bytes()).digest())
    return digest.hexdigest()


def _root() -> Path:
    return Path(__file__).resolve().parents[3]


# --- asking for a measurement ---


def here(net: Structure, max_ms: float) -> Cost:
    """Measure a network with random weights in a fresh process on this machine.

    Args:
        net: Its shape.
        max_ms: Limit in ms; what misses it by far is measured less exactly.

    Raises:
        Unmeasured: The process ended without an answer.
        ImgtoolError: NumPy is missing.
    """
    order = json.dumps({"net": net, "max_ms": max_ms})
    return _cost(net, _talk([sys.executable, "-m", _MODULE], order, "this machine"), "this machine")


def there(net: Structure, max_ms: float, host: str) -> Cost:
    """Measure a network on another machine, by the system's ssh: only with keys, and hosts that it knows.

    There must be python3 with NumPy; nothing stays there.

    Args:
        net: Its shape.
        max_ms: Limit in ms, as ``here``.
        host: ``[user@]host``, or a name in ssh's configuration.

    Raises:
        Unmeasured: The process there took too long, or ended without an answer.
        ImgtoolError: Code 2, for what is no host; code 1, where there is no ssh, or the host cannot be
            reached, lacks python3 or NumPy, or answers anything else than what it was asked.
    """
    if not host or host.startswith("-") or any(letter.isspace() for letter in host):
        raise ImgtoolError(f"--remote {host}: not a host", "give [user@]host", USAGE)
    files = {name: (_root() / name).read_bytes().decode() for name in SOURCES}
    order = json.dumps({"net": net, "max_ms": max_ms, "files": files})
    script = _SCRIPT.format(order=order, module=_MODULE, environment=ONE_THREAD)
    command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "--", host, "python3 -"]
    return _cost(net, _talk(command, script, host), host)


def _talk(command: Sequence[str], message: str, host: str) -> str:
    """Run a command and return the last line of its output."""
    try:
        done = subprocess.run(
            command,
            input=message.encode(),
            capture_output=True,
            timeout=PATIENCE,
            env=os.environ | ONE_THREAD,
            check=False,
        )
    except FileNotFoundError:
        raise ImgtoolError(f"{command[0]} is not installed", "install the client of OpenSSH") from None
    except subprocess.TimeoutExpired:
        raise Unmeasured(
            f"measuring on {host} took more than {PATIENCE} s",
            "a smaller --max-ms ends sooner what is too slow",
        ) from None
    if done.returncode:
        raise _fault(done.returncode, done.stderr.decode(errors="replace"), host)
    lines = done.stdout.decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _fault(code: int, words: str, host: str) -> ImgtoolError:
    said = next((line for line in reversed(words.splitlines()) if line.strip()), f"code {code}")
    if host == "this machine":
        return Unmeasured(f"measuring ended: {said}", "a killed process lacked memory: lower --max-mb")
    if code == 255:
        hint = f"ssh -o BatchMode=yes {host} true has to work: with a key, and a host that is known"
        return ImgtoolError(f"ssh cannot reach {host}: {said}", hint)
    if code == 127:
        return ImgtoolError(f"there is no python3 on {host}: {said}", "install python3 and NumPy there")
    return Unmeasured(f"measuring on {host} ended: {said}", "it needs python3 and NumPy there")


def _cost(net: Structure, line: str, host: str) -> Cost:
    try:
        answer = json.loads(line)
        if "error" in answer:
            raise ImgtoolError(f"measuring on {host}: {answer['error']}", answer["hint"])
        cost = Cost(float(answer["cpu_ms"]), float(answer["mb"]), parameters=parameters(net))
        if answer["hash"] != fingerprint(net) or not (0 < cost.cpu_ms < inf and 0 < cost.mb < inf):
            raise ValueError
        return cost
    except (ValueError, TypeError, KeyError):
        what = f"what {host} answered is not the measurement that it was asked for: {line[:60]}"
        raise ImgtoolError(what, "a shell that prints when it starts may be the cause") from None


# --- the measurement itself ---


def random_state(net: Structure) -> dict[str, Any]:
    """Return random parameters of a network, by the names of its layers, float32."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    state: dict[str, Any] = {}
    wide = 3
    for block, (channels, kernel) in enumerate(zip(net["channels"], net["kernels"])):  # noqa: B905
        state[f"blocks.{block}.conv.weight"] = normal(channels, wide, kernel, kernel)
        norm = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
        for name, value in norm.items():
            state[f"blocks.{block}.norm.{name}"] = np.full(channels, value, np.float32)
        wide = channels
    for layer, size in enumerate([*net["widths"], 2]):
        state[f"mlp.{2 * layer}.weight"] = normal(size, wide)
        state[f"mlp.{2 * layer}.bias"] = np.zeros(size, np.float32)
        wide = size
    return state


def measured(order: Mapping[str, Any]) -> dict[str, Any]:
    """Measure in this process: from a 16-bit frame in memory to its white, by NumPy, on one thread.

    Args:
        order: "net", the shape, and "max_ms".

    Returns:
        "cpu_ms" (p95), "p50", "mb", "calls", and "hash", the fingerprint of what was measured.
    """
    import numpy as np

    from imgtool.engines.awb import features, forward, stats

    net = order["net"]
    state = random_state(net)
    frame = np.random.default_rng(0).integers(BLACK, WHITE - BLACK, (*FRAME, 3), np.uint16)
    height, width = net["height"], net["width"]

    def work() -> None:
        cells = stats.of_linear(frame, BLACK, WHITE, cells=height * width)
        seen = features.picture(cells, height, width)
        forward.deepawb(state, seen, strides=tuple(net["strides"]), layers=len(net["widths"]))

    times = cpu_times(work, order["max_ms"], ROUNDS)
    p50, p95 = np.percentile(times, [50, 95])
    return {
        "cpu_ms": float(p95),
        "p50": float(p50),
        "mb": peak_mb(),
        "calls": len(times),
        "hash": fingerprint(net),
    }


def answer(order: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured, or the error that the user should read."""
    try:
        return measured(order)
    except ModuleNotFoundError as fault:
        return {"error": f"{fault.name} is missing", "hint": f"python3 -m pip install {fault.name}"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.stdin.read()))) + "\n")

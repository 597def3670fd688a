"""A folder that serves an engine over HTTP: a function app of Azure, or what a container is built of.

It holds the very package that wrote it, the weights, and the versions of the libraries that are installed
here, and of all that these need: what is served is what ``imgtool infer`` does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import imgtool
from imgtool import engines, files, header
from imgtool.engine import Engine
from imgtool.errors import ImgtoolError
from imgtool.serve import CONFIG, Limits, served
from imgtool.settings import Export

PACKAGE = Path(imgtool.__file__).parent

LEFT_OUT = ("__pycache__", "*.pyc", "weights", "specimens", "templates", "export")
"""What of the package no service needs."""

OPENCV = tuple(f"opencv-{kind}python{tail}" for kind in ("contrib-", "") for tail in ("-headless", ""))
"""Packages of OpenCV; servers get the first, which needs no display, in the version of the one installed."""

LIBRARIES = ("numpy", "pillow", "pydantic", "rawpy", "tifffile", "tomli")
"""Packages that every engine needs to read and write photos."""

OF_TORCH = ("torch", "safetensors", "pytorch-msssim")
"""Packages that an engine needs whose network is one of torch."""

SERVERS = {"azure-function": ("azure-functions", ">=1.21,<2"), "docker": ("waitress", ">=3,<4")}
"""What calls the service, and the versions that do where none is installed here."""

TARGET = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "platform_machine": "x86_64",
}
"""Where services run, which decides what a package needs: not always where one exports."""

SECONDS = {"azure-function": 200.0, "docker": 300.0}
"""Longest time of a request: the load balancer of Azure gives up after 230."""

SPARE = 3
"""Calls that a function app takes beside those that are worked on or wait: what it refuses, and health."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TEMPLATES = {
    "azure-function": ("function_app.py", "host.json", "local.settings.json", ".funcignore", "README.md"),
    "docker": ("Dockerfile", ".dockerignore", "README.md"),
}
_FOLDERS = {"azure-function": "azure", "docker": "docker"}


def write(engine: Engine, settings: Export, folder: Path, weights: Path) -> dict[str, Any]:
    """Write the files of a service into a folder.

    Args:
        engine: What is served.
        settings: Of ``export``: ``to``, ``auth``, the limits, ``threads``.
        folder: An empty folder.
        weights: The engine's weights.

    Returns:
        "engine", "weights", "files", "bytes", "routes", "parameters", "limits", "auth" and "versions".

    Raises:
        ImgtoolError: The weights do not do, or a library that a service needs is not installed.
    """
    net = _network(engine, weights)
    told = _versions(engine, settings.to, net)
    _copy(engine, folder, weights)
    files.write(folder / CONFIG, _json(_config(engine, settings, weights)))
    files.write(folder / "requirements.txt", _requirements(told, gpu=False))
    gpu = settings.to == "docker" and engine.prepare is None
    if gpu:
        files.write(folder / "requirements-gpu.txt", _requirements(told, gpu=True))
    _fill(engine, settings, folder, weights.stem, gpu)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "engine": engine.name,
        "weights": weights.stem,
        "files": [path.relative_to(folder).as_posix() for path in written],
        "bytes": sum(path.stat().st_size for path in written),
        "routes": [f"POST /api/{engine.name}", "GET /api/health"],
        "parameters": served(engine.name),
        "limits": {"max_mb": settings.max_mb, "max_megapixels": settings.max_megapixels},
        "auth": _auth(settings),
        "versions": told,
    }


def _auth(settings: Export) -> str:
    return settings.auth if settings.to == "azure-function" else "none"


def _network(engine: Engine, weights: Path) -> Any:
    """Build the network, so that weights that do not do are found here and not by the first request."""
    if engine.prepare:
        header.read(weights, engine.name)
        return None
    from imgtool import checkpoint

    return checkpoint.network(engine, checkpoint.read_weights(weights, engine.name))


def _versions(engine: Engine, to: str, net: Any) -> dict[str, str]:
    """Return what must be installed, with all that it needs: name to "==version", sorted.

    Raises:
        ImgtoolError: A library is not installed here, so that its version is not known.
    """
    wanted = [*LIBRARIES, *(OF_TORCH if engine.prepare is None else ())]
    if net is not None and any(type(part).__module__.startswith("torchvision") for part in net.modules()):
        wanted.append("torchvision")
    found = {OPENCV[0]: _installed(*OPENCV)} | {name: _installed(name) for name in wanted}
    lacking = [name for name, version in found.items() if not version]
    if lacking:
        raise ImgtoolError(f"{lacking[0]} is not installed, and the service needs it", "pip install imgtool")
    server, usual = SERVERS[to]
    found[server] = _installed(server) or usual
    return dict(sorted(_closed(found).items()))


def _closed(found: Mapping[str, str]) -> dict[str, str]:
    """Return versions with those of all that these packages need on TARGET.

    What is not installed here, as the libraries of GPUs beside torch for CPUs, is left to pip: torch itself
    names their exact versions.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    known, seen, queue = dict(found), set(), [(name, "") for name in found]
    while queue:
        name, extra = asked = queue.pop()
        if asked in seen or not _installed(name):
            continue
        seen.add(asked)
        known.setdefault(name, _installed(name))
        for needed in map(Requirement, metadata.requires(name) or ()):
            if not needed.marker or needed.marker.evaluate(TARGET | {"extra": extra}):
                queue += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return known


def _installed(*names: str) -> str:
    """Return "==version" of the first of some packages that is installed here, "" where none is."""
    for name in names:
        try:
            return "==" + metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _requirements(versions: Mapping[str, str], gpu: bool) -> bytes:
    """Return a requirements file; torch is the build for CPUs, or that for GPUs of the package index."""
    lines = []
    for name, version in versions.items():
        plain = version.partition("+")[0]
        of_torch = name in ("torch", "torchvision")
        lines.append(f"{name}{plain}+cpu" if of_torch and not gpu else name + plain)
    index = [f"--extra-index-url {CPU_INDEX}"] * ("torch" in versions and not gpu)
    return ("\n".join([*index, *lines]) + "\n").encode()


def _config(engine: Engine, settings: Export, weights: Path) -> dict[str, object]:
    return {
        "engine": engine.name,
        "weights": f"weights/{weights.name}",
        "sha256": hashlib.sha256(files.read(weights)).hexdigest(),
        "max_mb": settings.max_mb,
        "max_megapixels": settings.max_megapixels,
        "seconds": SECONDS[settings.to],
        "threads": settings.threads,
        "device": "cpu",
    }


def _copy(engine: Engine, folder: Path, weights: Path) -> None:
    """Copy the package, the weights, and those of the engines that this one may ask."""
    package = folder / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    files.write(folder / "weights" / weights.name, files.read(weights))
    for name in _asked(engine):
        shipped = header.find(name)
        files.write(package / "weights" / shipped.name, files.read(shipped))


def _asked(engine: Engine) -> Sequence[str]:
    """Return the weights of the engines that this one may ask: of raw frames, what needs no torch."""
    if engine.reads != "bayer":
        return []
    others = [engines.load(name) for name in engines.SUMMARY if name != engine.name]
    return [other.weights for other in others if other.reads == "bayer" and other.prepare]


def _fill(engine: Engine, settings: Export, folder: Path, weights: str, gpu: bool) -> None:
    """Write the files that templates give."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    about: dict[str, object] = {
        "engine": engine.name,
        "weights": weights,
        "imgtool": imgtool.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "auth": settings.auth,
        "torch": engine.prepare is None,
        "gpu": gpu,
        "picture": engine.picture,
        "parameters": served(engine.name),
        "max_mb": f"{settings.max_mb:g}",
        "max_megapixels": f"{settings.max_megapixels:g}",
        "seconds": f"{SECONDS[settings.to]:g}",
        "waiting": Limits().waiting,
        "concurrent": 1 + Limits().waiting + SPARE,
    }
    own = _FOLDERS[settings.to]
    parts = [(name, name, "cpu", "requirements.txt") for name in TEMPLATES[settings.to]]
    parts += [("Dockerfile.gpu", "Dockerfile", "cuda", "requirements-gpu.txt")] * gpu
    for name, template, device, requirements in parts:
        page = environment.get_template(f"{own}/{template}.j2")
        text = page.render(about, device=device, requirements=requirements)
        files.write(folder / name, text.encode())


def _json(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()

"""``python -m imgtool.export.worker ORDER``: runs an exported file, alone in a process that it may kill.

The order is a JSON file: {"file", "threads", "cases": [folder-less names of .npz files beside it]}. Each
case's inputs are the arrays of its file, in their order; the outputs go to NAME.out.npz. Standard output gets
one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from imgtool import engines, runtime
from imgtool.errors import DONE, ImgtoolError
from imgtool.memory import peak_mb


def opened(path: Path, threads: int) -> Callable[..., Any]:
    """Return what runs a file of any format that export writes.

    Raises:
        ImgtoolError: Nothing can.
    """
    if path.suffix != ".npz":
        return runtime.open(path, threads=threads, trusted=True)
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    about = json.loads(arrays.pop("imgtool").tobytes())
    run = engines.load(about["engine"]).archived
    if run is None:
        raise ImgtoolError(f"nothing runs {path}", "take another format")
    return run(about, arrays)


def main(path: Path) -> int:
    """Run every case of an order."""
    order = json.loads(path.read_text(encoding="utf-8"))
    said: dict[str, Any] = {}
    try:
        run, seconds = opened(Path(order["file"]), order["threads"]), []
        for name in order["cases"]:
            said["case"] = name
            with np.load(path.with_name(name)) as given:
                inputs = [given[each] for each in given.files]
            began = time.process_time()
            outputs = run(*inputs)
            seconds.append(time.process_time() - began)
            np.savez(path.with_name(name + ".out.npz"), *outputs)
        said = {"cpu_seconds": seconds, "peak_mb": peak_mb()}
    except ImgtoolError as fault:
        said |= {"error": fault.what, "hint": fault.hint}
    sys.stdout.write(json.dumps(said) + "\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

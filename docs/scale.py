"""Measure what ``docs/scale.md`` tells: downloads from a bucket, and photos spread over processes.

    python docs/scale.py fetch                  # 1,000 files of a loopback S3 server, 30 ms a request
    python docs/scale.py fetch s3://mine/photos # the same of a bucket of your own
    python docs/scale.py infer                  # 200 photos: alone, two processes, --runner processes and ray
    python docs/scale.py train                  # 40 steps: one process of two threads, two of torchrun
    python docs/scale.py track                  # what each tracker costs a training

Both compare ways in one run, print the ratios, and end with 1 where a limit is missed. The loopback server
is moto's (imgtool[test]); ``infer`` needs imgtool[ray].
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FASTEST_LEAST = 3.0
"""A parallel download is this many times as fast as requests one by one, at least."""
RAY_LEAST = 0.8
"""Ray's photos per second over those of as many plain processes, at least."""
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}


# --- downloads ------------------------------------------------------------------------------------


@contextmanager
def loopback(count: int, size: int, latency: float) -> Iterator[str]:
    """Give the URL of a bucket of a loopback S3 server that answers each request ``latency`` seconds late."""
    import obstore
    from moto.server import DomainDispatcherApplication, create_backend_app
    from obstore.store import S3Store
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    waits = [0.0]

    def late(environment: Any, start: Callable[..., Any]) -> Any:
        time.sleep(waits[0])
        return application(environment, start)

    server = make_server("127.0.0.1", 0, late, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    import boto3

    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="photos")
    store = S3Store("photos", endpoint=endpoint, client_options={"allow_http": True})
    for number in range(count):
        content = hashlib.sha256(str(number).encode()).digest() * (size // 32)
        obstore.put(store, f"set/{number % 10}/{number:05d}.jpg", content)
    waits[0] = latency
    yield "s3://photos/set"
    server.shutdown()


def one_by_one(url: str, folder: Path) -> tuple[int, float]:
    """Download every file of a URL by a request of its own, one after the other; return files and seconds."""
    from imgtool import buckets

    place = buckets.open(url)
    began = time.monotonic()
    every = place.list()
    for found in every:
        target = folder / found.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(place.whole(found))
    return len(every), time.monotonic() - began


def compare_downloads(url: str, jobs: int) -> dict[str, float]:
    """Download a URL in parallel and one by one; return the rates in files per second and their ratio."""
    from imgtool.buckets import fetch

    with tempfile.TemporaryDirectory() as work:
        began = time.monotonic()
        fetch.fetch(url, Path(work, "parallel"), jobs=jobs)
        parallel = time.monotonic() - began
        count, single = one_by_one(url, Path(work, "single"))
        for path in Path(work, "single").rglob("*.*"):
            same = Path(work, "parallel", path.relative_to(Path(work, "single")))
            assert same.read_bytes() == path.read_bytes(), path
    return {
        "files": count,
        "parallel": count / parallel,
        "one_by_one": count / single,
        "ratio": single / parallel,
    }


def measure_fetch(given: argparse.Namespace) -> bool:
    """Compare downloads, print what came of it, and return whether the limit is met."""
    if given.url:
        found = compare_downloads(given.url, given.jobs)
    else:
        with loopback(given.files, given.bytes, given.latency / 1000) as url:
            found = compare_downloads(url, given.jobs)
    print(json.dumps(found))
    print(
        f"{found['files']:.0f} files: imgtool data fetch {found['parallel']:.0f} files/s, one by one "
        f"{found['one_by_one']:.0f} files/s: {found['ratio']:.1f} times as fast (at least {FASTEST_LEAST:g})"
    )
    return found["ratio"] >= FASTEST_LEAST


# --- photos ---------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, size: int) -> None:
    """Write pictures of soft tones and noise, as JPEG."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        tones = cv2.resize(
            rng.uniform(0, 255, (6, 8, 3)), (size * 3 // 2, size), interpolation=cv2.INTER_CUBIC
        )
        noisy = tones + rng.normal(0, 6, tones.shape)
        cv2.imwrite(str(folder / f"{number:05d}.jpg"), np.clip(noisy, 0, 255).astype(np.uint8))


def command(given: argparse.Namespace, photos: Path, out: Path, *more: str) -> list[str]:
    """Return the words of one ``imgtool infer``, of one thread a process."""
    words = [sys.executable, "-m", "imgtool", "infer", given.engine, str(photos), "-o", f"{out}/", "--json"]
    return [*words, "--threads", "1", *more]


def rate_of(commands: Sequence[Sequence[str]]) -> float:
    """Run plain commands at once; return photos per second, together, after the first photo of each."""
    rates = [0.0] * len(commands)

    def follow(number: int, words: Sequence[str]) -> None:
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | THREADS
        )
        assert child.stdout is not None
        times = [time.monotonic() for line in child.stdout if '"seconds"' in line]
        if child.wait() or len(times) < 2:
            raise RuntimeError(f"{' '.join(words)} failed")
        rates[number] = (len(times) - 1) / (times[-1] - times[0])

    threads = [threading.Thread(target=follow, args=each) for each in enumerate(commands)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def rate_told(words: Sequence[str]) -> float:
    """Run a command with --runner and return the photos per second that it tells, after start-up."""
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | THREADS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["summary"]["images_per_second"])


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every picture of a folder by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.jpg")}


def measure_infer(given: argparse.Namespace) -> bool:
    """Compare the ways to process many photos, print what came of it, and return whether the limit is met."""
    work = Path(tempfile.mkdtemp())
    photos = work / "photos"
    photographs(photos, given.photos, given.size)
    rates: dict[str, list[float]] = {}
    for turn in range(given.rounds):
        at = work / str(turn)
        two = [command(given, photos, at / "two", "--shard", f"{part}/2") for part in range(2)]
        spread = {
            name: command(given, photos, at / name, "--runner", name, "--workers", "2")
            for name in ("processes", "ray")
        }
        rates.setdefault("one process", []).append(rate_of([command(given, photos, at / "one")]))
        rates.setdefault("two processes, --shard", []).append(rate_of(two))
        for name, words in spread.items():
            rates.setdefault(f"--runner {name} --workers 2", []).append(rate_told(words))
        expected = contents(at / "one")
        assert len(expected) == given.photos
        for name in ("two", "processes", "ray"):
            assert contents(at / name) == expected, f"{name}: not the same bytes"
    best = {name: max(found) for name, found in rates.items()}
    plain = best["two processes, --shard"]
    ratio = best["--runner ray --workers 2"] / plain
    print(json.dumps({"images_per_second": best, "ratio": ratio, "every": rates}))
    for name, rate in best.items():
        print(f"{name:28} {rate:7.2f} images/s  {rate / plain:.2f}")
    print(f"the same bytes from all; ray over two plain processes: {ratio:.2f} (at least {RAY_LEAST:g})")
    return ratio >= RAY_LEAST


# --- trainings ------------------------------------------------------------------------------------


def trained(words: Sequence[str], work: Path) -> tuple[float, dict[str, Any]]:
    """Run a training; return its CPU seconds, those of its children among them, and its first epoch."""
    out = Path(tempfile.mkdtemp(dir=work)) / "run"
    before = os.times()
    done = subprocess.run(
        [*words, "-o", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | THREADS,
        check=False,
        cwd=work,
    )
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, json.loads((out / "log.jsonl").read_text().splitlines()[0])


def measure_train(given: argparse.Namespace) -> bool:
    """Train by one process and by two; print steps per second and how far the results are apart."""
    work = Path(tempfile.mkdtemp())
    photographs(work / "photos", 24, 384)
    common = ["-m", "imgtool", "train", given.engine, "--photos", str(work / "photos"), "--batch", "8"]
    common += [
        "--steps",
        str(given.steps),
        "--epoch-steps",
        str(given.steps),
        "--warmup",
        "5",
        "--workers",
        "0",
    ]
    common += ["--device", "cpu", "--crop", "128"]
    ways = {
        "one process, two threads": [sys.executable, *common, "--threads", "2"],
        "torchrun, two processes of one": [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *common,
        ],
    }  # fmt: skip
    rows = {name: [trained(words, work)[1] for _ in range(given.rounds)] for name, words in ways.items()}
    seconds = {name: min(row["seconds"] for row in found) for name, found in rows.items()}
    one, two = (rows[name][0] for name in ways)
    print(
        json.dumps(
            {"seconds": seconds, "loss": [one["loss"], two["loss"]], "scores": [one["scores"], two["scores"]]}
        )
    )
    for name, each in seconds.items():
        print(f"{name:32} {given.steps / each:6.2f} steps/s, loss {rows[name][0]['loss']:.7f}")
    return abs(one["loss"] / two["loss"] - 1) < 1e-4


def measure_track(given: argparse.Namespace) -> bool:
    """Print the CPU seconds of a training without and with each tracker."""
    work = Path(tempfile.mkdtemp())
    photographs(work / "photos", 8, 96)
    words = [
        sys.executable,
        "-m",
        "imgtool",
        "train",
        "filter",
        "--photos",
        str(work / "photos"),
        "--batch",
        "2",
    ]
    words += ["--crop", "16", "--epoch-steps", str(given.steps), "--workers", "0", "--threads", "1"]
    for tracker in ("", "tensorboard", "mlflow", "wandb"):
        more = ["--track", tracker] if tracker else []
        short, long = (
            trained([*words, *more, "--steps", str(n)], work)[0] for n in (given.steps // 10, given.steps)
        )
        per_step = 1000 * (long - short) / (given.steps - given.steps // 10)
        print(f"{tracker or 'none':12} {long:6.1f} s CPU of {given.steps} steps, {per_step:.2f} ms a step")
    return True


def main() -> int:
    """Measure what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    fetching = kinds.add_parser("fetch")
    fetching.add_argument("url", nargs="?", default="")
    fetching.add_argument("--files", type=int, default=1000)
    fetching.add_argument("--bytes", type=int, default=20_000)
    fetching.add_argument(
        "--latency", type=float, default=30, help="milliseconds a request, of the loopback server"
    )
    fetching.add_argument("--jobs", type=int, default=32)
    fetching.set_defaults(measure=measure_fetch)
    inferring = kinds.add_parser("infer")
    inferring.add_argument("--engine", default="filter")
    inferring.add_argument("--photos", type=int, default=200)
    inferring.add_argument(
        "--size", type=int, default=512, help="rows of a photo; it has half as many columns more"
    )
    inferring.add_argument("--rounds", type=int, default=2, help="in turn; the fastest of each counts")
    inferring.set_defaults(measure=measure_infer)
    training = kinds.add_parser("train")
    training.add_argument("--engine", default="deblur")
    training.add_argument("--steps", type=int, default=40)
    training.add_argument("--rounds", type=int, default=2)
    training.set_defaults(measure=measure_train)
    tracking = kinds.add_parser("track")
    tracking.add_argument("--steps", type=int, default=1000)
    tracking.set_defaults(measure=measure_track)
    given = parser.parse_args()
    return 0 if given.measure(given) else 1


if __name__ == "__main__":
    sys.exit(main())

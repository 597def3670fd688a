"""Workers that are actors of Ray: on a cluster that runs, or in one started here for the batch."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imgtool import runtime
from imgtool.errors import USAGE, ImgtoolError
from imgtool.infer.listing import many
from imgtool.runner.dealer import Hand, Lost, News
from imgtool.runner.worker import Brief, Dealt, Worker

STORE = 100_000_000
"""Bytes of Ray's shared memory in a cluster of our own: photos do not pass through it."""

TOKEN = "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN if it wants a token"
"""What a cluster that does not let us in may miss."""

GRACE = 5.0
"""Seconds that idle actors have to tidy up."""

PATIENCE = 10.0
"""Seconds in which a cluster has to answer."""

CROWDED = 20.0
"""Seconds for which actors may wait for a place before it is said."""

REMINDER = 60.0
"""Seconds after which it is said again, where not one of them has a place."""

MANY = 8
"""Actors of which several are likely to have answered: asking costs about a millisecond."""


def check() -> None:
    """Raise ``ImgtoolError`` (code 2) where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImgtoolError("--runner ray needs Ray", "pip install 'imgtool[ray]'", USAGE)


def connect(workers: int, threads: int, cuda: bool, warn: Callable[[str], None]) -> tuple[bool, int, int]:
    """Connect to the cluster that RAY_ADDRESS names, or start one here.

    Args:
        workers: Actors wanted; 0: as many as there are cores for, or GPUs.
        threads: CPUs of each; 0: its share of the cores.
        cuda: Whether each is to have a GPU.
        warn: Told where no node has room for an actor, and one may come that has.

    Returns:
        Whether the connection is ours to end (a program that called us may have its own), and the numbers of
        actors and of their threads.

    Raises:
        ImgtoolError: There is no such cluster, none can be started, or no node of it has room for an actor.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local" and "ray" not in sys.modules:
        _identify()
    ray: Any = importlib.import_module("ray")
    ours = not ray.is_initialized()
    local = ours and address == "local"
    if local:
        count, each = sizes(workers, threads, runtime.cores(), runtime.cores())
        _begin(ray, address, include_dashboard=False, num_cpus=count * each, object_store_memory=STORE)
    elif ours:
        _begin(ray, address)
    nodes = _nodes(ray)
    lack = lacking(nodes, threads or 1, cuda)
    if lack and (local or _is_fixed(ray)):
        if ours:
            ray.shutdown()
        has = any(gpus >= cuda for _, gpus in nodes)
        raise ImgtoolError(
            lack, "give fewer --threads" if has else "give --device cpu, or another RAY_ADDRESS"
        )
    if lack:
        warn(f"{lack}; the workers wait for one that has")
    return ours, *placed(workers, threads, nodes, cuda)


def _nodes(ray: Any) -> list[tuple[int, int]]:
    """Return the CPUs and GPUs of each node that lives."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in found]


def lacking(nodes: Sequence[tuple[int, int]], cpus: int, cuda: bool) -> str:
    """Say what no node has for an actor, "" where one has it.

    >>> lacking([(2, 0), (8, 0)], 4, False)
    ''
    >>> lacking([(2, 0)], 4, False)
    'no node of the Ray cluster has the 4 CPUs of a worker: the largest has 2 CPUs'
    >>> lacking([(16, 0), (2, 1)], 4, True)
    'no node of the Ray cluster has the 4 CPUs and 1 GPU of a worker: the largest has 2 CPUs and 1 GPU'
    """
    if any(own >= cpus and gpus >= cuda for own, gpus in nodes):
        return ""
    gpus, own = max(((gpus, own) if cuda else (0, own) for own, gpus in nodes), default=(0, 0))
    wanted, largest = many(cpus, "CPU"), many(own, "CPU")
    if cuda:
        wanted, largest = f"{wanted} and 1 GPU", f"{largest} and {many(gpus, 'GPU')}"
    return f"no node of the Ray cluster has the {wanted} of a worker: the largest has {largest}"


def _is_fixed(ray: Any) -> bool:
    """Tell whether a cluster is known not to grow by itself: Ray names nodes that were started by hand so."""
    with suppress(Exception):  # no part of Ray's interface: where it has changed, nothing is known
        store = importlib.import_module("ray.experimental.internal_kv")
        told = json.loads(store._internal_kv_get("__autoscaling_status"))
        kinds = {*told["autoscaler_report"]["active_nodes"]}
        return bool(kinds) and kinds <= {f"node_{node['NodeID']}" for node in ray.nodes()}
    return False


def placed(workers: int, threads: int, nodes: Sequence[tuple[int, int]], cuda: bool) -> tuple[int, int]:
    """Return how many workers there are on the nodes of a cluster, with how many threads each.

    Args:
        workers: As many as are wanted; 0: as many as there are cores for, or GPUs.
        threads: As many as are wanted; 0: a share of the cores.
        nodes: CPUs and GPUs of each.
        cuda: Whether each worker has a GPU.

    >>> placed(0, 0, [(8, 0), (32, 2)], False), placed(0, 4, [(2, 2), (32, 2), (64, 1)], True)
    ((40, 1), (3, 4))
    >>> placed(0, 0, [(8, 0), (32, 2), (64, 1)], True), placed(1, 0, [(16, 4)], True)
    ((3, 16), (1, 16))
    """
    if cuda:
        found = [(cpus, gpus) for cpus, gpus in nodes if gpus and cpus] or [(1, 1)]
        count = workers or max(1, sum(min(gpus, cpus // (threads or 1)) for cpus, gpus in found))
        return count, threads or max(1, min(cpus // min(gpus, count) for cpus, gpus in found))
    cores = [cpus for cpus, _ in nodes if cpus] or [1]
    return sizes(workers, threads, sum(cores), min(cores))


def _identify() -> None:
    """Have Ray, which listens only before it is imported, show its token.

    A cluster asks for a token wherever ``ray start`` found one; who joins it shows one only if told to.
    """
    tokens = (os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token")
    files = (Path(path).expanduser() for path in tokens if path)
    if os.environ.get("RAY_AUTH_TOKEN") or any(path.is_file() for path in files):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def _tame() -> Iterator[None]:
    """Keep Ray from what it does unasked: to write to standard error, and to exit at SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    sys.stderr.flush()
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _begin(ray: Any, address: str, **options: Any) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:  # Ray itself would try for more than a minute
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        with _tame():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as fault:
        first = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        what = "Ray does not start" if address == "local" else f"no Ray cluster at {address}"
        hint = f"check RAY_ADDRESS, set {TOKEN}" if address != "local" else "see its logs in /tmp/ray"
        raise ImgtoolError(f"{what}: {first}", f"{hint}, or take --runner processes") from None


def _doubt() -> str:
    """Return what may be wrong where actors die as they start: a cluster without tokens takes none."""
    joined = os.environ.get("RAY_ADDRESS") not in (None, "", "local")
    if not joined or os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    return "; if the cluster asks for no token, set RAY_AUTH_MODE=disabled"


def sizes(workers: int, threads: int, cores: int, largest: int) -> tuple[int, int]:
    """Return how many workers there are, with how many threads each.

    Args:
        workers: As many as are wanted; 0: as many as there are cores for.
        threads: As many as are wanted; 0: a share of the cores, one where ``workers`` is 0 too.
        cores: CPUs in all.
        largest: CPUs that one worker can have.

    >>> sizes(0, 0, 8, 8), sizes(2, 0, 8, 8), sizes(0, 4, 8, 8), sizes(16, 0, 8, 8), sizes(2, 0, 64, 8)
    ((8, 1), (2, 4), (2, 4), (16, 1), (2, 8))
    """
    count = workers or max(1, cores // (threads or 1))
    return count, threads or min(largest, max(1, cores // count))


@dataclass
class Cluster:
    """Starts actors, each with as many CPUs as it has threads, and a GPU where the settings name CUDA.

    Attributes:
        brief: What each is told.
        ours: Whether the connection is ours to end.
        say: Told that actors wait for a place: once, or as long as all of them do.
        running: The actor of each hand, and the answers that are awaited.
        placed: Answers that come as soon as an actor has a place, and since when they are awaited.
    """

    brief: Brief
    ours: bool
    say: Callable[[str], None]
    running: dict[Hand, tuple[Any, deque[Any]]] = field(default_factory=dict)
    placed: dict[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take Ray, which is imported."""
        self.ray: Any = importlib.import_module("ray")
        self.cuda = self.brief.settings.device.startswith("cuda")
        if self.cuda:  # the one that Ray gives is the only one that the actor sees
            settings = self.brief.settings.model_copy(update={"device": "cuda"})
            self.brief = replace(self.brief, settings=settings)
        # One that died is replaced by the dealer, who knows what it worked on.
        options = {"num_cpus": self.brief.settings.threads, "num_gpus": int(self.cuda), "max_restarts": 0}
        self.actor = self.ray.remote(**options)(Worker)

    def hire(self) -> Hand:
        """Begin to start an actor; where the cluster has no room for it, it starts when there is."""
        hand = Hand()
        actor = self.actor.remote(self.brief)
        self.placed[actor.__ray_ready__.remote()] = time.monotonic()
        self.running[hand] = actor, deque([actor.start.remote()])
        return hand

    def call(self, hand: Hand, more: Sequence[Dealt], most: int) -> None:
        """Send a call; that an actor has died is among the news."""
        actor, answers = self.running[hand]
        answers.append(actor.do.remote(more, most))

    def news(self, seconds: float) -> list[News]:
        """Return the oldest answer, or the end, of each actor that has one."""
        hands = {answers[0]: hand for hand, (_, answers) in self.running.items() if answers}
        if not hands:
            return []
        ready, _ = self.ray.wait([*hands], num_returns=1, timeout=seconds)
        if self.placed and time.monotonic() - min(self.placed.values()) > CROWDED:
            self._tell_of_crowd()
        if len(hands) > MANY:  # one by one, the last of them would wait
            ready, _ = self.ray.wait([*hands], num_returns=len(hands), timeout=0)
        return [(hands[answer], self._heard(hands[answer], answer)) for answer in ready]

    def _tell_of_crowd(self) -> None:
        _, waiting = self.ray.wait([*self.placed], num_returns=len(self.placed), timeout=0)
        self.placed = {answer: self.placed[answer] for answer in waiting}
        now = time.monotonic()
        if any(now - since > CROWDED for since in self.placed.values()):
            none = len(waiting) == len(self.running)
            self.placed = dict.fromkeys(waiting, now - CROWDED + REMINDER) if none else {}
            cpus, verb = self.brief.settings.threads, "waits" if len(waiting) == 1 else "wait"
            each = f"{many(cpus, 'CPU')}{' and 1 GPU' * self.cuda} each"
            lack = lacking(_nodes(self.ray), cpus, self.cuda)
            self.say(
                f"{len(waiting)} of {many(len(self.running), 'worker')} {verb} for room in the Ray cluster, "
                f"{each}{': ' * bool(lack)}{lack}"
            )

    def _heard(self, hand: Hand, answer: Any) -> Any:
        try:
            found = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as fault:
            actor, _ = self.running.pop(hand)
            self.ray.kill(actor)  # one that only cannot be reached must not go on
            return Lost(type(fault).__name__ + _doubt() * (not hand.worker))
        self.running[hand][1].popleft()
        return found

    def close(self, at_once: bool) -> None:
        """End the actors, and the cluster that is ours; idle ones leave nothing on machines of their own."""
        if self.brief.plan and self.running and not at_once:
            ended = [actor.close.remote() for actor, _ in self.running.values()]
            self.ray.wait(ended, num_returns=len(ended), timeout=GRACE)
        for actor, _ in self.running.values():
            self.ray.kill(actor)
        self.running.clear()
        if self.ours:
            self.ray.shutdown()

"""The search of the original's space: limits before training, nothing done twice, what is measured where."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgtool import plots, train
from imgtool.console import Console
from imgtool.engines.awb import forward, measure, model, search
from imgtool.engines.awb.engine import ENGINE
from imgtool.engines.awb.settings import Train
from imgtool.errors import FAILED, USAGE, ImgtoolError
from imgtool.search import campaign, samplers, space
from imgtool.search.board import Board
from imgtool.search.campaign import Search
from imgtool.search.cost import Cost, Limits, Unmeasured
from imgtool.train import searching

CHEAP = {"channels": [16, 16, 16], "kernels": [3, 3, 3], "strides": [3, 3, 1], "widths": [30, 10]} | {
    "height": 144, "width": 216,
}  # fmt: skip


def point(**changes: float) -> dict[str, float]:
    """A point of the space: small, but for the changes."""
    plain = {"neurons": 60.2, "decay": 0.5, "layers": 2.0, "lr": 1e-3, "final_rate": 1e-5}
    blocks = {
        f"{name}{n}": v
        for n in (1, 2, 3)
        for name, v in (("channels", 20.0), ("reach", 1.0), ("stride", 2.0))
    }
    return plain | {"weight_decay": 1e-5, "halves": 6.0} | blocks | changes


class List:
    """A sampler that proposes what it was given, as trials from a number on."""

    def __init__(self, points: Sequence[Mapping[str, float]], begin: int = 0) -> None:
        self.points, self.next, self.told = list(points), begin, []

    def __call__(self) -> List:
        return self

    def ask(self) -> tuple[int, Mapping[str, float]]:
        self.next += 1
        return self.next - 1, self.points.pop(0)

    def tell(self, row: dict[str, Any]) -> None:
        scores = {"recovery": row["score"], "cpu_ms": row["cpu_ms"]} if row["status"] == "trained" else None
        self.told.append((row["point"], scores))


@dataclass
class Crew:
    """Trains nothing: the error is what ``error`` says of the settings, or what it raises."""

    folder: Path
    error: Callable[[Train], float] = lambda settings: 3.0
    trained: dict[str, Train] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)

    def train(self, settings: Train, name: str) -> Mapping[str, Any]:
        self.trained[name] = settings
        scores = {"recovery": self.error(settings), "reproduction": 5.0}
        return {"best": {"scores": scores}, "folder": name, "weights": f"{name}/best.safetensors"}


@dataclass
class Gauge:
    """Costs in ms as many as the channels of the first block, in MB twice the second's; counts the asking."""

    asked: list[measure.Structure] = field(default_factory=list)

    def __call__(self, net: measure.Structure, limits: Limits) -> Cost:
        self.asked.append(net)
        return Cost(float(net["channels"][0]), 2.0 * net["channels"][1])


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was to be drawn: pictures take time, and have tests of their own."""
    found: list[Any] = []
    monkeypatch.setattr(
        plots, "front", lambda points, best, path, **words: found.append((points, best, path))
    )
    return found


def begin(given: Train, crew: Crew, gauge: Gauge) -> Search:
    """The search as the engine describes it, but for what is measured."""
    return Search(ENGINE, given, crew, dataclasses.replace(search.task(given), gauge=gauge))


def settings(count: int, **more: Any) -> Train:
    return Train(search=count, max_ms=40, max_mb=100, **more)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]


def sized(*first: float, **more: float) -> list[dict[str, float]]:
    """Points whose first block has so many channels, and the others at least as many."""
    return [point(channels1=c, channels2=max(c, 20), channels3=max(c, 60), **more) for c in first]


# --- budgets ---


def test_over_budget_is_never_trained(tmp_path: Path) -> None:
    slow, large = sized(41)[0], point(channels2=51, channels3=51)
    sampler, crew = List([slow, *sized(20), large, *sized(40)]), Crew(tmp_path)
    record = begin(settings(2), crew, Gauge()).go(sampler)
    assert list(crew.trained) == ["trial-001", "trial-003"]
    assert [row["status"] for row in rows(tmp_path)] == ["rejected", "trained", "rejected", "trained"]
    assert [scores for _, scores in sampler.told] == [
        None, {"recovery": 3.0, "cpu_ms": 20.0}, None, {"recovery": 3.0, "cpu_ms": 40.0},
    ]  # fmt: skip
    assert (record["trials"], record["rejected"], record["failed"], record["trained"]) == (4, 2, 0, 2)


def test_one_structure_is_measured_once(tmp_path: Path) -> None:
    gauge = Gauge()
    same = [point(), point(lr=2e-3), point(weight_decay=1e-4, stride1=2.3), point(neurons=61)]
    begin(settings(4), Crew(tmp_path), gauge).go(List(same))
    assert len(gauge.asked) == 2
    assert len({row["structure"] for row in rows(tmp_path)}) == 2


def test_hopeless_and_impossible_networks_are_not_even_measured(tmp_path: Path) -> None:
    huge = point(
        halves=2, stride1=1, stride2=1, **{f"reach{n}": 3 for n in (1, 2, 3)}, channels2=250, channels3=256
    )
    shrunk = point(**{f"{name}{n}": v for n in (1, 2, 3) for name, v in (("reach", 3), ("stride", 5))})
    starved = point(neurons=40, decay=1.5, layers=5)
    gauge = Gauge()
    begin(settings(1), Crew(tmp_path), gauge).go(List([huge, shrunk, starved, point()]))
    assert len(gauge.asked) == 1
    found = rows(tmp_path)
    assert [row["status"] for row in found] == ["rejected"] * 3 + ["trained"]
    assert [row["cpu_ms"] is None for row in found] == [False, True, True, False]
    assert "at least" in found[0]["why"]


def test_nothing_within_the_budget_is_said_with_the_smallest_figures(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    with pytest.raises(ImgtoolError, match=r"none of 20 candidates .* 41 ms, 82 MB") as caught:
        begin(settings(1), crew, Gauge()).go(List(sized(*range(60, 40, -1))))
    assert "--max-ms" in caught.value.hint
    assert not crew.trained


def refusing(gauge: Gauge, fault: ImgtoolError, *channels: int) -> Callable[[Any, Limits], Cost]:
    """The gauge, which raises for networks whose first block has so many channels."""

    def measured(net: measure.Structure, limits: Limits) -> Cost:
        if net["channels"][0] in channels:
            gauge.asked.append(net)
            raise fault
        return gauge(net, limits)

    return measured


def test_what_cannot_be_measured_is_rejected_and_the_search_goes_on(tmp_path: Path) -> None:
    crew, gauge = Crew(tmp_path), Gauge()
    found = begin(settings(2), crew, gauge)
    broken = refusing(gauge, Unmeasured("measuring ended: killed"), 20, 22, 24, 26)
    found.task = dataclasses.replace(found.task, gauge=broken)
    record = found.go(List(sized(20, 22, 30, 24, 26, 32)))
    assert [row["status"] for row in rows(tmp_path)] == [*["rejected"] * 2, "trained"] * 2
    assert rows(tmp_path)[0]["why"] == "measuring ended: killed"
    assert (record["rejected"], record["trained"]) == (4, 2)


def test_several_that_cannot_be_measured_end_the_search_which_can_go_on(tmp_path: Path) -> None:
    gauge = Gauge()
    found = begin(settings(1), Crew(tmp_path), gauge)
    broken = refusing(gauge, Unmeasured("measuring ended: killed"), 20, 22, 24)
    found.task = dataclasses.replace(found.task, gauge=broken)
    with pytest.raises(ImgtoolError, match="killed"):
        found.go(List(sized(20, 22, 24, 30)))
    assert len(gauge.asked) == 3
    again = begin(settings(1), Crew(tmp_path), gauge)
    again.task = found.task
    assert again.go(List(sized(30), 3))["trained"] == 1
    assert len(gauge.asked) == 4


def test_a_machine_that_measures_nothing_rejects_nothing(tmp_path: Path) -> None:
    found = begin(settings(1), Crew(tmp_path), Gauge())
    broken = refusing(Gauge(), ImgtoolError("ssh cannot reach pi"), 20)
    found.task = dataclasses.replace(found.task, gauge=broken)
    with pytest.raises(ImgtoolError, match="ssh cannot reach pi"):
        found.go(List(sized(20)))
    assert [row["status"] for row in rows(tmp_path)] == ["measuring"]
    begin(settings(1), Crew(tmp_path), Gauge()).go(List([]))
    assert [row["status"] for row in rows(tmp_path)] == ["trained"]


def test_values_that_do_not_fit_together_are_rejected(tmp_path: Path) -> None:
    found = begin(settings(1), Crew(tmp_path), Gauge())
    wrong = lambda values: search.parameters(values) | {"steps": 0 if values["lr"] == 2e-3 else 5}  # noqa: E731
    found.task = dataclasses.replace(found.task, settings=wrong)
    found.go(List([point(lr=2e-3), point()]))
    assert [row["status"] for row in rows(tmp_path)] == ["rejected", "trained"]
    assert "steps" in rows(tmp_path)[0]["why"]


def test_a_computed_bound_is_no_measurement(tmp_path: Path) -> None:
    huge = {"halves": 2, "stride1": 1, "stride2": 1, "channels2": 250, "channels3": 256, "reach3": 3}
    gauge = Gauge()
    with pytest.raises(ImgtoolError, match="none of 20 candidates"):
        begin(settings(1), Crew(tmp_path), gauge).go(List([point(**huge)] * 20))
    assert not gauge.asked
    record = begin(Train(search=2, max_ms=1e3, max_mb=1e3), Crew(tmp_path), gauge).go(
        List([point(**huge, lr=lr) for lr in (2e-3, 3e-3)], 20)
    )
    assert len(gauge.asked) == 1
    assert record["best"]["mb"] == 500  # as it was measured
    for path in (tmp_path / "trials").glob("0*.json"):
        path.write_text(path.read_text().replace('"measured": true', '"measured": false'))
    assert begin(Train(search=2, max_ms=1e3, max_mb=1e3), Crew(tmp_path), gauge).report()["front"] == []


# --- beside others ---


def test_who_finds_all_places_taken_ends_without_a_fault(tmp_path: Path) -> None:
    helper, records = Crew(tmp_path), []

    def meanwhile(trial: Train) -> float:
        records.append(begin(settings(1), helper, Gauge()).go(List([])))
        return 3.0

    assert begin(settings(1), Crew(tmp_path, meanwhile), Gauge()).go(List([point()]))["trained"] == 1
    assert (records[0]["front"], records[0]["best"], records[0]["config"]) == ([], None, None)
    assert "not ended: trial-000" in helper.said[0]
    assert not helper.trained


def test_what_another_process_took_over_is_left_to_it(tmp_path: Path) -> None:
    def overslept(trial: Train) -> float:
        (tmp_path / "trials" / "trial-000.claim-1").write_text(
            '{"host": "elsewhere", "pid": 1, "token": "x"}'
        )
        return 3.0

    crew, sampler = Crew(tmp_path, overslept), List([point()])
    assert begin(settings(1), crew, Gauge()).go(sampler)["best"] is None
    assert [row["status"] for row in rows(tmp_path)] == ["training"]
    assert "trial-000: another process took it over" in crew.said
    assert not sampler.told


def test_what_a_sampler_claims_is_given_back_when_it_cannot_begin(tmp_path: Path) -> None:
    found = begin(settings(1), Crew(tmp_path), Gauge())

    def claims() -> List:
        assert found.board.claim("controller")
        raise ImgtoolError("Ax does not start")

    with pytest.raises(ImgtoolError, match="Ax does not start"):
        found.go(claims)
    assert Board(tmp_path).claim("controller")


# --- the trials ---


def test_trials_train_the_candidate_on_a_split_of_their_own(tmp_path: Path) -> None:
    crew = Crew(tmp_path)
    given = settings(1, folds=5, train_on_all=True, steps=7)
    record = begin(given, crew, Gauge()).go(List([point(lr=2e-3, reach2=2, stride3=1)]))
    (trial,) = crew.trained.values()
    assert (trial.arch, trial.search, trial.fold, trial.folds, trial.train_on_all) == (
        "deepawb",
        0,
        0,
        5,
        False,
    )
    assert (trial.channels, trial.kernels, trial.strides) == ("20,20,20", "3,5,3", "2,2,1")
    assert (trial.height, trial.width, trial.steps, trial.lr, trial.final_lr) == (144, 216, 7, 2e-3, 5e-3)
    assert "test data was not read" in record["selection"]
    plain = Crew(tmp_path / "plain")
    begin(settings(1), plain, Gauge()).go(List([point()]))
    assert next(iter(plain.trained.values())).fold == -1


def test_a_failed_training_is_noted_and_the_search_goes_on(tmp_path: Path) -> None:
    def error(trial: Train) -> float:
        if trial.lr == 2e-3:
            raise ImgtoolError("loss not finite")
        return 3.0

    sampler, crew = List([point(lr=2e-3), point()]), Crew(tmp_path, error)
    record = begin(settings(2), crew, Gauge()).go(sampler)
    assert (record["failed"], record["trained"]) == (1, 1)
    assert rows(tmp_path)[0]["why"] == "loss not finite"
    assert sampler.told[0][1] is None


@pytest.mark.parametrize(("code", "tries", "next_one"), [(FAILED, 3, 3), (USAGE, 1, 0)])
def test_what_fails_always_ends_the_search_which_can_go_on(
    tmp_path: Path, code: int, tries: int, next_one: int
) -> None:
    def broken(trial: Train) -> float:
        raise ImgtoolError("no frame", code=code)

    crew = Crew(tmp_path, broken)
    with pytest.raises(ImgtoolError, match="no frame"):
        begin(settings(5), crew, Gauge()).go(List([point(lr=lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]))
    assert len(crew.trained) == tries
    mended = Crew(tmp_path)
    begin(settings(next_one + 1), mended, Gauge()).go(List([point(lr=5e-3)] * next_one, next_one))
    assert list(mended.trained) == [f"trial-{next_one:03}"]  # what was asked wrongly is tried once more


def test_an_interrupted_search_repeats_nothing(tmp_path: Path) -> None:
    def cut(trial: Train) -> float:
        if trial.lr == 3e-3:
            raise KeyboardInterrupt
        return 1e3 * trial.lr

    points = [*sized(50), *[point(lr=lr, channels1=16) for lr in (2e-3, 3e-3)]]
    with pytest.raises(KeyboardInterrupt):
        begin(settings(3), Crew(tmp_path, cut), Gauge()).go(List(points))
    gauge, sampler, crew = (
        Gauge(),
        List([point(lr=4e-3, channels1=16)], 3),
        Crew(tmp_path, lambda trial: 1e3 * trial.lr),
    )
    record = begin(settings(3), crew, gauge).go(sampler)
    assert list(crew.trained) == ["trial-002", "trial-003"]
    assert not gauge.asked
    told = [({**each, "lr": each["lr"]}, scores and scores["recovery"]) for each, scores in sampler.told]
    assert told == list(zip([*points, point(lr=4e-3, channels1=16)], [None, 2.0, 3.0, 4.0], strict=True))
    assert record["trials"] == 4


def test_a_search_does_not_mix_machines() -> None:
    with pytest.raises(ImgtoolError, match="goes on as it began, with --remote pi") as caught:
        searching.check_same(settings(1, remote="pi"), settings(1))
    assert caught.value.code == USAGE
    searching.check_same(settings(1), settings(9, out=Path("elsewhere"), max_parameters=5))


# --- the front ---


def test_front_is_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 30, 60):
        points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (count, 2))]

        def beaten(one: tuple[float, float], points: Sequence[tuple[float, float]] = points) -> bool:
            return any(two != one and two[0] <= one[0] and two[1] <= one[1] for two in points)

        assert sorted(campaign.front(points)) == [i for i, each in enumerate(points) if not beaten(each)]


def test_front_is_written_and_returned(tmp_path: Path, drawn: list[Any]) -> None:
    errors = {16: 4.0, 20: 3.0, 24: 3.5, 30: 2.0}
    crew = Crew(tmp_path, lambda trial: errors[int(trial.channels.split(",")[0])])
    record = begin(settings(4), crew, Gauge()).go(List(sized(30, 50, 24, 16, 20)))
    assert [each["cpu_ms"] for each in record["front"]] == [16, 20, 30]
    assert [each["score"] for each in record["front"]] == [4.0, 3.0, 2.0]
    assert record["metric"] == "recovery"
    assert record["best"]["trial"] == 0
    assert record["best"]["weights"] == "trial-000/best.safetensors"
    assert json.loads((tmp_path / "pareto.json").read_text()) == record
    table = list(csv.DictReader((tmp_path / "pareto.csv").read_text().splitlines()))
    assert [row["trial"] for row in table] == ["3", "4", "0"]
    assert table[0]["channels"] == "16,20,60"
    assert len(drawn) == 5  # after every training, and at the end
    points, best, path = drawn[-1]
    assert {number: x for number, (x, _) in points.items()} == {0: 30, 1: 50, 2: 24, 3: 16, 4: 20}
    assert np.isnan(points[1][1])
    assert (list(best), path) == ([3, 4, 0], tmp_path / "pareto.png")


# --- the space ---


def test_every_point_makes_settings_of_the_original_space() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawn = {name: rng.uniform(*each.bounds()) for name, each in search.SPACE.items()}
        made = Train(**search.parameters(space.taken(search.SPACE, drawn)))
        channels, kernels, strides = (
            [int(word) for word in text.split(",")] for text in (made.channels, made.kernels, made.strides)
        )
        assert 16 <= channels[0] <= channels[1] <= channels[2] <= 256
        assert set(kernels) <= {3, 5, 7}
        assert all(1 <= stride <= kernel for stride, kernel in zip(strides, kernels, strict=True))
        assert (made.height, made.width) in {(432, 648), (288, 432), (216, 324), (173, 259), (144, 216)}
        assert 40 <= made.neurons <= 250
        assert 2 <= made.layers <= 5
        assert 1e-4 <= made.lr <= 1e-2
        assert 0.99e-6 <= made.lr * made.final_lr <= 1.01e-4
    assert len(search.SPACE) == 16


@pytest.mark.parametrize(
    ("sampler", "said", "extra"), [("", "Ax", "search-ax"), ("optuna", "Optuna", "search")]
)
def test_without_its_package_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, said: str, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImgtoolError, match=f"--search needs {said}") as caught:
        train.run(ENGINE, settings(3, sampler=sampler, out=tmp_path), Console(quiet=True))
    assert (caught.value.code, caught.value.hint) == (USAGE, f"pip install 'imgtool[{extra}]'")
    assert not list(tmp_path.iterdir())


def test_test_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for part in ("train", "test"):
        (tmp_path / part / "PNG").mkdir(parents=True)
        (tmp_path / part / "PNG" / "00_0001.png").touch()
        (tmp_path / part / "gt.csv").write_text("image,r,g,b\n00_0001,0.2,0.5,0.3\n")
    with pytest.raises(ImgtoolError, match="holds test data") as caught:
        search.task(settings(3, data=(tmp_path,)))
    assert str(tmp_path / "train") in caught.value.hint
    assert caught.value.code == USAGE


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ax") is None, reason="needs imgtool[search-ax]")
def test_ax_searches_and_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    known = Crew(tmp_path)
    begin(settings(1), known, Gauge()).go(List([point(channels1=70, channels2=70, channels3=70), point()]))
    gauge = Gauge()
    again = begin(settings(3), Crew(tmp_path, lambda trial: trial.neurons / 50), gauge)
    asked = campaign.question(ENGINE, again.settings, again.task)
    record = again.go(lambda: samplers.Ax(asked, 2))
    assert record["trained"] == 3
    assert record["trials"] >= 4
    found = [row["point"] for row in rows(tmp_path)]
    assert len({json.dumps(each) for each in found}) == len(found)
    for each in found:
        assert each["channels1"] <= each["channels2"] <= each["channels3"]
        assert all(each[f"stride{n}"] <= 2 * each[f"reach{n}"] + 1 + 1e-6 for n in (1, 2, 3))
    assert capfd.readouterr() == ("", "")


# --- measuring ---


def test_what_is_measured_is_the_network_that_would_be_trained() -> None:
    shape = model.Model(
        arch="deepawb",
        channels="16,20,24",
        kernels="3,5,7",
        strides="2,1,3",
        neurons=70,
        layers=3,
        height=60,
        width=90,
    )
    net = model.build(shape).eval()
    made = measure.random_state(search.structure(shape.model_dump()))
    real = {name: tuple(value.shape) for name, value in net.state_dict().items() if "num_batches" not in name}
    assert {name: value.shape for name, value in made.items()} == real
    counted = sum(each.numel() for each in net.parameters())
    assert measure.parameters(search.structure(shape.model_dump())) == counted
    net.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()}, strict=False)
    x = np.random.default_rng(0).normal(size=(3, 60, 90)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(forward.deepawb(made, x, strides=(2, 1, 3), layers=3), expected, atol=1e-5)


@pytest.mark.slow
def test_a_space_of_a_file_holds_networks_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text("[search.awb]\narch = ['hist', 'deepawb']\nlr = {low = 1e-4, high = 1e-2, log = true}\n")
    given = settings(2, space=path, folds=4)
    crew = Crew(tmp_path)
    found = Search(ENGINE, given, crew, search.task(given))
    record = found.go(List([{"arch": "hist", "lr": 1e-3}, {"arch": "hist", "lr": 2e-3}]))
    assert record["trained"] == 2
    assert [trial.arch for trial in crew.trained.values()] == ["hist", "hist"]
    assert [trial.fold for trial in crew.trained.values()] == [0, 0]
    assert rows(tmp_path)[0]["cpu_ms"] == rows(tmp_path)[1]["cpu_ms"] < 40
    assert rows(tmp_path)[0]["parameters"] == 6082
    with pytest.raises(ImgtoolError, match="--remote measures") as caught:
        search.task(settings(2, space=path, remote="pi"))
    assert caught.value.code == USAGE


@pytest.mark.slow
def test_measuring_here_gives_more_than_the_least() -> None:
    cost, least = measure.here(CHEAP, 10), measure.least(CHEAP)
    assert least.cpu_ms < cost.cpu_ms < 1000
    assert 20 < cost.mb < 100  # Python and NumPy alone take about 25
    assert cost.measured
    assert not least.measured


def test_least_is_counted_by_hand() -> None:
    net = {"channels": [2, 3, 4], "kernels": [3, 3, 5], "strides": [2, 1, 1], "height": 40, "width": 60}
    products = 3 * 2 * 9 * 20 * 30 + 2 * 3 * 9 * 10 * 15 + 3 * 4 * 25 * 5 * 7
    convolved = 3 * 2 * 9 + 2 * 3 * 9 + 3 * 4 * 25 + 2 * (2 + 3 + 4)
    dense = (4 + 1) * 6 + (6 + 1) * 2
    found = measure.least(net | {"widths": [6]})
    assert found == Cost(products / 1e9, 4 * 3 * 9 * 20 * 30 / 1e6, False, convolved + dense)


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, on PATH, with an ssh that runs the command here instead of there."""
    program(tmp_path, "python3", f'exec "{sys.executable}" "$@"\n')
    program(
        tmp_path,
        "ssh",
        'echo "$@" >"$(dirname "$0")/called"\nwhile [ "$1" != -- ]; do shift; done\nshift 2\neval "$@"\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.slow
def test_another_machine_needs_nothing_but_python_and_numpy(host: Path) -> None:
    cost = measure.there(CHEAP, 10, "me@pi")
    assert 0 < cost.cpu_ms < 1000
    assert 20 < cost.mb < 100
    called = (host / "called").read_text().split()
    assert called[-4:] == ["--", "me@pi", "python3", "-"]
    assert "BatchMode=yes" in called
    assert not any("StrictHostKeyChecking" in word for word in called)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", "cannot reach pi: Permission denied"),
        ("echo 'sh: python3: not found' >&2; exit 127", "no python3 on pi"),
        ("echo 'killed' >&2; exit 137", "on pi ended: killed"),
        ('echo \'{"error": "numpy is missing", "hint": "h"}\'', "on pi: numpy is missing"),
        ("echo Welcome", "is not the measurement"),
        ('echo \'{"cpu_ms": 1, "mb": 2, "hash": "of another network"}\'', "is not the measurement"),
        ('echo \'{"cpu_ms": NaN, "mb": 2, "hash": ""}\'', "is not the measurement"),
    ],
)
def test_what_another_machine_lacks_is_one_clear_line(host: Path, text: str, message: str) -> None:
    program(host, "ssh", f"cat >/dev/null\n{text}\n")
    with pytest.raises(ImgtoolError, match=message) as caught:
        measure.there(CHEAP, 10, "pi")
    assert caught.value.hint
    assert isinstance(caught.value, Unmeasured) == ("137" in text)  # the others are of the machine


def test_a_machine_without_an_answer_is_given_up(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(host, "ssh", "exec sleep 30\n")
    monkeypatch.setattr(measure, "PATIENCE", 0.2)
    with pytest.raises(Unmeasured, match=r"more than 0\.2 s"):
        measure.there(CHEAP, 10, "pi")
    monkeypatch.setenv("PATH", str(host / "none"))
    with pytest.raises(ImgtoolError, match="ssh is not installed"):
        measure.there(CHEAP, 10, "pi")


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", ""])
def test_an_option_is_no_host(host: str) -> None:
    with pytest.raises(ImgtoolError, match="not a host") as caught:
        measure.there(CHEAP, 10, host)
    assert caught.value.code == USAGE


def test_numpy_missing_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert "numpy" in measure.answer({"net": CHEAP, "max_ms": 10})["error"]

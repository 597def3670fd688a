"""The filter engine's record: losses and scores by hand, baselines, when it is enough, sample sheets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgtool.engines.filter.engine import ENGINE, nothing
from imgtool.engines.filter.sample import Sample
from imgtool.engines.filter.settings import Train


class Fixed(nn.Module):
    """Gives the same, whatever it sees."""

    def __init__(self, output: Tensor, reach: int = 1) -> None:
        super().__init__()
        self.output, self.reach, self.seen = output, reach, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.output


def sample(seen: int, wanted: list[float], size: int = 2) -> Sample:
    """One crop of two pixels each way with one pixel around, in one tone; wanted is one tone per channel."""
    maps = torch.tensor(wanted).view(1, -1, 1, 1).expand(1, len(wanted), size, size).clone()
    return Sample(torch.full((1, 3, size + 2, size + 2), seen, dtype=torch.uint8), maps)


def train(**values: Any) -> Train:
    return Train(synthetic=1, **values)


# --- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", {"l1": 0.3}),
        ("l2", {"l2": 0.1}),  # (0.4^2 + 0.2^2) / 2
        ("log-cosh", {"log-cosh": (math.log(math.cosh(0.4)) + math.log(math.cosh(0.2))) / 2}),
        ("relative-mse", {"relative-mse": 0.1 / (0.5 + 1e-4)}),  # all that is wanted is left: (1^2 + 0) / 2
    ],
)
def test_a_loss_by_hand(name: str, expected: dict[str, float]) -> None:
    """Outputs 0.6 and 0.2 where 1 and 0 are wanted."""
    batch = sample(255, [1.0])
    batch.wanted[..., 1] = 0.0
    output = torch.tensor([[0.6, 0.2], [0.6, 0.2]])[None, None]
    terms = ENGINE.loss(Fixed(output), batch, train(loss=name))
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, abs=1e-6)


def test_all_losses_are_three_terms() -> None:
    net, batch = Fixed(torch.full((1, 1, 2, 2), 0.5)), sample(0, [0.0])
    terms = ENGINE.loss(net, batch, train(loss="all"))
    assert list(terms) == ["l1", "l2", "log-cosh"]
    assert [value.item() for value in terms.values()] == pytest.approx([0.5, 0.25, math.log(math.cosh(0.5))])


def test_the_share_that_is_left_of_a_change_of_colours() -> None:
    """The photo is 0.2, 0.4 is wanted and 0.3 was found: a quarter of the squared error."""
    net, batch = Fixed(torch.full((1, 3, 2, 2), 0.3)), sample(51, [0.4] * 3)
    found = ENGINE.loss(net, batch, train(loss="relative-mse"))["relative-mse"]
    assert found.item() == pytest.approx(0.01 / (0.04 + 1e-4), rel=1e-4)


def test_a_network_sees_the_photo_in_0_to_1_with_what_surrounds_it() -> None:
    net = Fixed(torch.zeros(1, 1, 2, 2))
    ENGINE.loss(net, sample(51, [0.0]), train())
    assert net.seen.shape == (1, 3, 4, 4)
    assert torch.equal(net.seen, torch.full_like(net.seen, 51 / 255))


# --- scores -----------------------------------------------------------------------------------


def test_scores_of_a_map_beside_black() -> None:
    """0.5 is wanted, 0.4 found: in 8 bits 102 levels."""
    found = ENGINE.score(Fixed(torch.full((1, 1, 2, 2), 0.4004)), sample(255, [0.5]))
    assert found["l2"].item() == pytest.approx(0.01, rel=1e-4)
    assert found["psnr"].item() == pytest.approx(20, abs=1e-3)
    assert found["gain"].item() == pytest.approx(20 + 10 * math.log10(0.25), abs=1e-3)


def test_scores_of_three_colours_beside_the_photo() -> None:
    """Black was there, 0.6 is wanted and 0.4 found; what is below 0 and above 1 is cut off."""
    found = ENGINE.score(Fixed(torch.full((1, 3, 2, 2), 0.4)), sample(0, [0.6] * 3))
    assert found["gain"].item() == pytest.approx(20 * math.log10(3), abs=1e-4)
    beyond = torch.tensor([-5.0, 0.2, 7.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert ENGINE.score(Fixed(beyond), sample(0, [0.0, 0.2, 1.0]))["psnr"].item() == 100


def test_slopes_are_scored_with_their_signs() -> None:
    output = torch.tensor([-0.5, 0.3]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    found = ENGINE.score(Fixed(output), sample(0, [-0.5, 0.5]))
    assert found["l2"].item() == pytest.approx(0.02, rel=1e-5)
    assert found["gain"].item() == pytest.approx(10 * math.log10(0.25 / 0.02), abs=1e-3)


def test_scores_are_those_of_each_crop() -> None:
    batch = Sample(
        *(torch.cat([one, other]) for one, other in zip(sample(0, [0.0]), sample(0, [0.2]), strict=True))
    )
    found = ENGINE.score(Fixed(torch.zeros(2, 1, 2, 2)), batch)
    assert found["l2"].tolist() == pytest.approx([0, 0.04])
    assert found["gain"].tolist() == [0, 0]


def test_doing_nothing_is_the_photo_without_its_surroundings_or_black() -> None:
    batch = sample(0, [0.0] * 3)
    batch.seen[0, :, 1, 2] = 255
    left = nothing(Fixed(torch.empty(0)), batch)
    assert left.shape == (1, 3, 2, 2)
    assert left.sum(1).tolist() == [[[0, 3], [0, 0]]]
    for channels in (1, 2):
        assert torch.equal(nothing(None, sample(9, [0.5] * channels)), torch.zeros(1, channels, 2, 2))


# --- when it is enough ------------------------------------------------------------------------


def rows(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "scores": {"l2": value}} for number, value in enumerate(values, 1)]


def test_it_is_enough_when_the_smoothed_error_is_below_the_limit() -> None:
    """Halves of what was and of what is: 4, 3, 2.5."""
    settings = train(stop_below=2.6)
    assert ENGINE.enough(rows(4, 2), settings) == ""
    assert ENGINE.enough(rows(4, 2, 2), settings) == "the smoothed held-out l2, 2.5, is below 2.6"
    assert ENGINE.enough(rows(4, 2, 2), train(stop_below=2.5)) == ""
    assert ENGINE.enough(rows(0, 0), train()) == ""
    assert ENGINE.enough([], settings) == ""


def test_an_error_that_is_not_finite_is_not_enough() -> None:
    """The log has None for it; what follows is smoothed from what is known."""
    settings = train(stop_below=2.6)
    assert ENGINE.enough(rows(None), settings) == ""
    assert ENGINE.enough(rows(1, None), settings) == ""
    assert "1.5, is below" in ENGINE.enough(rows(2, None, 1), settings)


def test_only_the_last_stage_is_enough_and_is_smoothed_by_itself() -> None:
    settings = train(stop_below=2.6, stages=2, steps=40)
    assert ENGINE.enough(rows(1, 1), settings) == ""
    assert ENGINE.enough(rows(1, 1, 3), settings) == ""
    assert "2, is below" in ENGINE.enough(rows(9, 9, 2), settings)


# --- sheets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_sheet_has_colours_whatever_the_map_has(channels: int) -> None:
    """Grey as grey, two derivatives in red and green without their signs; no more than six crops."""
    tone = torch.tensor([-0.5, 0.25, 0.75])[:channels].view(1, -1, 1, 1).expand(8, channels, 2, 2)
    batch = Sample(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), tone.clone())
    sheet = ENGINE.samples(Fixed(tone[:6] / 2), batch)
    assert list(sheet) == ["photo", "network", "filter"]
    assert all(each.shape == (6, 3, 2, 2) for each in sheet.values())
    expected = {1: [-0.5] * 3, 2: [0.5, 0.25, 0], 3: [-0.5, 0.25, 0.75]}[channels]
    assert sheet["filter"][0, :, 0, 0].tolist() == expected
    assert sheet["network"][5, :, 1, 1].tolist() == [value / 2 for value in expected]

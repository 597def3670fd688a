"""A narrower network begins with the channels of a wider one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgtool import checkpoint
from imgtool.engines.filter import model, prune
from imgtool.engines.filter.settings import Model, Train
from imgtool.errors import USAGE, ImgtoolError

RECORD: Any = SimpleNamespace(name="filter", model=Model, build=model.build)
WIDE: dict[str, dict[str, Any]] = {
    "fold": {"width": 8, "depth": 3, "target": "bilateral"},
    "dilated": {"width": 7, "dilations": "1,2,3"},
    "unshuffle": {"width": 9, "factor": 2, "dilations": "1,2"},
    "pooled": {"width": 6, "depth": 2, "factor": 2, "context": 8, "carried": 4, "dilations": "1,2"},
    "clapp": {"width": 6, "depth": 2},
}
NARROW: dict[str, dict[str, Any]] = {
    "fold": {"width": 5},
    "dilated": {"width": 4},
    "unshuffle": {"width": 6},
    "pooled": {"width": 4, "context": 5, "carried": 2},
    "clapp": {"width": 4},
}


def network(arch: str, seed: int = 1, **others: Any) -> Any:
    """Build a network none of whose weights is zero."""
    torch.manual_seed(seed)
    net = model.build(Model(arch=arch, **WIDE[arch] | others))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.7).add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def seen_by(net: Any, seed: int = 0) -> Tensor:
    """Return smooth pictures with their margin."""
    edge = -(-32 // net.multiple) * net.multiple + 2 * net.reach
    coarse = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (edge, edge), mode="bilinear", align_corners=True)


@torch.no_grad()
def error(net: nn.Module, other: nn.Module, seen: Tensor) -> float:
    return float((net(seen) - other(seen)).square().mean().sqrt())


def silence(net: Any, arch: str) -> None:
    """Zero channels, a different choice in each layer, so that as many are left as the narrow network has.

    Of the weights that make them and of the biases; half of them keep a bias, which makes them constant.
    """
    generator = torch.Generator().manual_seed(7)
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)][:-1]
    widths = WIDE[arch] | NARROW[arch]
    for name in names:
        layer = net.get_submodule(name)
        kind = "carried" if name == "carry" else "context" if name.startswith("small") else "width"
        block = net.multiple**2 if name == "carry" else 1
        count = layer.out_channels // block
        dead = torch.randperm(count, generator=generator)[: count - widths[kind]]
        rows = (dead[:, None] * block + torch.arange(block)).flatten()
        layer.weight[rows] = 0
        layer.bias[rows] = 0
        layer.bias[dead[:1] * block + torch.arange(block)] = 0.3


@pytest.mark.parametrize("arch", ["fold", "dilated", "unshuffle", "pooled"])
@torch.no_grad()
def test_channels_that_tell_nothing_are_left_out_without_loss(arch: str) -> None:
    """Those that are zero or constant; the constant is made up for."""
    wide, narrow = network(arch), network(arch, 2, **NARROW[arch])
    silence(wide, arch)
    prune.prune(wide, narrow, [seen_by(wide)])
    other = torch.rand(1, 3, 2 * wide.reach + 16, 2 * wide.reach + 16)
    assert float(wide(other).std()) > 0.01
    assert error(wide, narrow, other) < 1e-5


@pytest.mark.parametrize("arch", WIDE)
def test_as_wide_it_is_the_same(arch: str) -> None:
    wide, same = network(arch), network(arch, 2)
    prune.prune(wide, same, [seen_by(wide)])
    assert all(torch.equal(value, wide.state_dict()[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize("arch", WIDE)
def test_it_is_near_the_wide_network(arch: str) -> None:
    """Nearer than its mean, far nearer than a random one, on pictures that channels were not chosen on."""
    wide = network(arch)
    narrow, random = (network(arch, 2, **NARROW[arch]) for _ in range(2))
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    prune.prune(wide, narrow, [seen_by(wide)])
    seen = seen_by(wide, 5)
    assert error(wide, narrow, seen) < 0.3 * error(wide, random, seen)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


@torch.no_grad()
def test_of_twins_one_is_enough() -> None:
    """A channel twice is kept once, though either half counts much; the sum of both is made up for."""
    wide, narrow = network("fold"), network("fold", 2, width=7)
    for name in ("body.0", "body.2", "body.4"):
        layer = wide.get_submodule(name)
        layer.weight[6] = 2 * layer.weight[1]
        layer.bias[6] = 2 * layer.bias[1]
    prune.prune(wide, narrow, [seen_by(wide)])
    assert error(wide, narrow, torch.rand(1, 3, 24, 24)) < 2e-3


def test_what_tells_most_is_chosen_first() -> None:
    """Independent variables by their variances; and of a sum of two and its parts, the sum."""
    variances = torch.tensor([3.0, 9.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    assert prune.telling(torch.diag(variances), 0, 3).tolist() == [0, 1, 3]
    assert prune.telling(torch.diag(variances), 2, 2).tolist() == [1, 2]  # numbers 3 and 4
    mixed = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    assert prune.telling(mixed.T @ mixed, 0, 1).tolist() == [2]
    assert prune.telling(mixed.T @ mixed, 0, 3).tolist() == [0, 1, 2]


# --- from settings ---------------------------------------------------------------------------


def weights_of(folder: Path, arch: str, **others: Any) -> Path:
    settings = Model(arch=arch, **WIDE[arch] | others)
    file = folder / f"wide-{arch}.safetensors"
    net = model.build(settings)
    checkpoint.save_weights(file, RECORD, settings, net.state_dict(), {})
    return file


def run(file: Path | str, arch: str, **others: Any) -> Train:
    return Train(**{"arch": arch, **WIDE[arch], "prune": str(file), **others})


@pytest.mark.parametrize("arch", WIDE)
def test_a_run_begins_with_them(
    arch: str, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "PICTURES", 2)
    settings = run(weights_of(tmp_path, arch), arch, **NARROW[arch], photos=(photographs,))
    net, untouched = model.build(settings), model.build(settings.changed(prune=""))
    words = prune.begin(net, settings)
    assert words.startswith(f"begins with the most important channels of wide-{arch}: ")
    for name, few in NARROW[arch].items():
        assert f"{name} {few} of {WIDE[arch][name]}" in words
    assert prune.begin(untouched, settings.changed(prune="")) == ""
    wide = checkpoint.network(
        RECORD, checkpoint.read_weights(tmp_path / f"wide-{arch}.safetensors", "filter")
    )
    again = model.build(settings)
    prune.begin(again, settings)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())
    seen = seen_by(wide)
    assert error(wide, net.eval(), seen) <= error(wide, untouched.eval(), seen)


@pytest.mark.parametrize("arithmetics", [("float", "int8"), ("int8", "float"), ("int8", "int8")])
def test_8_bits_begin_with_the_numbers_of_float(
    arithmetics: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without photos too: on pictures that are drawn."""
    monkeypatch.setattr(prune, "PICTURES", 1)
    settings = run(weights_of(tmp_path, "fold", arithmetic=arithmetics[0]), "fold", width=5)
    expected = model.build(settings)
    prune.begin(expected, settings)
    net = model.build(settings.changed(arithmetic=arithmetics[1]))
    prune.begin(net, settings.changed(arithmetic=arithmetics[1]))
    found = dict(net.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in expected.named_parameters())


def test_drawn_pictures_are_pictures() -> None:
    drawn = prune.pictures(run("", "fold"))
    assert len(drawn) == prune.PICTURES
    assert all(each.shape == (prune.EDGE, prune.EDGE, 3) and each.dtype == np.float32 for each in drawn)
    assert min(float(each.min()) for each in drawn) >= 0
    assert max(float(each.max()) for each in drawn) <= 1
    assert min(float(each.std()) for each in drawn) > 0.05
    steps = np.abs(np.diff(drawn[0], axis=1)).mean()
    assert steps < 0.5 * drawn[0].std()  # neighbours resemble one another


def test_many_photos_are_not_all_read(photographs: Path) -> None:
    settings = run("", "fold", photos=(photographs,))
    assert len(prune.pictures(settings)) == 8
    assert all(each.dtype == np.uint8 for each in prune.pictures(settings))


@pytest.mark.parametrize(
    ("arch", "others", "flag"),
    [
        ("fold", {"depth": 4}, "--depth is 3, not 4"),
        ("fold", {"target": "sobel_3"}, "--target is bilateral, not sobel_3"),
        ("fold", {"width": 9}, "--width 9 is more than the 8 of wide-fold"),
        ("dilated", {"dilations": "1,2"}, "--dilations is 1,2,3, not 1,2"),
        ("unshuffle", {"factor": 4}, "--factor is 2, not 4"),
        ("pooled", {"context": 9}, "--context 9 is more than the 8"),
        ("pooled", {"carried": 5}, "--carried 5 is more than the 4"),
        ("pooled", {"depth": 3}, "--depth is 2, not 3"),
        ("clapp", {"kernel": 5}, "--kernel is 3, not 5"),
        ("clapp", {"reskip": False}, "--reskip is True, not False"),
    ],
)
def test_other_networks_are_refused(arch: str, others: dict[str, Any], flag: str, tmp_path: Path) -> None:
    settings = run(weights_of(tmp_path, arch), arch, **others)
    with pytest.raises(ImgtoolError) as caught:
        prune.begin(model.build(settings), settings)
    assert flag in caught.value.what
    assert caught.value.code == USAGE


def test_another_kind_is_refused(tmp_path: Path) -> None:
    settings = run(weights_of(tmp_path, "fold", target="sobel_3"), "dilated")
    with pytest.raises(ImgtoolError, match="--arch is fold, not dilated"):
        prune.begin(model.build(settings), settings)


def test_the_same_in_other_words_fits(tmp_path: Path) -> None:
    """Defaults that are written out, and settings that this network has no use for."""
    file = weights_of(tmp_path, "unshuffle", dilations="", depth=9, target="sobel_3")
    settings = run(file, "unshuffle", dilations="1,1,1,1", target="sobel_3:scale=4", context=99)
    assert prune.begin(model.build(settings), settings)


def test_two_beginnings_are_refused(tmp_path: Path) -> None:
    settings = run(weights_of(tmp_path, "fold"), "fold", weights="sobel_3")
    with pytest.raises(ImgtoolError, match="--prune and --weights") as caught:
        prune.begin(model.build(settings), settings)
    assert caught.value.code == USAGE

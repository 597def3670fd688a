"""The loss of the original: VGG-19 up to relu5_4, which does not learn, and the terms around it."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn

from imgtool import compute, losses
from imgtool.engines.isp import perceptual
from imgtool.errors import USAGE, ImgtoolError


def torchvisions() -> nn.Sequential:
    """Torchvision's own VGG-19, without memory for weights."""
    models: Any = compute.torchvision().models
    with torch.device("meta"):
        features: nn.Sequential = models.vgg19(weights=None).features
    return features


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of torchvision's features, of about the size that keeps values as they are."""
    torch.manual_seed(seed)
    return {
        name: torch.randn(value.shape) * (2 / max(value[0].numel(), 100)) ** 0.5
        for name, value in torchvisions().state_dict().items()
    }


def short(seed: int = 0, **others: Tensor) -> dict[str, Tensor]:
    """The names of all weights, with values that take no time."""
    return {name: torch.full((1,), float(seed)) for name in torchvisions().state_dict()} | others


def test_the_layers_are_torchvisions_up_to_the_relu_behind_the_last_convolution() -> None:
    theirs = list(torchvisions())
    with torch.device("meta"):
        net = perceptual.Features({name: value for name, value in torchvisions().state_dict().items()})
    ours = list(net.layers)
    assert len(ours) == 36
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs[:36]]
    assert isinstance(ours[35], nn.ReLU)
    assert isinstance(theirs[36], nn.MaxPool2d)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in ours) == 4  # so the last are those of block 5


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["features.", ""])
def test_it_sees_what_torchvisions_sees_in_a_normalised_picture(tmp_path: Path, prefix: str) -> None:
    state = weights()
    saved = {prefix + name: value for name, value in state.items()}
    if prefix:
        saved["classifier.0.weight"] = torch.zeros(3)
    torch.save(saved, tmp_path / "vgg19.pth")
    theirs = torchvisions()
    theirs.load_state_dict(state, assign=True)
    image = torch.rand(2, 3, 40, 50)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = theirs[:36]((image - mean[:, None, None]) / deviation[:, None, None])
    net = perceptual.features(tmp_path / "vgg19.pth", torch.device("cpu"))
    torch.testing.assert_close(net(image), wanted)
    assert net(image).shape == (2, 512, 2, 3)
    assert net is perceptual.features(tmp_path / "vgg19.pth", torch.device("cpu"))


@pytest.mark.slow
def test_gradients_pass_to_the_picture_and_not_to_the_weights() -> None:
    net = perceptual.Features(weights())
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        seen = net(image)
    assert seen.dtype == torch.float32
    seen.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(each.requires_grad for each in net.parameters())
    assert not net.training


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no weights", "no readable file"),
        ([1, 2], "something else"),
        ({"features.0.weight": "text"}, "something else"),
        (short(), "not of VGG-19"),
        ({name: value for name, value in short().items() if name != "34.bias"}, "not of VGG-19"),
        (short(more=torch.tensor(float("nan"))), "not finite"),
    ],
)
def test_other_files_are_refused_with_a_way_out(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ImgtoolError, match=words) as refused:
        perceptual.features(path, torch.device("cpu"))
    assert str(path) in refused.value.what
    assert "--vgg" in refused.value.hint


def test_a_file_that_is_not_there_is_a_mistake_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ImgtoolError, match="no weights file") as refused:
        perceptual.weights_file(tmp_path / "none.pth")
    assert refused.value.code == USAGE


def test_weights_that_are_there_are_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    (path.parent / "vgg19_bn-c79401a0.pth").touch()
    assert perceptual.weights_file(None) == path


def test_without_a_network_the_file_to_fetch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ImgtoolError, match=r"download\.pytorch\.org/models/vgg19-dcbb9e9d\.pth") as refused:
        perceptual.weights_file(None)
    assert str(tmp_path / "hub" / "checkpoints") in refused.value.hint
    assert "--vgg" in refused.value.hint


# --- the loss --------------------------------------------------------------------------------


def pictures() -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    target = nn.functional.interpolate(torch.rand(2, 3, 6, 6, generator=noise), (32, 32), mode="bicubic")
    target = target.clamp(0, 1)
    return (target + 0.05 * torch.randn(target.shape, generator=noise)).clamp(0, 1), target


def test_the_terms_are_those_of_the_original() -> None:
    output, target = pictures()
    features = nn.Conv2d(3, 5, 3).requires_grad_(False)
    terms = losses.fidelity_and_features(output, target, features)
    assert list(terms) == ["mse", "vgg", "ssim"]
    assert terms["mse"].item() == pytest.approx(20 * float(((output - target) ** 2).mean()), rel=1e-5)
    apart = (features(output) - features(target)) ** 2
    assert terms["vgg"].item() == pytest.approx(float(apart.mean()), rel=1e-5)
    same = pytorch_msssim.ssim(output, target, data_range=1.0)
    assert terms["ssim"].item() == pytest.approx(20 * (1 - float(same)), rel=1e-5)


def test_the_terms_are_nothing_at_the_target_and_lead_there() -> None:
    output, target = pictures()
    features = nn.Conv2d(3, 5, 3).requires_grad_(False)
    assert all(
        abs(float(term)) < 1e-5 for term in losses.fidelity_and_features(target, target, features).values()
    )
    for name in ("mse", "vgg", "ssim"):
        start = output.clone().requires_grad_()
        before = losses.fidelity_and_features(start, target, features)[name]
        before.backward()
        assert start.grad is not None
        nearer = output - 1e-3 * start.grad / start.grad.norm()
        assert losses.fidelity_and_features(nearer, target, features)[name] < before


def test_ssim_is_float32_whatever_autocast_says() -> None:
    output, target = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.ssim_loss(output.bfloat16(), target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(losses.ssim_loss(output.bfloat16().float(), target).item())


def test_the_gradient_of_ssim_passes_the_clamp() -> None:
    output, target = pictures()
    beyond = (output + 1.0).requires_grad_()
    losses.ssim_loss(beyond, target).backward()
    assert beyond.grad is not None
    assert beyond.grad.abs().max() > 0


def test_pictures_are_normalised_and_seen_in_full_precision() -> None:
    convolutions = {
        f"{n}": layer for n, layer in enumerate(perceptual._layers()) if isinstance(layer, nn.Conv2d)
    }
    plain = {
        f"{n}.{part}": torch.zeros_like(getattr(layer, part))
        for n, layer in convolutions.items()
        for part in ("weight", "bias")
    }
    net, seen = perceptual.Features(plain), []
    net.layers.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    image = (torch.tensor(perceptual.MEAN) + torch.tensor(perceptual.DEVIATION)).reshape(1, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(image.expand(1, 3, 16, 16))
    assert torch.allclose(seen[0], torch.ones(1, 3, 16, 16), atol=1e-5)
    assert found.dtype == torch.float32

"""A narrower network that begins with the most important channels of a wider one, and is then trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtool import checkpoint
from imgtool.engines.filter import model, quantise, targets
from imgtool.engines.filter.settings import Model
from imgtool.engines.filter.variants import seen_by
from imgtool.errors import USAGE, ImgtoolError
from imgtool.images import read_rgb8
from imgtool.samples import distinct
from imgtool.settings.sources import make

if TYPE_CHECKING:
    from imgtool.engines.filter.settings import Train

WIDTHS: Mapping[str, Sequence[str]] = {"pooled": ("width", "context", "carried")}
"""By network, the settings that may be smaller than those of the wider one; of others, ``width``."""
SHAPE: Mapping[str, Sequence[str]] = {
    "fold": ("depth",),
    "dilated": ("dilations",),
    "unshuffle": ("factor", "dilations"),
    "pooled": ("depth", "factor", "dilations"),
    "clapp": ("depth", "kernel", "activation", "flip", "rezero", "reskip"),
}
"""By network, the settings that must be the same."""
PICTURES = 8
EDGE = 128
"""Number and edge in pixels of the pictures on which channels are compared."""
PLACES = 2048
"""Pixels of each that weights are fitted to."""
RIDGE = 1e-5
"""Of the fit, as a share of the variance of what a layer is given."""
NOTHING = 1e-12
"""Share of all energy that counts as none."""


def begin(net: nn.Module, settings: Train) -> str:
    """Fill a new network with channels of the wider one that ``settings.prune`` names, and say so.

    Returns:
        Words; "" where the settings name none: the network stays as it is.

    Raises:
        ImgtoolError: Code 2, for weights of a network of another kind or a narrower one, or where
            ``settings.weights`` names weights too; else as ``checkpoint.read_weights``.
    """
    if not settings.prune:
        return ""
    if settings.weights:
        raise ImgtoolError("--prune and --weights both name weights to begin with", "give one of them", USAGE)
    weights = checkpoint.read_weights(checkpoint.find(settings.prune, "filter"), "filter")
    whole = make(Model, {**weights.model, "arithmetic": "float"}, f"weights {weights.name}")
    _compare(whole, settings, weights.name)
    wide, narrow = model.build(whole).eval(), model.build(settings.changed(arithmetic="float")).eval()
    ranges = tuple(f".{name}" for name in quantise.BUFFERS)
    state = {name: value for name, value in weights.state.items() if not name.endswith(ranges)}
    checkpoint.load_state(wide, replace(weights, state=state))
    prune(wide, narrow, [seen_by(wide, picture, EDGE) for picture in pictures(settings)])
    net.load_state_dict(narrow.state_dict())
    told = ", ".join(f"{name} {getattr(settings, name)} of {getattr(whole, name)}" for name in widths(whole))
    return f"begins with the most important channels of {weights.name}: {told}"


def widths(settings: Model) -> Sequence[str]:
    """Return the names of the settings that are numbers of channels of a network."""
    return WIDTHS.get(settings.arch, ("width",))


def _compare(whole: Model, settings: Model, name: str) -> None:
    """Raise what keeps a network from being a narrower one of another."""
    for flag in ("arch", "target", "channels", *SHAPE[settings.arch]):
        has, wanted = _resolved(whole, flag), _resolved(settings, flag)
        if has != wanted:
            what = f"--prune: {name} is of another network: its --{flag} is {has}, not {wanted}"
            raise ImgtoolError(what, f"train with --{flag} {has}, or prune other weights", USAGE)
    for flag in widths(settings):
        has, wanted = getattr(whole, flag), getattr(settings, flag)
        if wanted > has:
            what = f"--{flag} {wanted} is more than the {has} of {name}, which --prune makes narrower"
            raise ImgtoolError(what, f"take --{flag} {has} or less", USAGE)


def _resolved(settings: Model, flag: str) -> Any:
    """Return what a setting comes to: the same of two networks where both are of one kind."""
    if flag == "channels":
        return model.channels(settings)
    if flag == "dilations":
        return ",".join(str(each) for each in model.dilations(settings))
    value = getattr(settings, flag)
    named = flag == "target" and value.partition(":")[0] in targets.KINDS
    return targets.parse(value).spec if named else value


def pictures(settings: Train) -> list[Any]:
    """Return pictures to compare channels on, ``(H, W, 3)``: of the photos, or drawn where there are none."""
    paths = list(distinct(settings.photos).values())
    if paths:
        return [read_rgb8(path) for path in paths[:: -(-len(paths) // PICTURES)]]
    rng = np.random.default_rng(0)
    return [_drawn(rng) for _ in range(PICTURES)]


def _drawn(rng: np.random.Generator) -> Any:
    """Draw noise whose amplitude falls with frequency, as in photos, and edges where it changes sign."""
    tones = np.zeros((EDGE, EDGE, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        tones += cv2.resize(noise, (EDGE, EDGE), interpolation=cv2.INTER_CUBIC) / cells
    return np.clip(0.5 + 0.25 * tones + 0.15 * np.sign(tones), 0, 1)


# --- choosing and cutting --------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Channels that some convolutions make and others read.

    Attributes:
        makers: Names of those whose output they are.
        readers: Names of those whose input they are.
        own: Channels of that input in front of them: the photo's.
        block: Outputs of a maker that are one channel, of sub-pixel convolution.
    """

    makers: Sequence[str]
    readers: Sequence[str]
    own: int = 0
    block: int = 1


def spaces(net: nn.Module) -> list[Space]:
    """Return the inner channels of a network, from the photo to the output."""
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    if isinstance(net, model.Clapp):  # its skips make all blocks share them
        return [Space(names[:-1], names[1:])]
    return [
        Space([maker], [reader], 3, net.multiple**2)
        if maker == "carry" and isinstance(net, model.Pooled)
        else Space([maker], [reader])
        for maker, reader in pairwise(names)
    ]


@torch.no_grad()
def prune(wide: nn.Module, narrow: nn.Module, pictures: Sequence[Tensor]) -> None:
    """Fill a network with the most important channels of a wider one of the same kind.

    Channels are chosen by ``telling``. Layers that lose inputs are then fitted, from the photo to the output,
    to what they give in the wide network, by least squares (He, Zhang and Sun, "Channel pruning for
    accelerating very deep neural networks", ICCV 2017). Where nothing is lost, nothing is fitted.

    Args:
        wide: The wider network, in float.
        narrow: The network to fill.
        pictures: Inputs of both, ``(B, 3, H, W)`` in 0..1.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for space in spaces(wide):
        kept = chosen(wide, space, _conv(narrow, space.readers[0]).in_channels - space.own, pictures)
        made = (kept[:, None] * space.block + torch.arange(space.block)).flatten()
        read = torch.cat([torch.arange(space.own), space.own + kept])
        outputs |= dict.fromkeys(space.makers, made)
        inputs |= dict.fromkeys(space.readers, read)
    state = wide.state_dict()
    for name, value in narrow.state_dict().items():
        layer, part = name.rpartition(".")[0], state[name]
        if isinstance(wide.get_submodule(layer), nn.Conv2d):
            part = part[outputs.get(layer, torch.arange(len(part)))]
            state[name] = part[:, inputs[layer]] if value.ndim == 4 and layer in inputs else part
        else:  # norms and gates of the blocks, which share their channels
            state[name] = part.view(-1)[outputs["prepare"]].view_as(value)
    narrow.load_state_dict(state)
    for name, read in inputs.items():
        if len(read) < _conv(wide, name).in_channels:
            fit(wide, narrow, name, outputs.get(name), pictures)


def _conv(net: nn.Module, name: str) -> nn.Conv2d:
    layer = net.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return layer


def chosen(net: nn.Module, space: Space, count: int, pictures: Sequence[Tensor]) -> Tensor:
    """Return the numbers of the channels to keep, ascending.

    A channel weighs as much as the weights that read it, in the root mean square, make of how much it varies:
    its mean is but a bias.
    """
    layers = [_conv(net, name) for name in space.readers]
    if count == layers[0].in_channels - space.own:
        return torch.arange(count)
    total = torch.zeros(layers[0].in_channels, layers[0].in_channels, dtype=torch.float64)
    for layer in layers:
        values = torch.cat(
            quantise.passing(net, layer, pictures, lambda given, _: given.transpose(0, 1).flatten(1)), 1
        )
        weight = layer.weight.double().square().sum((0, 2, 3)).sqrt()
        total += torch.cov(values.double()) * weight * weight[:, None]
    return telling(total, space.own, count)


def telling(products: Tensor, first: int, count: int) -> Tensor:
    """Choose the variables that tell most of all: those from which the others can best be predicted.

    Greedily, each the one that leaves least of the total variance (Farahat, Ghodsi and Kamel, "An efficient
    greedy method for unsupervised feature selection", ICDM 2011).

    Args:
        products: ``(N, N)`` covariances.
        first: Number of variables in front that are known in any case.
        count: How many to choose of the others.

    Returns:
        Their numbers, counted from ``first``, ascending.
    """
    rest, least = products.clone(), NOTHING * float(products.diagonal().sum())
    found: list[int] = []
    for turn in range(first + count):
        energy = rest.diagonal()
        gains = torch.where(energy > least, rest.square().sum(0) / energy.clamp_min(least), 0.0)
        gains[found] = -1.0
        best = turn if turn < first else int(gains.argmax())
        if energy[best] > least:
            rest = rest - torch.outer(rest[:, best], rest[best]) / energy[best]
        found.append(best)
    return torch.tensor(sorted(found[first:])) - first


def fit(
    wide: nn.Module, narrow: nn.Module, name: str, kept: Tensor | None, pictures: Sequence[Tensor]
) -> None:
    """Change a layer so that it gives what it gives in the wide network, as far as it can.

    The change of the weights is the smallest that does so (ridge regression): where nothing is missing, none.

    Args:
        wide: The wider network.
        narrow: The network with the layer to change.
        name: The layer.
        kept: Which of its outputs in the wide network it has; None for all.
        pictures: Inputs of both.
    """
    layer = _conv(narrow, name)

    def columns(given: Tensor, _: Tensor) -> Tensor:
        return _placed(F.unfold(given, layer.kernel_size, layer.dilation))

    given = torch.cat(quantise.passing(narrow, layer, pictures, columns), 1)
    made = quantise.passing(narrow, layer, pictures, lambda _, made: _placed(made))
    wanted = quantise.passing(wide, _conv(wide, name), pictures, lambda _, made: _placed(made))
    missing = torch.cat(wanted, 1)[slice(None) if kept is None else kept] - torch.cat(made, 1)
    middle, shift = given.mean(1, keepdim=True), missing.mean(1, keepdim=True)
    squares = (given - middle) @ (given - middle).T
    squares.diagonal().add_(RIDGE * float(squares.diagonal().mean()) + NOTHING)
    change = torch.linalg.solve(squares, (given - middle) @ (missing - shift).T).T
    layer.weight += change.reshape(layer.weight.shape).float()
    if layer.bias is not None:
        layer.bias += (shift - change @ middle)[:, 0].float()


def _placed(values: Tensor) -> Tensor:
    """Return some of the places of ``(B, C, ...)``, evenly chosen, as ``(C, places)`` in double precision."""
    found = values.transpose(0, 1).flatten(1)
    return found[:, :: max(found.shape[1] // PLACES, 1)].double()

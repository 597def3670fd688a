"""What of a network learns when."""

from __future__ import annotations

import math

from torch import nn

from imgtool.errors import USAGE, ImgtoolError
from imgtool.settings import Train


class Phases:
    """What of a network learns when: a frozen part, all or the end of which learns from some epoch on.

    Attributes:
        parameters: The parameters that always learn, and those of the frozen part where there is one.
        opens: Step from which on the frozen part learns, None for never.
    """

    def __init__(self, net: nn.Module, settings: Train) -> None:
        """Split a network as the settings say.

        Raises:
            ImgtoolError: Code 2, for a prefix that freezes nothing, as a typing error would, or
                everything, and for a share in which there is nothing to learn.
        """
        prefix = settings.freeze
        names = [name for name, _ in net.named_parameters()]
        frozen = [name for name in names if prefix and name.startswith(prefix)]
        if prefix and len(frozen) in (0, len(names)):
            raise ImgtoolError(
                f"--freeze {prefix} fits {'every' if frozen else 'no'} parameter",
                "their names begin with: " + ", ".join(sorted({name.partition(".")[0] for name in names})),
                USAGE,
            )
        self._norms = _norms(net, prefix) if prefix and settings.frozen_norm else {}
        fixed = {f"{name}.{each}" for name in self._norms for each in ("weight", "bias")}
        opened = set(frozen[-math.ceil(settings.unfreeze_share * len(frozen)) :]) - fixed if frozen else set()
        by_name = dict(net.named_parameters())
        free = [value for name, value in by_name.items() if name not in frozen]
        self._frozen = [(by_name[name], name in opened) for name in frozen]
        self.parameters = [free, [by_name[name] for name in frozen]] if frozen else [free]
        opening = bool(frozen) and settings.unfreeze_epoch > 0
        self.opens = (settings.unfreeze_epoch - 1) * settings.epoch_steps if opening else None
        if opening and not opened:
            raise ImgtoolError(
                f"--unfreeze-share {settings.unfreeze_share:g} opens nothing but batch normalisation",
                "take a larger share",
                USAGE,
            )

    def enter(self, step: int) -> None:
        """Let the parameters learn that do so at a step; the network is in training mode before."""
        is_open = self.opens is not None and step >= self.opens
        for parameter, opened in self._frozen:
            parameter.requires_grad_(is_open and opened)
        for norm in self._norms.values():
            norm.eval()

    def last(self, steps: int) -> bool:
        """Tell whether the last of a number of steps was in the last phase."""
        return self.opens is None or steps > self.opens


def _norms(net: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return the layers below a prefix that keep statistics: batch and instance normalisation."""
    kinds = nn.modules.batchnorm._NormBase
    return {
        name: module
        for name, module in net.named_modules()
        if f"{name}.".startswith(prefix) and isinstance(module, kinds)
    }

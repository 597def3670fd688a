"""An optimiser that knows how the gradients of a layer's weights go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LARGEST = 1024
"""Side of a layer's weights, as a matrix, beyond which that side is not rotated."""


class Soap(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024. Weights of more than one
    dimension are matrices, outputs by all the rest; a vector is a matrix of one column. What it costs grows
    with the cube of a layer's sides, not with the batch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.0,
        every: int = 10,
    ) -> None:
        """Make it.

        Args:
            params: Tensors, or groups of them.
            lr: Learning rate.
            betas: Decay of the means of gradients, and of their squares and products.
            weight_decay: Decoupled, as of AdamW.
            every: Steps between two turns of the basis.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "every": every})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; the first one only begins the averages."""
        if closure is not None:
            raise ValueError("a closure is not called")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad.reshape(len(parameter), -1) if parameter.ndim else parameter.grad.view(1, 1)  # type: ignore[union-attr]
        gradient = gradient.float().contiguous()
        state = self.state[parameter]
        if not state:
            _begin(state, gradient)
            return
        first, second = group["betas"]
        state["step"] += 1
        count = int(state["step"])
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(_turned(gradient, state).square(), 1 - second)
        mean = _turned(state["mean"], state) / (1 - first**count)
        move = mean / ((state["square"] / (1 - second**count)).sqrt() + 1e-8)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(
            group["lr"] * _turned(move, state, back=True).reshape(parameter.shape).to(parameter.dtype)
        )
        for side, product in (("rows", gradient @ gradient.T), ("columns", gradient.T @ gradient)):
            if side in state:
                state[side].lerp_(product, 1 - second)
                if count % group["every"] == 0:
                    basis = torch.linalg.qr(state[side] @ state[f"{side}_basis"])[0]
                    state[f"{side}_basis"].copy_(basis)


def _begin(state: dict[str, Any], gradient: Tensor) -> None:
    """Begin the averages of a matrix of gradients, and the basis with its own."""
    state["step"] = torch.zeros((), dtype=torch.int64)
    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for side, product in (("rows", gradient @ gradient.T), ("columns", gradient.T @ gradient)):
        if 1 < len(product) <= LARGEST:
            state[side] = product
            small = 1e-12 * torch.eye(len(product), device=product.device)
            state[f"{side}_basis"] = torch.linalg.eigh(product + small)[1]


def _turned(matrix: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """Turn a matrix into the basis, or back from it."""
    rows, columns = state.get("rows_basis"), state.get("columns_basis")
    if rows is not None:
        matrix = (rows if back else rows.T) @ matrix
    if columns is not None:
        matrix = matrix @ (columns.T if back else columns)
    return matrix

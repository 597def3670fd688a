"""An optimiser that knows how the gradients of a layer's weights go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LARGEST = 1024
"""Side of a layer's weights, as a matrix, beyond which that side is not rotated."""
SIDES = ("rows", "columns")


class Soap(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024. Weights of more than one
    dimension are matrices, outputs by all the rest; a vector is a matrix of one column. What it costs grows
    with the cube of a layer's sides, not with the batch. Parameters are float32 or float64.

    As in the authors' code the basis turns by one step of orthogonal iteration, its vectors in the order of
    their eigenvalues, largest first: in any other order each step would exchange vectors, whose squares are
    averaged over many.
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
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(len(parameter) if parameter.ndim else 1, -1).contiguous()
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
        parameter.sub_(group["lr"] * _turned(move, state, back=True).reshape(parameter.shape))
        for axis, side in enumerate(SIDES):
            if side in state:
                state[side].lerp_(_product(gradient, side), 1 - second)
                if count % group["every"] == 0:
                    _turn(state, side, axis)


def _product(gradient: Tensor, side: str) -> Tensor:
    return gradient @ gradient.T if side == "rows" else gradient.T @ gradient


def _begin(state: dict[str, Any], gradient: Tensor) -> None:
    """Begin the averages of a matrix of gradients, and the basis with its own."""
    state["step"] = torch.zeros((), dtype=torch.int64)
    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for side, length in zip(SIDES, gradient.shape, strict=True):
        if 1 < length <= LARGEST:
            state[side] = _product(gradient, side)
            vectors = torch.linalg.eigh(state[side].cpu().double())[1].flip(1)
            state[f"{side}_basis"] = vectors.to(gradient).contiguous()


def _turn(state: dict[str, Any], side: str, axis: int) -> None:
    """Bring the basis of a side nearer to the eigenvectors, and the squares into the order of its vectors."""
    basis = state[f"{side}_basis"]
    moved = state[side] @ basis
    order = (basis * moved).sum(0).argsort(descending=True)
    moved = moved[:, order]
    if moved.device.type == "mps":  # which has no such decomposition
        moved = moved.cpu()
    basis.copy_(torch.linalg.qr(moved)[0])
    state["square"].copy_(state["square"].index_select(axis, order))


def _turned(matrix: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """Turn a matrix into the basis, or back from it."""
    rows, columns = state.get("rows_basis"), state.get("columns_basis")
    if rows is not None:
        matrix = (rows if back else rows.T) @ matrix
    if columns is not None:
        matrix = matrix @ (columns.T if back else columns)
    return matrix

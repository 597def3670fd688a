"""SOAP: where it is Adam, where it needs fewer steps, and what is kept of it when a run is interrupted."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from toy import TOY, assert_same_run, go, state, toy

from imgtool import plots, sheets
from imgtool.optimisers import LARGEST, Soap

BETAS = (0.95, 0.95)
Array = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _undrawn_on_one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name in ((plots, "curves"), (sheets, "sheet")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(optimiser: torch.optim.Optimizer, parameter: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Give an optimiser gradients, one at each step; return the parameter."""
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (LARGEST + 1,)])
def test_what_has_nothing_to_turn_is_learnt_as_by_adamw(shape: tuple[int, ...]) -> None:
    """From the second step on: the first one only begins the averages."""
    gradients = [random(*shape, seed=seed) for seed in range(6)]
    one, other = (nn.Parameter(random(*shape, seed=9)) for _ in range(2))
    soap = moved(Soap([one], 0.1, BETAS, weight_decay=0.2), one, [random(*shape, seed=8), *gradients])
    adamw = moved(torch.optim.AdamW([other], 0.1, BETAS, weight_decay=0.2), other, gradients)
    assert torch.allclose(soap, adamw, rtol=1e-5, atol=1e-6)  # of values that pass 1: roundings of float32


def test_the_first_step_moves_nothing() -> None:
    parameter = nn.Parameter(random(3, 4))
    assert torch.equal(
        moved(Soap([parameter], 0.1, weight_decay=0.5), parameter, [random(3, 4)]), random(3, 4)
    )


def reference(parameter: Array, gradients: Sequence[Array], rate: float, every: int) -> Array:
    """Vyas et al., algorithm 3, one line after the other; the basis has the largest eigenvalue first."""
    decay, begun = 0.95, gradients[0]
    left, right = begun @ begun.T, begun.T @ begun
    left_basis, right_basis = (np.linalg.eigh(each)[1][:, ::-1] for each in (left, right))
    mean, square = np.zeros_like(parameter), np.zeros_like(parameter)
    for count, gradient in enumerate(gradients[1:], 1):
        mean = decay * mean + (1 - decay) * gradient
        square = decay * square + (1 - decay) * (left_basis.T @ gradient @ right_basis) ** 2
        share = 1 - decay**count
        step = (left_basis.T @ mean @ right_basis) / share / (np.sqrt(square / share) + 1e-8)
        parameter = parameter - rate * left_basis @ step @ right_basis.T
        left = decay * left + (1 - decay) * gradient @ gradient.T
        right = decay * right + (1 - decay) * gradient.T @ gradient
        if count % every == 0:
            order = np.argsort(-np.diag(left_basis.T @ left @ left_basis))
            left_basis, square = np.linalg.qr(left @ left_basis[:, order])[0], square[order]
            order = np.argsort(-np.diag(right_basis.T @ right @ right_basis))
            right_basis, square = np.linalg.qr(right @ right_basis[:, order])[0], square[:, order]
    return parameter


def test_a_kernel_is_learnt_as_the_paper_says() -> None:
    """Outputs by all the rest, in double precision."""
    shape = (3, 2, 1, 2)
    gradients = [random(*shape, seed=seed).double() for seed in range(12)]
    parameter = nn.Parameter(random(*shape, seed=99).double())
    expected = reference(
        parameter.detach().reshape(3, 4).numpy(), [each.reshape(3, 4).numpy() for each in gradients], 0.01, 3
    )
    found = moved(Soap([parameter], 0.01, every=3), parameter, gradients)
    assert np.allclose(found.reshape(3, 4).numpy(), expected, atol=1e-10)


def test_how_weights_lie_in_memory_does_not_matter() -> None:
    gradients = [random(4, 3, 2, 2, seed=seed) for seed in range(12)]
    plain = nn.Parameter(random(4, 3, 2, 2, seed=99))
    last = nn.Parameter(random(4, 3, 2, 2, seed=99).to(memory_format=torch.channels_last))
    as_they_are = moved(Soap([plain], 0.01, every=2), plain, gradients)
    turned = [each.to(memory_format=torch.channels_last) for each in gradients]
    assert torch.equal(moved(Soap([last], 0.01, every=2), last, turned), as_they_are)


def test_no_gradient_is_no_step() -> None:
    """Of what is frozen; and where a gradient is zero, nothing becomes NaN."""
    frozen, still = nn.Parameter(random(3, 4)), nn.Parameter(random(3, 4))
    optimiser = Soap([frozen, still], 0.1, every=2)
    moved(optimiser, still, [torch.zeros(3, 4)] * 5)
    assert torch.equal(still, random(3, 4))
    assert torch.equal(frozen, random(3, 4))
    assert frozen not in optimiser.state


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        Soap([nn.Parameter(random(2))]).step(lambda: 0.0)


# --- what it is for ---------------------------------------------------------------------------


def orthogonal(size: int, seed: int) -> Tensor:
    found: Tensor = torch.linalg.qr(random(size, size, seed=seed))[0]
    return found


def left(kind: Callable[[nn.Parameter, float], torch.optim.Optimizer], rate: float) -> float:
    """Return what 150 steps leave of least squares of condition number 10^6, not along the axes."""
    seen = random(256, 27) @ torch.diag(torch.logspace(0, -2, 27)) @ orthogonal(27, 1)
    shown = orthogonal(8, 2) @ torch.diag(torch.logspace(0, -1, 8)) @ orthogonal(8, 3)
    wanted, weights = random(8, 27, seed=4), nn.Parameter(torch.zeros(8, 27))
    optimiser = kind(weights, rate)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / 150)
        loss = (seen @ (weights - wanted).T @ shown).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float((seen @ (weights.detach() - wanted).T @ shown).square().mean())


def test_a_badly_conditioned_problem_is_solved_in_fewer_steps_than_by_adamw() -> None:
    """Each at the better of two rates: less than a fifth of the error is left."""
    rates = (0.1, 0.3)
    soap = min(left(lambda each, rate: Soap([each], rate), rate) for rate in rates)
    adamw = min(
        left(lambda each, rate: torch.optim.AdamW([each], rate, BETAS, weight_decay=0), rate)
        for rate in rates
    )
    assert soap < adamw / 5


# --- what is kept of it -----------------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    return net.to(memory_format=torch.channels_last)


def learn(net: nn.Module, optimiser: Soap, steps: range) -> None:
    for step in steps:
        optimiser.zero_grad()
        (net(random(2, 3, 8, 8, seed=step)) - 1).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("kept", [0, 1, 9, 10, 13])
def test_a_state_that_was_saved_goes_on_at_the_same_bits(kept: int) -> None:
    """Before the first step, after it, beside a turn of the basis, and after one."""
    net = small_net()
    optimiser = Soap(net.parameters(), 0.01)
    learn(net, optimiser, range(kept))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict()}, file)
    learn(net, optimiser, range(kept, 25))

    file.seek(0)
    again = torch.load(file, weights_only=True)
    other = small_net()
    other.load_state_dict(again["net"])
    resumed = Soap(other.parameters(), 0.5)
    resumed.load_state_dict(copy.deepcopy(again["optimiser"]))
    learn(other, resumed, range(kept, 25))
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


class _Kill(Exception):
    pass


@pytest.mark.parametrize("step", [7, 13])
def test_a_run_that_was_killed_resumes_at_the_same_bits(tmp_path: Path, step: int) -> None:
    """Before the basis turns for the first time, and after."""
    course: dict[str, Any] = {"optimiser": "soap", "steps": 24, "epoch_steps": 12}
    go(TOY, toy(tmp_path / "whole", **course))
    losses = iter(range(100))

    def killed(*arguments: Any) -> Any:
        if next(losses) == step:
            raise _Kill
        return TOY.loss(*arguments)

    with pytest.raises(_Kill):
        go(dataclasses.replace(TOY, loss=killed), toy(tmp_path / "parts", **course))
    assert 0 < state(tmp_path / "parts")["step"] < step
    go(TOY, toy(tmp_path / "parts", resume=tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "rows_basis" in state(tmp_path / "parts")["optimiser"]["state"][0]

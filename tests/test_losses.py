"""The losses are their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mat_torch.losses import (
    fake_loss,
    generator_loss,
    gradient_penalty,
    lazy_r1_weight,
    real_loss,
)


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_generator_maximises_the_logarithm_of_being_taken_for_real_by_both_heads() -> None:
    value = generator_loss(_column(0.5, -2.0), _column(1.0, 3.0))
    main = -(_log_sigmoid(0.5) + _log_sigmoid(-2.0)) / 2
    coarse = -(_log_sigmoid(1.0) + _log_sigmoid(3.0)) / 2
    assert float(value) == pytest.approx(main + coarse)


def test_the_discriminator_tells_fakes_from_photographs_with_both_heads() -> None:
    logits, coarse = _column(0.5, -2.0), _column(1.0, 3.0)
    fakes = -(_log_sigmoid(-0.5) + _log_sigmoid(2.0) + _log_sigmoid(-1.0) + _log_sigmoid(-3.0)) / 2
    assert float(fake_loss(logits, coarse)) == pytest.approx(fakes)
    photographs = -sum(map(_log_sigmoid, (0.5, -2.0, 1.0, 3.0))) / 2
    assert float(real_loss(logits, coarse)) == pytest.approx(photographs)


def test_a_fake_that_fools_nobody_still_teaches_the_generator() -> None:
    """What saturates is the other form, log(1 − σ(D)): its gradient vanishes there."""
    logits = _column(-40.0).requires_grad_()
    generator_loss(logits, _column(0.0)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(-1.0)


def test_losses_of_extreme_logits_are_finite() -> None:
    extreme = torch.tensor([[1e4], [-1e4]])
    for loss in (generator_loss, fake_loss, real_loss):
        assert bool(loss(extreme, extreme).isfinite())


def test_the_gradient_penalty_is_that_of_each_image_and_head_and_differentiable() -> None:
    """D(x) = a·Σx²/2 has the gradient a·x, so the penalty a²‖x‖² and its derivative 2a‖x‖²."""
    a = torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def critic(image: Tensor, coarse: Tensor, _mask: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (x.square().sum(dim=(1, 2, 3))[:, None] / 2 for x in (image, coarse))
        return a[0] * first, a[1] * second

    penalty, penalty_coarse = gradient_penalty(critic, image, torch.ones(2, 1, 4, 4))
    energy = image.square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(penalty, 9.0 * energy)
    torch.testing.assert_close(penalty_coarse, 25.0 * energy)
    (penalty.sum() + penalty_coarse.sum()).backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    torch.testing.assert_close(a.grad, 2.0 * a.detach() * energy.sum())
    assert not image.requires_grad


def test_a_lazy_penalty_weighs_as_much_as_one_in_every_step() -> None:
    for gamma, interval in ((10.0, 16), (2.0, 1)):
        steps = [lazy_r1_weight(gamma, interval) if i % interval == 0 else 0.0 for i in range(32)]
        assert sum(steps) == pytest.approx(32 * gamma / 2)

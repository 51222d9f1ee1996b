from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from fewstep.errors import FewstepError
from fewstep.guidance import Blur, Downsample, HiddenBox, HiddenPixels, LinearOperator, Matrix


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 12, 8), (2, 3, 4, 12, 8)])
@pytest.mark.parametrize(
    "operator",
    [
        HiddenBox(2, 1, 5, 4),
        HiddenPixels(0.6),
        Blur(1.5, 7),
        Blur(1.5, 7, "zeros"),
        Downsample(4),
    ],
)
def test_the_adjoint_is_exact(operator: LinearOperator, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    seen = operator(x)
    y = randn(*seen.shape, seed=1)
    back = operator.adjoint(y)
    assert back.shape == x.shape
    torch.testing.assert_close((seen * y).sum(), (x * back).sum())
    torch.testing.assert_close(operator(2 * x + back), 2 * seen + operator(back))


def test_the_adjoint_of_a_matrix_is_exact() -> None:
    operator, x, y = Matrix(randn(2, 5)), randn(3, 5, seed=1), randn(3, 2, seed=2)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())


def test_a_hidden_box_is_grey_and_the_rest_is_as_it_was() -> None:
    x = randn(1, 1, 6, 6)
    seen = HiddenBox(1, 2, 3, 2)(x)
    assert not seen[..., 1:4, 2:4].any()
    assert int((seen == x).sum()) == 36 - 6


def test_the_share_of_hidden_pixels_is_the_one_asked_for_and_the_seed_decides_which() -> None:
    x = torch.ones(1, 3, 64, 64)
    seen = HiddenPixels(0.9)(x)
    assert float(seen.mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(seen, HiddenPixels(0.9)(x))
    assert not torch.equal(seen, HiddenPixels(0.9, seed=1)(x))


def test_the_blur_is_that_of_torchvision_which_mirrors_the_picture() -> None:
    for size, height, width in ((7, 16, 9), (15, 8, 16)):
        x = randn(2, 3, height, width)
        torch.testing.assert_close(Blur(1.5, size)(x), gaussian_blur(x, [size] * 2, [1.5] * 2))


def test_a_blur_can_see_zeros_outside_the_picture_instead() -> None:
    x = randn(2, 3, 12, 8)
    wide = gaussian_blur(F.pad(x, (3, 3, 3, 3)), [7, 7], [1.5, 1.5])
    torch.testing.assert_close(Blur(1.5, 7, "zeros")(x), wide[..., 3:-3, 3:-3])
    bright = torch.ones(1, 1, 8, 8)
    assert float(Blur(1.5, 7, "zeros")(bright)[..., 0, 0]) < 0.5
    torch.testing.assert_close(Blur(1.5, 7)(bright), bright)


def test_downsampling_takes_means() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Downsample(2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewstepError, match="odd side"):
        Blur(1.0, 4)
    with pytest.raises(FewstepError, match="reflect or zeros, not 'black'"):
        Blur(1.0, 5, "black")  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="cannot mirror a side of 8"):
        Blur(3.0, 17)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(FewstepError, match="squares of 3"):
        Downsample(3)(torch.zeros(1, 1, 4, 6))

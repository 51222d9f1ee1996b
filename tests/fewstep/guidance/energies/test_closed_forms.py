from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fewstep.diffusion import GaussianMixture
from fewstep.errors import FewstepError
from fewstep.guidance import ClassLabel, Energy, LinearMeasurement, Matrix, MixtureLikelihood


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X, A, Y = randn(5, 3), randn(2, 3, seed=1), randn(5, 2, seed=2)
MIXTURE = GaussianMixture(
    randn(4, 3, seed=3), torch.tensor([0.5, 1.0, 0.7, 2.0]), labels=torch.tensor([0, 1, 1, 2])
)


def test_the_gaussian_form_is_a_log_likelihood_and_the_norm_form_a_distance() -> None:
    likelihood = Independent(Normal(X @ A.T, 0.3), 1).log_prob(Y)
    energy = LinearMeasurement(Matrix(A), "gaussian", 0.3)(X, Y)
    gaps = energy + likelihood
    torch.testing.assert_close(gaps, gaps[:1].expand(5))
    distance = LinearMeasurement(Matrix(A))(X, Y)
    torch.testing.assert_close(distance, (X @ A.T - Y).norm(dim=1))


def test_a_measurement_that_is_met_has_a_gradient_of_zero() -> None:
    x = X.clone().requires_grad_()
    loss = LinearMeasurement(Matrix(A))(x, (X @ A.T).clone())
    loss.sum().backward()
    assert x.grad is not None
    assert not loss.any()
    assert not x.grad.any()


def test_a_class_label_is_the_cross_entropy_of_what_the_classifier_sees() -> None:
    classifier = nn.Linear(3, 4, dtype=torch.float64).eval()
    labels = torch.tensor([0, 3, 1, 2, 2])
    loss = ClassLabel(classifier, shift=1.0, factor=0.5)(X, labels)
    probability = classifier((X + 1) / 2).softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(loss, -probability.log())


def test_a_classifier_that_is_sure_of_another_class_gives_a_finite_gradient() -> None:
    classifier = nn.Linear(1, 2, bias=False).eval()
    nn.init.constant_(classifier.weight[0:1], 1e4)  # a view of a parameter, in place
    x = torch.ones(1, 1, requires_grad=True)
    ClassLabel(classifier)(x, torch.tensor([1])).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert float(x.grad) > 1e3


def test_a_classifier_in_training_mode_is_refused() -> None:
    with pytest.raises(FewstepError, match=r"network\.eval\(\)"):
        ClassLabel(nn.Linear(3, 4).train())(X.float(), torch.zeros(5))


def test_mixture_forms_are_the_posterior_of_the_class_and_the_density_within_it() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0])
    joint = []
    for label in range(3):
        part = MIXTURE.labels == label
        shape = MIXTURE.stds[part].double()[:, None].expand(-1, 3)
        within = MixtureSameFamily(
            Categorical(MIXTURE.weights[part]),
            Independent(Normal(MIXTURE.means[part].double(), shape), 1),
        )
        joint.append(within.log_prob(X) + MIXTURE.weights[part].double().sum().log())
    stacked = torch.stack(joint, 1)
    wanted = stacked[torch.arange(5), labels]
    posterior = MixtureLikelihood(MIXTURE)(X, labels)
    torch.testing.assert_close(posterior, stacked.logsumexp(1) - wanted, rtol=1e-6, atol=1e-6)
    gaps = MixtureLikelihood(MIXTURE, "density")(X, labels) + wanted
    torch.testing.assert_close(gaps, gaps[:1].expand(5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "energy",
    [
        LinearMeasurement(Matrix(A)),
        ClassLabel(nn.Linear(3, 4).eval()),
        MixtureLikelihood(MIXTURE),
    ],
)
def test_a_missing_target_is_refused(energy: Energy) -> None:
    with pytest.raises(FewstepError, match="needs a target"):
        energy(X, None)

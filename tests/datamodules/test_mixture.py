"""Samples of the analytic ring."""

from __future__ import annotations

import torch

from datamodules import RingData


def test_batches_are_a_function_of_their_number_and_rank() -> None:
    data = RingData(batch_size=64)
    assert torch.equal(
        data.batch("train", 3)["sample"], RingData(batch_size=64).batch("train", 3)["sample"]
    )
    assert not torch.equal(data.batch("train", 3)["sample"], data.batch("train", 4)["sample"])
    assert not torch.equal(data.batch("train", 3)["sample"], data.batch("train", 3, 1)["sample"])


def test_samples_lie_around_the_mode_their_label_names() -> None:
    data = RingData(num_modes=6, std=0.05, batch_size=3000)
    batch = data.batch("train", 0)
    means = data.mixture.means[batch["cond"]["class_labels"]]
    spread = (batch["sample"] - means).std()
    assert 0.047 < float(spread) < 0.053
    counts = torch.bincount(batch["cond"]["class_labels"], minlength=6)
    assert counts.min() > 400


def test_the_reference_has_the_stated_size() -> None:
    data = RingData(batch_size=100, reference_samples=250)
    total = sum(len(batch["sample"]) for batch in data.reference_batches())
    assert total == data.reference_protocol()["records"] == 300

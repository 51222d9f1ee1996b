from __future__ import annotations

import copy
import pickle

import torch

from fewstep.diffusion.tables import Table, expand_to


def test_a_table_keeps_its_precision_when_its_owner_is_cast() -> None:
    owner = torch.nn.Linear(1, 1)
    owner.times = Table([998.0, 999.0])
    assert owner.to(torch.bfloat16).times.on("cpu").tolist() == [998, 999]


def test_a_table_survives_copies_and_pickles() -> None:
    table = Table(torch.tensor([1, 2, 3]))
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert twin.on("cpu").tolist() == [1, 2, 3]
        assert twin.on("cpu").dtype == torch.int64


def test_expanded_values_multiply_each_sample_by_its_own() -> None:
    scaled = expand_to(torch.tensor([1.0, 2.0]), torch.ones(2, 3, 4)) * torch.ones(2, 3, 4)
    assert scaled[0].eq(1).all()
    assert scaled[1].eq(2).all()

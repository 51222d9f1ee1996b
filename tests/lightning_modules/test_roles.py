"""Teachers that ranks load together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fewstep import remembered
from fewstep.errors import FewstepError
from fewstep.networks import pipelines
from fewstep.networks.text import TextEncoding
from lightning_modules import roles
from lightning_modules.roles import Pretrained, load_teacher

from ranks import in_group, run_ranks
from tiny_pipelines import save_stable_diffusion

Found = tuple[list[Any], dict[str, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


def loaded(source: roles.TeacherSource) -> Found:
    """What this rank read itself and what it would draw next, the origin, and all weights."""
    seen: list[Any] = []
    hashed = remembered._hashed

    def hashing(paths: list[Path]) -> str:
        seen.append("hashed")
        return hashed(paths)

    def encoders(*given: Any) -> Any:
        seen.append("encoders")
        torch.rand(dist.get_rank() + 1)  # as some that are built draw their weights
        return TextEncoding(*given)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered.REMEMBERED, "_known", {})
        patch.setattr(remembered, "_hashed", hashing)
        patch.setattr(pipelines, "TextEncoding", encoders)
        teacher, origin = load_teacher(source)
        load_teacher(source)
    return [*seen, float(torch.rand(()))], origin, teacher.state_dict()


def test_one_rank_hashes_a_pipeline_and_encodes_its_empty_prompt_for_all(folder: Path) -> None:
    (first, origin, weights), (second, same, others) = run_ranks(2, in_group, loaded, str(folder))
    assert sorted(map(str, first[:-1])) == ["encoders", "hashed", "hashed"]
    assert len(second) == 1
    assert first[-1] == second[-1], "what starts at random afterwards starts alike"
    assert same == origin
    assert weights.keys() == others.keys()
    assert any("null_" in name and value.any() for name, value in weights.items())
    assert all(torch.equal(others[name], value) for name, value in weights.items())


def test_another_negative_prompt_is_another_condition(folder: Path) -> None:
    nulls = [
        load_teacher(Pretrained(str(folder), negative_prompt=prompt))[0]
        .backbone.get_buffer("null_encoder_hidden_states")
        .clone()
        for prompt in (None, "a b", None)
    ]
    assert not torch.equal(nulls[0], nulls[1])
    assert torch.equal(nulls[0], nulls[2])


def refused(source: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(pipelines, "load_network", broken)
        with pytest.raises(FewstepError) as caught:
            load_teacher(source)
    return str(caught.value)


def broken(*given: Any) -> None:
    raise FewstepError("The first rank's copy is damaged.")


def test_a_pipeline_that_only_the_first_rank_cannot_read_stops_both(folder: Path) -> None:
    messages = run_ranks(2, in_group, refused, str(folder))
    assert messages == ["The first rank's copy is damaged."] * 2

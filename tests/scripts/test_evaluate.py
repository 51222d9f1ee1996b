"""``fewstep evaluate`` of what others made: finished samples and diffusers pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sklearn.datasets import load_digits

from callbacks import Evaluation
from datamodules import Shards
from datamodules.fields import Images
from fewstep.errors import FewstepError
from fewstep.metrics import SlicedWasserstein
from scripts.evaluate import FinishedSamples, PipelineSampler
from scripts.evaluate.counting import counted, runs_twice
from scripts.main import run
from scripts.trainer import FewstepTrainer

from ranks import run_ranks
from rings import quiet_trainer
from shard_files import encoded, write_tar
from tiny_transformers import save_flux


def digits() -> list[np.ndarray[Any, Any]]:
    """The real digits, as 8-bit images."""
    return [np.round(image * (255 / 16)).astype(np.uint8) for image in load_digits().images]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    features = {"class_path": "fewstep.metrics.DigitClassifierFeatures"}
    metric = {"class_path": "fewstep.metrics.FrechetDistance", "init_args": {"features": features}}
    evaluation = {"class_path": "callbacks.Evaluation", "init_args": {"metrics": [metric]}}
    config = {"trainer": {"callbacks": [evaluation]}}
    (tmp_path / "one_metric.yaml").write_text(json.dumps(config))
    return tmp_path


def measured(*arguments: str) -> list[dict[str, Any]]:
    run(["evaluate", "-c", "digits/lcm", "-c", "one_metric.yaml", *arguments])
    (path,) = Path("runs").rglob("results.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["measurements"]
    return found


def write_images(folder: Path, images: list[np.ndarray[Any, Any]]) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")


@pytest.mark.slow
def test_the_data_themselves_as_samples_have_about_no_distance(here: Path) -> None:
    write_images(here / "theirs" / "deep", digits())
    (entry,) = measured("--samples", "theirs", "--steps", "4", "--guidance", "2.0")
    assert entry["metric"] == "frechet_digit_classifier"
    assert entry["value"] < 0.1  # training digits against all digits
    assert entry["num_samples"] == 1797
    assert (entry["role"], entry["num_steps"], entry["guidance_scale"]) == ("samples", 4, 2.0)
    assert Path("runs/samples/theirs/version_0/results.json").is_file()


@pytest.mark.slow
def test_shards_and_folders_of_the_same_samples_measure_the_same(here: Path) -> None:
    images = [255 - image for image in digits()[:300]]
    write_images(here / "files", images)
    write_tar(here / "tars" / "a.tar", {f"{n:04d}.png": encoded(i) for n, i in enumerate(images)})
    (files,) = measured("--samples", "files", "--run.dir", "runs/a")
    found = Path("runs/a/samples/files/version_0/results.json")
    found.unlink()
    (tars,) = measured("--samples", "tars")
    assert files["num_samples"] == tars["num_samples"] == 300
    assert files["value"] == pytest.approx(tars["value"], rel=1e-6)
    assert files["value"] > 10


def test_only_the_first_samples_are_measured_where_fewer_were_asked_for(here: Path) -> None:
    """Of folders and of shards, which may lie deeper: the same ones."""
    images = digits()[:50]
    write_images(here / "theirs", images)
    for shard in range(5):
        numbers = range(10 * shard, 10 * shard + 10)
        members = {f"{n % 10}.png": encoded(images[n]) for n in numbers}
        write_tar(here / "tars" / "deep" / f"{shard}.tar", members)
    write_images(here / "first", images[:23])
    found = []
    for name, count in (("theirs", ["23"]), ("tars", ["23"]), ("first", [])):
        options = ["--num_samples", *count] if count else []
        (entry,) = measured("--samples", name, *options)
        Path(f"runs/samples/{name}/version_0/results.json").unlink()
        assert entry["num_samples"] == 23
        found.append(entry["value"])
    assert found[0] == pytest.approx(found[2], rel=1e-6)
    assert found[1] == pytest.approx(found[2], rel=1e-6)


def test_samples_that_were_made_anew_do_not_join_the_results_of_earlier_ones(here: Path) -> None:
    write_images(here / "theirs", digits()[:30])
    measured("--samples", "theirs", "--steps", "4")
    found = measured("--samples", "theirs", "--steps", "4", "--guidance", "0")
    assert sorted(e["guidance_scale"] for e in found) == [0.0, 1.0]
    Image.fromarray(255 - digits()[0]).save(here / "theirs" / "0003.png")
    (entry,) = measured("--samples", "theirs", "--steps", "8")
    assert (entry["num_steps"], entry["network_evaluations"]) == (8, 8)


def measured_by_a_rank(strategy: str) -> list[dict[str, Any]]:
    options = ["--trainer.strategy", strategy, "--trainer.devices", "2"]
    return measured("--samples", "theirs", *options, "--trainer.accelerator", "cpu")


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_sharded_runs_measure_finished_samples_too(here: Path, kind: str) -> None:
    images = digits()[:41]
    if kind == "files":
        write_images(here / "theirs", images)
    else:
        members = {f"{n}.png": encoded(image) for n, image in enumerate(images)}
        write_tar(here / "theirs" / "a.tar", members)
    first, second = run_ranks(2, measured_by_a_rank, "fsdp2")
    assert first == second
    assert first[0]["num_samples"] == 41


def test_finished_shards_are_read_as_the_experiments_own_are(here: Path) -> None:
    write_tar(here / "theirs" / "a.tar", {"0.png": encoded(digits()[0])})
    options: dict[str, Any] = {"cache": str(here / "cache"), "storage_options": {"s3": {}}}
    write_tar(here / "own" / "a.tar", {"0.png": encoded(digits()[0])})
    data = Shards("own", "own", 4, Images(size=8, channels=1), **options)
    finished = FinishedSamples(here / "theirs", data)
    assert len(list((here / "cache" / "own").glob("*a.tar.index"))) == 1
    assert finished._shards is not None
    assert finished._shards.sources is data.sources


def test_what_stands_in_for_a_method_is_compared_with_the_data_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(here / "theirs", digits()[:5])
    write_tar(here / "own" / "a.tar", {"0.png": encoded(digits()[0])})
    data = Shards("own", "own", 4, Images(size=8, channels=1))
    monkeypatch.setattr(FewstepTrainer, "_run_validation", lambda *given: None)
    callback = Evaluation([SlicedWasserstein()], against=["data", "teacher"], num_samples=64)
    trainer = quiet_trainer(here, [callback], 1, FewstepTrainer)
    trainer.evaluate(None, data, num_samples=32)
    assert callback.against == ["data", "teacher"]
    assert callback.num_samples == callback.references.teacher_samples == 32
    trainer.evaluate(None, data, samples="theirs")
    assert callback.against == ["data"]


def test_a_damaged_sample_is_refused_and_named(here: Path) -> None:
    write_images(here / "theirs", digits()[:5])
    (here / "theirs" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(FewstepError, match=r"0003\.png.*cannot be decoded"):
        measured("--samples", "theirs")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: None, "no folder or shard"),
        (lambda folder: folder.mkdir(), "holds no"),
    ],
)
def test_a_folder_without_samples_is_refused(here: Path, make: Any, complaint: str) -> None:
    make(here / "theirs")
    with pytest.raises(FewstepError, match=complaint):
        measured("--samples", "theirs")


def test_samples_cannot_be_compared_with_data_that_hold_no_pixels(here: Path) -> None:
    write_images(here / "theirs", digits()[:5])
    with pytest.raises(FewstepError, match=r"RingData.*no images or videos"):
        run(["evaluate", "-c", "analytic/lcm", "--samples", "theirs"])


def tiny_pipeline(folder: Path, seed: int = 0) -> None:
    """An untrained class-conditional pipeline of 8 x 8 grey images."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)


def test_a_pipeline_is_measured_as_it_samples_by_itself(here: Path) -> None:
    tiny_pipeline(here / "pipe")
    options = ["--pipeline", "pipe", "--num_samples", "8", "--guidance", "1.5"]
    entries = measured(*options, "--steps", "1", "2")
    assert [e["num_steps"] for e in entries] == [1, 2]
    assert [e["network_evaluations"] for e in entries] == [2, 4]
    assert all(e["role"] == "pipeline" and e["guidance_scale"] == 1.5 for e in entries)
    assert all(e["protocol"]["sample_shape"] == [1, 8, 8] for e in entries)
    assert entries[0]["value"] != entries[1]["value"]


@pytest.mark.parametrize("guidance", ["0", "1"])
def test_without_guidance_a_pipeline_evaluates_once_a_step(here: Path, guidance: str) -> None:
    tiny_pipeline(here / "pipe")
    options = ["--pipeline", "pipe", "--num_samples", "4", "--guidance", guidance]
    (entry,) = measured(*options, "--steps", "3")
    assert (entry["guidance_scale"], entry["network_evaluations"]) == (float(guidance), 3)


def on_device(folder: Path, steps: list[int], guidance: float) -> tuple[PipelineSampler, Any]:
    """A sampler as Lightning has set it up, though it was not moved yet; and its trainer."""
    sampler = PipelineSampler(folder, steps, guidance)
    strategy = SimpleNamespace(root_device=torch.device("cpu", 0))
    trainer = SimpleNamespace(strategy=strategy)
    sampler._trainer = trainer  # type: ignore[assignment]
    return sampler, trainer


def test_a_pipeline_is_moved_to_the_ranks_device_and_probed_with_few_steps(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline(here / "pipe")
    sampler, _trainer = on_device(here / "pipe", [4, 2], 1.5)
    moved: list[Any] = []
    steps: list[int] = []
    sample = sampler.sample

    def noted(noise: Any, cond: Any, num_steps: int, *given: Any, **named: Any) -> Any:
        steps.append(num_steps)
        return sample(noise, cond, num_steps, *given, **named)

    monkeypatch.setattr(sampler._pipeline, "to", moved.append)
    monkeypatch.setattr(sampler, "sample", noted)
    sampler.setup("validate")
    assert moved == [torch.device("cpu", 0)]
    assert steps == [2]
    assert sampler.sample_shape == (1, 8, 8)
    assert [sampler.sampling_evaluations(k) for k in (2, 4)] == [4, 8]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_pipeline_that_embeds_its_guidance_evaluates_once_a_step(
    here: Path, embedded: bool
) -> None:
    save_flux(here / "pipe", guidance_embeds=embedded)
    sampler, _trainer = on_device(here / "pipe", [1], 3.5)
    sampler.setup("validate")
    assert sampler.guidance_scale() == 3.5
    assert [sampler.sampling_evaluations(k) for k in (1, 4)] == [1, 4]


def test_passes_that_cannot_be_counted_are_those_the_pipeline_tells_of() -> None:
    assert not runs_twice(SimpleNamespace(do_classifier_free_guidance=False), 7.5)
    assert runs_twice(SimpleNamespace(do_classifier_free_guidance=True), 7.5)
    assert runs_twice(SimpleNamespace(), 7.5)
    assert not runs_twice(SimpleNamespace(), 1.0)


def test_evaluations_are_counted_in_samples(here: Path) -> None:
    """Also where they come as a list or by name; and no longer than asked."""

    class Both(torch.nn.Module):
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states

    pipeline = SimpleNamespace(unet=None, transformer=Both())
    with counted(pipeline) as count:
        pipeline.transformer(torch.zeros(6, 1))
        pipeline.transformer(hidden_states=[torch.zeros(1)] * 3)
    pipeline.transformer(torch.zeros(6, 1))
    assert count.seen == 9


def test_another_pipeline_in_the_same_folder_is_another_source(here: Path) -> None:
    tiny_pipeline(here / "pipe")
    before = PipelineSampler(here / "pipe", [1]).sample_source()
    assert before == PipelineSampler(here / "pipe", [2]).sample_source()
    tiny_pipeline(here / "pipe", seed=1)
    after = PipelineSampler(here / "pipe", [1]).sample_source()
    assert after != before
    assert {**after, "contents": ""} == {**before, "contents": ""}


def test_a_folder_that_is_no_pipeline_is_refused(here: Path) -> None:
    (here / "pipe").mkdir()
    with pytest.raises(FewstepError, match=r"no model_index\.json"):
        measured("--pipeline", "pipe")

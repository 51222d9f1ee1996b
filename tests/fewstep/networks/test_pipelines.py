"""Pipelines' other parts and the errors of broken folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.networks.latents import LatentCodec
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of

from tiny_pipelines import motion_adapter, save_stable_diffusion, tiny_vae, unet
from tiny_transformers import SAVES, loaded_by_diffusers, ltx_vae

PROMPTS = ["a b", "moving c"]
WITH_TEXT = [name for name in SAVES if name != "dit"]
FRAMES = {"modelscope": 3, "animatediff": 3, "wan": 5, "ltx": 9}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[LoadedPipeline, Any]]:
    """Each tiny pipeline, loaded here and by diffusers."""
    made: dict[str, tuple[LoadedPipeline, Any]] = {}

    def loaded(name: str) -> tuple[LoadedPipeline, Any]:
        if name not in made:
            folder = SAVES[name](tmp_path_factory.mktemp(name))
            ours = load_denoiser_of(folder, (16, 16), FRAMES.get(name))
            made[name] = ours, loaded_by_diffusers(folder)
        return made[name]

    return loaded


@pytest.fixture
def broken(tmp_path: Path, load: Any) -> Path:
    """A Stable Diffusion pipeline to break."""
    return Path(shutil.copytree(load("sd")[0].folder, tmp_path / "broken"))


# ---------------------------------------------------------------------- text


def branches(name: str, pipe: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a pipeline's own call makes of the prompts: its two branches."""
    text = "encoder_hidden_states"
    if name == "sdxl":
        a, b, c, d = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
        return {text: a, "text_embeds": c}, {text: b, "text_embeds": d}
    if name == "sd3":
        a, b, c, d = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=256)
        return {text: a, "pooled_projections": c}, {text: b, "pooled_projections": d}
    if name == "flux":
        (a, b, _), (c, d, _) = (pipe.encode_prompt(p, None) for p in (PROMPTS, [""] * 2))
        return {text: a, "pooled_projections": b}, {text: c, "pooled_projections": d}
    if name in ("pixart", "ltx"):
        length = {"pixart": 300, "ltx": 128}[name]
        a, b, c, d = pipe.encode_prompt(PROMPTS, max_sequence_length=length)
        mask = "encoder_attention_mask"
        return {text: a, mask: b.long()}, {text: c, mask: d.long()}
    if name == "wan":
        a, b = pipe.encode_prompt(PROMPTS, max_sequence_length=512)
    else:
        a, b = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    return {text: a}, {text: b}


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_is_encoded_as_the_pipeline_does(name: str, load: Any) -> None:
    ours, pipe = load(name)
    with torch.no_grad():
        given, null = branches(name, pipe)
    found = ours.text.encode(PROMPTS)
    torch.testing.assert_close(found, given, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(
        found["encoder_hidden_states"][0], found["encoder_hidden_states"][1], atol=1e-3
    )
    torch.testing.assert_close(ours.denoiser.backbone.null_cond(found), null, atol=1e-6, rtol=1e-5)
    first = {key: value[:1] for key, value in null.items()}
    torch.testing.assert_close(ours.text.null(), first, atol=1e-6, rtol=1e-5)


def test_text_encoders_come_back_to_the_cpu(load: Any) -> None:
    text = load("sd")[0].text
    before = text.encode(PROMPTS)
    text.to("meta")
    text.to("cpu").offload()
    assert text.pipeline.text_encoder.device.type == "cpu"
    assert torch.equal(text.encode(PROMPTS)["encoder_hidden_states"], *before.values())


def test_parts_are_loaded_when_asked_for_and_not_before(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = load("sd")[0].folder
    null = load("sd")[0].text.null()
    asked: list[str] = []

    def refuse(name: str) -> Callable[..., None]:
        return lambda *_: asked.append(name)

    for name in ("TextEncoding", "LatentCodec"):
        monkeypatch.setattr(f"fewstep.networks.pipelines.{name}", refuse(name))
    loaded = load_denoiser_of(folder, null=null)
    assert not asked
    assert (loaded.text, loaded.latents, asked) == (None, None, ["TextEncoding", "LatentCodec"])
    buffer = loaded.denoiser.backbone.get_buffer("null_encoder_hidden_states")
    assert torch.equal(buffer, null["encoder_hidden_states"])
    load_denoiser_of(load("sdxl")[0].folder)  # whose null condition is zeros
    load_denoiser_of(load("dit")[0].folder)  # without text
    assert len(asked) == 2


def test_a_network_may_be_kept_in_half_precision(load: Any) -> None:
    ours, _ = load("sd")
    null = ours.text.null()
    half = load_denoiser_of(ours.folder, null=null, network_dtype=torch.bfloat16).denoiser
    assert half.backbone.low_precision == torch.bfloat16
    assert half.backbone.get_buffer("null_encoder_hidden_states").dtype == torch.float32
    x, t, cond = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), ours.text.encode(PROMPTS)
    exact = ours.denoiser.guided(x, t, cond, 3.0).eps
    assert (half.guided(x, t, cond, 3.0).eps - exact).norm() < 0.05 * exact.norm()


def test_dit_has_no_text(load: Any) -> None:
    with pytest.raises(FewstepError, match="A DiTPipeline has no text encoder"):
        _ = load("dit")[0].text


# ---------------------------------------------------------------------- latents


def test_an_image_is_coded_with_scale_and_shift(load: Any) -> None:
    for name in ("sd", "sdxl", "sd3", "flux", "pixart", "dit"):
        ours, pipe = load(name)
        vae, config = pipe.vae, pipe.vae.config
        shift = config.shift_factor or 0.0
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            mean = (posterior.mean - shift) * config.scaling_factor
            back = vae.decode(mean / config.scaling_factor + shift).sample.clamp(-1, 1)
        torch.testing.assert_close(ours.latents.encode(pixels), mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.latents.decode(mean), back, atol=1e-5, rtol=1e-4)
        assert mean.shape[1:] == ours.denoiser.sample_shape


def test_drawn_latents_are_those_of_the_posterior(load: Any) -> None:
    ours, pipe = load("sd")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    expected = (posterior.sample(torch.Generator().manual_seed(5)) - 0.25) * 0.5
    found = ours.latents.encode(pixels, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, ours.latents.encode(pixels), atol=1e-3)


@pytest.mark.parametrize("name", ["modelscope", "animatediff"])
def test_an_image_vae_codes_videos_frame_by_frame(name: str, load: Any) -> None:
    ours, pipe = load(name)
    clips = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    latents = ours.latents.encode(clips)
    assert latents.shape == (2, *ours.denoiser.sample_shape)
    with torch.no_grad():
        for clip in range(2):
            frames = pipe.vae.encode(clips[clip].transpose(0, 1)).latent_dist.mean * 0.5
            torch.testing.assert_close(latents[clip].transpose(0, 1), frames, atol=1e-5, rtol=1e-4)
        back = pipe.decode_latents(latents).clamp(-1, 1)
    torch.testing.assert_close(ours.latents.decode(latents), back, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_video_vae_normalises_by_channel(name: str, load: Any) -> None:
    ours, pipe = load(name)
    vae = pipe.vae
    mean, std, factor = vae.config.get("latents_mean"), vae.config.get("latents_std"), 1.0
    if name == "ltx":
        mean, std, factor = vae.latents_mean.clone(), vae.latents_std.clone(), 1.5
    mean, std = (torch.as_tensor(v).view(1, -1, 1, 1, 1) for v in (mean, std))
    clips = torch.rand(2, 3, FRAMES[name], 16, 16) * 2 - 1
    with torch.no_grad():
        expected = (vae.encode(clips).latent_dist.mean - mean) * factor / std
        back = vae.decode(expected * std / factor + mean).sample.clamp(-1, 1)
    assert expected.shape[1:] == ours.denoiser.sample_shape
    torch.testing.assert_close(ours.latents.encode(clips), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.latents.decode(expected), back, atol=1e-5, rtol=1e-4)
    assert back.shape == clips.shape


def test_a_video_vae_takes_images(load: Any) -> None:
    codec = load("wan")[0].latents
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, 4, 1, 2, 2)
    assert codec.decode(latents[:, :, 0]).shape == images.shape


def test_slices_and_tiles_save_memory_and_change_little(load: Any) -> None:
    folder = load("sd")[0].folder
    latents = torch.randn(3, 4, 8, 8)
    whole = LatentCodec(folder).decode(latents)
    sliced = LatentCodec(folder, slicing=True)
    assert sliced.vae.use_slicing
    torch.testing.assert_close(sliced.decode(latents), whole, atol=1e-5, rtol=1e-4)
    assert LatentCodec(folder, tiling=True).vae.use_tiling


def test_weights_in_half_precision_only_are_found(load: Any, tmp_path: Path) -> None:
    ours, pipe = load("sd")
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.glob("*/diffusion_pytorch_model.safetensors"))
    found = load_denoiser_of(tmp_path)
    weights, own = found.denoiser.state_dict(), ours.denoiser.state_dict()
    torch.testing.assert_close(weights, own, atol=1e-6, rtol=1e-5)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(found.latents.decode(latents), ours.latents.decode(latents))


def test_a_vae_that_denoises_while_decoding_starts_at_time_zero(tmp_path: Path) -> None:
    vae = ltx_vae(timestep_conditioning=True)
    vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(2, 8, 3, 4, 4)
    with torch.no_grad():
        z = latents * vae.latents_std.view(1, -1, 1, 1, 1) / 1.5
        z = z + vae.latents_mean.view(1, -1, 1, 1, 1)
        expected = vae.eval().decode(z, torch.zeros(2)).sample.clamp(-1, 1)
    torch.testing.assert_close(LatentCodec(tmp_path).decode(latents), expected)


def test_a_tiny_vae_has_one_latent(tmp_path: Path) -> None:
    codec = LatentCodec(save_stable_diffusion(tmp_path, tiny_vae()))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    drawn = codec.encode(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, codec.encode(pixels))
    assert codec.factors == (1, 2)


# ---------------------------------------------------------------------- what the folder says


def test_the_folder_says_where_it_came_from(load: Any, broken: Path) -> None:
    ours, _ = load("sd")
    assert ours.source == str(ours.folder)
    assert len(ours.sha256) == 64
    assert load_denoiser_of(broken).sha256 == ours.sha256
    weights = next((broken / "unet").glob("*.safetensors"))
    changed = load_file(weights)
    changed["conv_in.bias"] += 1
    save_file(changed, weights)
    assert load_denoiser_of(broken).sha256 != ours.sha256


def test_the_size_is_the_pipelines_own_or_the_given(load: Any) -> None:
    folder = load("sd")[0].folder
    assert load_denoiser_of(folder).denoiser.sample_shape == (4, 8, 8)
    assert load_denoiser_of(folder, (32, 48)).denoiser.sample_shape == (4, 16, 24)
    wan = load_denoiser_of(load("wan")[0].folder)
    assert (wan.size, wan.denoiser.sample_shape) == ((480, 832), (4, 21, 60, 104))
    clip = load_denoiser_of(load("animatediff")[0].folder)
    assert clip.denoiser.sample_shape == (4, 16, 8, 8)
    for name, unit in (("sd", 2), ("flux", 4), ("sd3", 4), ("wan", 16)):
        with pytest.raises(FewstepError, match=f"multiples of {unit} for"):
            load_denoiser_of(load(name)[0].folder, (16, 16 + unit // 2))
    with pytest.raises(FewstepError, match=r"1 \+ 4 n frames, not 6"):
        load_denoiser_of(load("wan")[0].folder, frames=6)


def test_the_trajectory_ends_as_the_scheduler_says(load: Any) -> None:
    ends = {name: load(name)[0].denoiser.schedule.t_min for name in ("sd", "dit", "sd3", "wan")}
    assert ends == {"sd": 0.0, "dit": -1.0, "sd3": 0.0, "wan": 0.0}
    assert load("sd3")[0].denoiser.schedule.config["shift"] == 3.0


def test_a_scheduler_that_knows_no_other_end_ends_at_clean_data(broken: Path) -> None:
    shutil.rmtree(broken / "scheduler")
    released = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_end=0.015)
    released.save_pretrained(broken / "scheduler")
    schedule = load_denoiser_of(broken).denoiser.schedule
    assert (schedule.t_min, schedule.config["beta_end"]) == (-1.0, 0.015)


def test_prediction_type_and_betas_come_from_the_folder(load: Any) -> None:
    assert load("animatediff")[0].denoiser.schedule.config["beta_schedule"] == "linear"
    loaded = load("sd2-v")[0].denoiser
    assert loaded.prediction_type == "v_prediction"
    assert float(loaded.schedule.alpha(torch.tensor([999.0]))) == pytest.approx(0, abs=1e-6)


def test_an_animatediff_with_the_image_models_betas_is_warned_of(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(load("animatediff")[0].folder, tmp_path / "pipe")
    load_denoiser_of(folder)
    assert not caplog.records
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "scaled_linear"}))
    load_denoiser_of(folder)
    (record,) = caplog.records
    assert "beta_schedule 'scaled_linear'" in record.getMessage()
    assert "with 'linear'" in record.getMessage()


def test_a_flow_may_hide_in_a_scheduler_for_betas(load: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(load("wan")[0].folder, tmp_path / "wan")
    released = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    released.save_pretrained(folder / "scheduler")
    loaded = load_denoiser_of(folder, (16, 16), 5).denoiser
    assert loaded.prediction_type == "flow_prediction"
    assert loaded.schedule.config["shift"] == 5.0


def test_animatediff_may_come_as_image_model_and_adapter(load: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = Path(shutil.copytree(load("animatediff")[0].folder, tmp_path / "apart"))
    shutil.rmtree(folder / "unet")
    unet().save_pretrained(folder / "unet")
    motion_adapter().save_pretrained(folder / "motion_adapter")
    parts = (unet().from_pretrained(folder / "unet"), motion_adapter())
    joined = load_denoiser_of(folder, (16, 16), 3)
    adapter = type(parts[1]).from_pretrained(folder / "motion_adapter")
    expected = type(joined.denoiser.backbone.network).from_unet2d(parts[0], adapter).eval()
    x, t = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0])
    text = joined.text.encode(["a"])["encoder_hidden_states"]
    with torch.no_grad():
        found = joined.denoiser.raw(x, t, {"encoder_hidden_states": text})
        by_hand = expected(x, t, text.repeat_interleave(3, 0)).sample
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------- mistakes


def test_a_folder_that_is_none_is_refused(tmp_path: Path, broken: Path) -> None:
    with pytest.raises(FewstepError, match="There is no folder"):
        load_denoiser_of(tmp_path / "nowhere")
    with pytest.raises(FewstepError, match=r"needs a model_index\.json"):
        load_denoiser_of(tmp_path)
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(FewstepError, match=r"KandinskyPipeline; supported are .*FluxPipeline"):
        load_denoiser_of(broken)


def test_a_hub_name_is_looked_up_in_the_local_cache_only(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FewstepError, match="hf download REPOSITORY --local-dir some/model"):
        load_denoiser_of("some/model")
    cached = tmp_path / "models--some--model"
    commit = "0" * 40
    shutil.copytree(load("sd")[0].folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    found = load_denoiser_of("some/model")
    assert found.source == "some/model"
    assert found.sha256 == load("sd")[0].sha256


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(part: str, broken: Path) -> None:
    shutil.rmtree(broken / part)
    with pytest.raises(FewstepError, match=f"{part}.*download"):
        _ = load_denoiser_of(broken).latents


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_truncated_weights_are_named(part: str, broken: Path) -> None:
    weights = next((broken / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FewstepError, match=r"download (them|it)\s+again"):
        _ = load_denoiser_of(broken).latents


def test_weights_that_are_not_there_are_not_drawn_at_random(broken: Path) -> None:
    weights = next((broken / "unet").glob("*.safetensors"))
    kept = load_file(weights)
    del kept["conv_in.weight"]
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(FewstepError, match=r"lacks 1 weights, such as 'conv_in\.weight'"):
        load_denoiser_of(broken)


def test_wans_weights_are_read_whole_or_not_at_all(load: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(load("wan")[0].folder, tmp_path / "wan"))
    weights = next((folder / "transformer").glob("*.safetensors"))
    kept = load_file(weights)
    del kept["patch_embedding.bias"]
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(FewstepError, match="lacks 1 weights"):
        load_denoiser_of(folder, (16, 16), 5)
    weights.unlink()
    with pytest.raises(FewstepError, match="Cannot read the weights"):
        load_denoiser_of(folder, (16, 16), 5)


def test_two_stage_wan_is_refused(load: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(load("wan")[0].folder, tmp_path / "wan"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(FewstepError, match=r"Wan 2\.2 pipeline with two networks"):
        load_denoiser_of(folder, (16, 16), 5)


def test_a_network_of_another_family_is_refused(load: Any, broken: Path) -> None:
    shutil.rmtree(broken / "unet")
    shutil.copytree(load("modelscope")[0].folder / "unet", broken / "unet")
    with pytest.raises(FewstepError, match=r"is a UNet3DConditionModel; .* UNet2DConditionModel"):
        load_denoiser_of(broken)


def test_a_scheduler_without_a_schedule_is_refused(broken: Path) -> None:
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "NoScheduler"}))
    with pytest.raises(FewstepError, match="scheduler 'NoScheduler'"):
        load_denoiser_of(broken)
    path.write_text(json.dumps({"_class_name": "KarrasVeScheduler"}))
    with pytest.raises(FewstepError, match="neither betas nor a flow"):
        load_denoiser_of(broken)

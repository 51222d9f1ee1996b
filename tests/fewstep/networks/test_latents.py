from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, TextToVideoSDPipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fewstep.networks.latents import LatentCodec, chosen_frames

from tiny_pipelines import save_text_to_video
from tiny_transformers import ltx_vae, save_wan

FRAMES = torch.tensor([[0, 3], [2, 1]])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LatentCodec]:
    """The VAE of a tiny pipeline."""
    made: dict[str, LatentCodec] = {}

    def get(name: str) -> LatentCodec:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "wan":
                save_wan(folder)
            elif name == "ltx":
                ltx_vae().save_pretrained(folder / "vae")
            else:
                kinds = {"modelscope": TextToVideoSDPipeline, "animatediff": AnimateDiffPipeline}
                save_text_to_video(folder, kinds[name])
            made[name] = LatentCodec(Path(folder))
        return made[name]

    return get


SHAPES = {
    "modelscope": (4, 4, 8, 8),
    "animatediff": (4, 4, 8, 8),
    "wan": (4, 2, 2, 2),
    "ltx": (8, 2, 2, 2),
}
IMAGES = ["modelscope", "animatediff"]
VIDEOS = ["wan", "ltx"]


# ---------------------------------------------------------------------- choosing frames


def test_each_video_gives_its_own_frames_in_their_order() -> None:
    video = randn(2, 3, 5, 4, 6)
    found = chosen_frames(video, torch.tensor([[4, 0, 2], [1, 1, 3]]))
    assert found.shape == (2, 3, 3, 4, 6)
    assert torch.equal(found[0, 1], video[0, :, 0])
    assert torch.equal(found[1, 2], video[1, :, 3])


def test_choosing_asks_for_no_value_and_passes_gradient_on() -> None:
    video = randn(1, 2, 4, 3, 3).requires_grad_()
    chosen_frames(video, torch.tensor([[1, 1, 2]])).sum().backward()
    assert video.grad is not None
    assert video.grad[0, 0, :, 0, 0].tolist() == [0, 2, 1, 0]
    with FakeTensorMode():
        found = chosen_frames(torch.rand(2, 3, 5, 4, 4), torch.zeros(2, 2, dtype=torch.long))
    assert found.shape == (2, 2, 3, 4, 4)


# ---------------------------------------------------------------------- decoding frames


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_decoded_frames_are_those_of_the_decoded_clip(
    name: str, checkpointed: bool, codec: Callable[[str], LatentCodec]
) -> None:
    latents = randn(2, *SHAPES[name])
    whole = chosen_frames(codec(name).decode(latents), FRAMES)
    found = codec(name).decode_frames(latents, FRAMES, checkpointed)
    assert found.shape == (*FRAMES.shape, *whole.shape[2:])
    torch.testing.assert_close(found.clamp(-1, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_gradient_reaches_the_chosen_frames_and_no_others(
    name: str, checkpointed: bool, codec: Callable[[str], LatentCodec]
) -> None:
    latents = randn(2, *SHAPES[name]).requires_grad_()
    codec(name).decode_frames(latents, FRAMES, checkpointed).square().sum().backward()
    assert latents.grad is not None
    reached = latents.grad.transpose(1, 2).flatten(2).ne(0)
    chosen = torch.zeros(2, 4, dtype=torch.bool).scatter_(1, FRAMES, value=True)
    assert reached.any(2).tolist() == chosen.tolist()
    assert reached[chosen].float().mean() > 0.9


@pytest.mark.parametrize("name", VIDEOS)
def test_gradient_goes_through_decoders_of_videos(
    name: str, codec: Callable[[str], LatentCodec]
) -> None:
    latents = randn(2, *SHAPES[name]).requires_grad_()
    losses = [
        codec(name).decode_frames(latents, FRAMES, checkpointed).square().sum()
        for checkpointed in (False, True)
    ]
    plain, recomputed = (torch.autograd.grad(loss, latents)[0] for loss in losses)
    assert (plain != 0).float().mean() > 0.9
    torch.testing.assert_close(plain, recomputed)


def test_the_gradient_is_the_decoders_own(codec: Callable[[str], LatentCodec]) -> None:
    found = codec("modelscope")
    latents, direction = randn(1, 4, 3, 4, 4), randn(1, 4, 3, 4, 4, seed=1)
    frames, weights = torch.tensor([[2]]), randn(1, 1, 3, 8, 8, seed=2)

    def score(step: float) -> Tensor:
        with torch.no_grad():
            return (weights * found.decode_frames(latents + step * direction, frames)).sum()

    leaf = latents.clone().requires_grad_()
    (weights * found.decode_frames(leaf, frames)).sum().backward()
    assert leaf.grad is not None
    slope = (score(1e-2) - score(-1e-2)) / 2e-2
    torch.testing.assert_close((leaf.grad * direction).sum(), slope, atol=1e-2, rtol=2e-2)


def test_pixels_that_overshoot_have_a_gradient(codec: Callable[[str], LatentCodec]) -> None:
    latents = 100 * randn(1, *SHAPES["modelscope"])
    latents.requires_grad_()
    pixels = codec("modelscope").decode_frames(latents, FRAMES[:1])
    outside = pixels.abs() > 1
    assert outside.any()
    (pixels * outside).sum().backward()
    assert latents.grad is not None
    assert (latents.grad != 0).any()


def test_the_vae_itself_is_not_trained(codec: Callable[[str], LatentCodec]) -> None:
    latents = randn(2, *SHAPES["modelscope"]).requires_grad_()
    codec("modelscope").decode_frames(latents, FRAMES).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in codec("modelscope").vae.parameters())


def test_recomputing_keeps_less(codec: Callable[[str], LatentCodec]) -> None:
    def kept(checkpointed: bool) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        latents = randn(2, *SHAPES["modelscope"]).requires_grad_()
        with saved_tensors_hooks(note, lambda tensor: tensor):
            codec("modelscope").decode_frames(latents, FRAMES, checkpointed)
        return sum(sizes)

    assert 10 * kept(True) < kept(False)


# ---------------------------------------------------------------------- real frames


@pytest.mark.parametrize("name", SHAPES)
def test_frames_are_encoded_as_images(name: str, codec: Callable[[str], LatentCodec]) -> None:
    found, frames = codec(name), randn(2, 3, 3, 64, 64).clamp(-1, 1)
    latents = found.encode_frames(frames)
    side = 64 // found.factors[1]
    assert latents.shape == (2, 3, SHAPES[name][0], side, side)
    alone = found.encode(frames[1, 2:])
    alone = alone[:, :, 0] if found.encodes_videos else alone
    torch.testing.assert_close(latents[1, 2:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_round_trip_decodes_what_it_encoded(
    name: str, codec: Callable[[str], LatentCodec]
) -> None:
    found, frames = codec(name), randn(2, 2, 3, 32, 32).clamp(-1, 1).requires_grad_()
    back = found.round_trip(frames)
    assert back.shape == frames.shape
    assert not back.requires_grad
    expected = found.decode(found.encode_frames(frames).flatten(0, 1))
    torch.testing.assert_close(back.flatten(0, 1).clamp(-1, 1), expected, atol=1e-5, rtol=1e-4)


def test_a_round_trip_may_draw_latents(codec: Callable[[str], LatentCodec]) -> None:
    found, frames = codec("modelscope"), randn(1, 2, 3, 16, 16).clamp(-1, 1)

    def drawn(seed: int) -> Tensor:
        return found.round_trip(frames, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))

"""Latents and embeddings: numbers from bytes, and never a pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from datamodules.fields import Latents, Tensors
from datamodules.fields.tensors import read_npy


def npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_are_read_as_numpy_reads_them(dtype: str, order: Any) -> None:
    values = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    assert np.array_equal(read_npy(npy(values)), values)


def test_objects_in_an_npy_file_are_not_unpickled(tmp_path: Path) -> None:
    proof = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    data = npy(np.array([Payload()], dtype=object), allow_pickle=True)
    pickle.loads(data[data.index(b"\n") + 1 :])
    assert proof.exists(), "the payload is harmless, so this test would prove nothing"
    proof.unlink()
    with pytest.raises(ValueError, match="never unpickled"):
        Latents().decode(data, "latent.npy", None)
    assert not proof.exists()


def test_an_npy_file_that_claims_terabytes_is_refused() -> None:
    data = npy(np.zeros((2, 2), dtype=np.float32))
    for lie in (b"(2000000, 2000000)", b"(1, 2)"):
        lying = data.replace(b"(2, 2)", lie)
        length = data.index(b"\n") - 9 + len(lie) - 6
        lying = lying[:8] + length.to_bytes(2, "little") + lying[10:]
        with pytest.raises(ValueError, match="claims the shape"):
            read_npy(lying)


def test_latents_are_scaled_as_the_network_sees_them() -> None:
    field = Latents(scale=0.5, shift=1.0)
    values = [field.decode(npy(np.full((1, 2, 2), v, np.float16)), "npy", None) for v in (1, 3)]
    batch = field.finish(field.collate([value.value for value in values]))
    assert batch.dtype == torch.float32
    assert batch.flatten(1).mean(1).tolist() == [0.0, 1.0]


def test_a_latent_is_drawn_from_its_moments_and_evaluation_takes_the_mean() -> None:
    mean = torch.full((4, 32, 32), 2.0, dtype=torch.bfloat16)
    data = save({"mean": mean, "std": torch.full_like(mean, 0.5)})
    field = Latents()
    assert torch.equal(field.decode(data, "latent.safetensors", None).value, mean.float())
    drawn = field.decode(data, "latent.safetensors", lambda: np.random.default_rng(0)).value
    assert abs(float(drawn.mean()) - 2) < 0.05
    assert abs(float(drawn.std()) - 0.5) < 0.03


def test_bfloat16_latents_keep_their_bits() -> None:
    latent = torch.randn(4, 8, 8).bfloat16()
    assert torch.equal(
        Latents().decode(save({"latent": latent}), "latent.safetensors", None).value, latent
    )


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"\xff" * 8 + b"{}", pickle.dumps([1])])
def test_what_is_no_safetensors_file_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no safetensors file"):
        Latents().decode(data, "latent.safetensors", None)


def test_a_part_without_latents_says_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"neither 'latent' nor .* \['other'\]"):
        Latents().decode(save({"other": torch.zeros(1)}), "latent.safetensors", None)


def test_embeddings_become_conditions_under_the_backbones_names() -> None:
    field = Tensors({"prompt_embeds": "encoder_hidden_states"})
    parts = [save({"prompt_embeds": torch.full((3, 2), float(n))}) for n in range(2)]
    values = [field.decode(part, "text.safetensors", None).value for part in parts]
    (name, stacked), *others = field.collate(values).items()
    assert name == "encoder_hidden_states"
    assert stacked.shape == (2, 3, 2)
    assert not others
    with pytest.raises(ValueError, match="lacks prompt_embeds; it has x"):
        field.decode(save({"x": torch.zeros(1)}), "text.safetensors", None)

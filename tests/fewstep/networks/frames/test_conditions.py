from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from fewstep.errors import FewstepError
from fewstep.networks.frames import ClassCondition, FrameCondition, PooledText, TextCondition

from tiny_pipelines import (
    clip_config,
    clip_tokenizer,
    save_stable_diffusion_xl,
    save_text_model,
)

CPU = torch.device("cpu")
PROMPTS = ["a", "b c d", "moving"]


def test_a_class_is_a_single_one() -> None:
    found = ClassCondition(num_classes=3)
    labels = torch.tensor([0, 2, 3])  # the last is a null class
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert torch.equal(found({"class_labels": labels}, None, CPU), expected)
    assert found.dim == 3


def test_text_is_pooled_over_its_tokens() -> None:
    text = torch.randn(2, 4, 6)
    found = PooledText(6)
    assert found.dim == 6
    pooled = found({"encoder_hidden_states": text}, None, CPU)
    torch.testing.assert_close(pooled, text.mean(1))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    cond = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    pooled = found(cond, PROMPTS, CPU)
    torch.testing.assert_close(pooled, torch.stack([text[0, :2].mean(0), text[1].mean(0)]))
    torch.testing.assert_close(PooledText(6, mask=None)(cond, None, CPU), text.mean(1))


def test_a_pooled_embedding_is_taken_as_it_is() -> None:
    text = torch.randn(2, 6)
    assert torch.equal(PooledText(6, name="pooled")({"pooled": text}, None, CPU), text)


def test_what_the_batch_lacks_is_named() -> None:
    cond = {"text": torch.zeros(2, 4, 5)}
    with pytest.raises(FewstepError, match="looks for 'class_labels' and the batch has text"):
        ClassCondition()(cond, None, CPU)
    with pytest.raises(FewstepError, match=r"has no conditions.*set its `name`"):
        PooledText(6)({}, None, CPU)
    with pytest.raises(FewstepError, match=r"5 channels; set the condition's dim: 5, not 6"):
        PooledText(6, name="text")(cond, None, CPU)
    with pytest.raises(FewstepError, match=r"the batch has none.*PooledText"):
        TextCondition("anything")(cond, None, CPU)


def test_captions_are_embedded_as_clip_projects_them(tmp_path: Path) -> None:
    model = save_text_model(tmp_path)
    found = TextCondition(str(tmp_path))
    assert found.dim == 12
    assert set(vars(found)) == {"source", "tokenizer", "_config"}  # and no weights yet
    embeddings = found({}, PROMPTS, CPU)
    assert embeddings.shape == (3, 12)
    tokenizer = clip_tokenizer(tmp_path)
    with torch.no_grad():
        for prompt, embedding in zip(PROMPTS, embeddings, strict=True):  # one by one: no padding
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            expected = model(input_ids=ids).text_embeds[0]
            torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
    assert (embeddings.norm(dim=1) - 1).abs().min() > 0.01  # not normalised
    assert not embeddings.requires_grad


def test_captions_longer_than_the_model_reads_are_cut(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    found = TextCondition(str(tmp_path))
    long, longer = found({}, ["a " * 200, "a " * 300], CPU)
    torch.testing.assert_close(long, longer)


def test_a_whole_clip_serves_and_its_outer_dimension_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=28, patch_size=14)
    text = {k: v for k, v in clip_config().to_dict().items() if k != "projection_dim"}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=20)
    ).eval()
    model.save_pretrained(tmp_path)
    clip_tokenizer(tmp_path).save_pretrained(tmp_path)
    found = TextCondition(str(tmp_path))
    assert found.dim == 20
    embeddings = found({}, PROMPTS[:1], CPU)
    ids = clip_tokenizer(tmp_path)(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pooled = model.text_model(input_ids=ids).pooler_output
        torch.testing.assert_close(embeddings, model.text_projection(pooled), atol=1e-5, rtol=1e-4)


def test_a_pipelines_second_text_encoder_serves(tmp_path: Path) -> None:
    folder = save_stable_diffusion_xl(tmp_path)
    found = TextCondition(str(folder / "text_encoder_2"), str(folder / "tokenizer_2"))
    assert found({}, PROMPTS, CPU).shape == (3, found.dim)


def test_autocast_leaves_embeddings_their_precision(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    found = TextCondition(str(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = found({}, PROMPTS, CPU)
    assert torch.equal(embeddings, found({}, PROMPTS, CPU))


def test_an_encoder_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"no network at 'nobody/nothing'.*hf download"):
        assert TextCondition("nobody/nothing").dim
    save_text_model(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(FewstepError, match="set tokenizer: FOLDER"):
        TextCondition(str(tmp_path), str(tmp_path / "tokenizer"))({}, PROMPTS, CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(FewstepError, match=r"'t5'; needed is 'clip' or 'clip_text_model'"):
        assert TextCondition(str(tmp_path)).dim


def test_another_condition_is_a_subclass() -> None:
    class Constant(FrameCondition):
        @property
        def dim(self) -> int:
            return 1

        def __call__(self, cond: object, prompts: object, device: torch.device) -> torch.Tensor:
            return torch.ones(2, 1, device=device)

    assert Constant()({}, None, CPU).shape == (2, Constant().dim)

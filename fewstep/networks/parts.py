"""Loading the parts of a pipeline's folder: networks, VAEs and text encoders."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_accelerate_available, is_transformers_available
from safetensors import SafetensorError
from safetensors.torch import load_file

from fewstep.errors import FewstepError
from fewstep.networks.folders import TEXT_MODELS, pipeline_name, read_json
from fewstep.networks.gates.files import WEIGHTS as GATES

WEIGHTS = "diffusion_pytorch_model.safetensors"
WHOLE = "download it whole: `hf download REPOSITORY --local-dir FOLDER`"


def load_part(
    folder: Path, part: str, dtype: torch.dtype = torch.float32, weights: bool = True
) -> Any:
    """A pipeline's network or VAE, by the class its own configuration names, frozen.

    Args:
        weights: whether to read its weights; otherwise its configuration is all that is needed,
            and they are as its class draws them.

    Raises:
        FewstepError: if it is missing, damaged or lacks weights.
    """
    quiet()
    if not (folder / part).is_dir():
        raise FewstepError(f"The pipeline '{folder}' has no '{part}'; {WHOLE}.")
    name = read_json(folder / part / "config.json").get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise FewstepError(
            f"'{folder / part}' is a '{name}', which this version of diffusers "
            f"({diffusers.__version__}) does not know."
        )
    try:
        if weights:
            model, missing = _read_network(cls, folder / part)
        else:
            model, missing = cls.from_config(cls.load_config(folder / part)), []
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FewstepError(
            f"Cannot read the weights of '{folder / part}' ({reason}); download them again."
        ) from error
    # What is missing would silently stay as it was drawn at random.
    if missing:
        raise FewstepError(
            f"'{folder / part}' lacks {len(missing)} weights, such as '{min(missing)}'; download "
            "it again."
        )
    return model.requires_grad_(False).eval().to(dtype)


def _read_network(cls: Any, folder: Path) -> tuple[Any, list[str]]:
    """A network with its weights, and the names of those that are missing."""
    fast = is_accelerate_available()
    if fast or not cls._keep_in_fp32_modules:
        model, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            variant=_variant(folder),
            low_cpu_mem_usage=fast,  # or diffusers asks for accelerate at length
            output_loading_info=True,
        )
        return model, list(report["missing_keys"])
    # diffusers reads such networks (Wan's) with the accelerate package only.
    model = cls.from_config(cls.load_config(folder))
    index = folder / f"{WEIGHTS}.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {WEIGHTS}
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        weights |= load_file(folder / name)
    return model, list(model.load_state_dict(weights, strict=False).missing_keys)


def _variant(folder: Path) -> str | None:
    """``fp16`` where a folder holds the weights in half precision only."""
    names = [path.name for path in folder.glob("*.safetensors") if path.name != GATES]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def load_text_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with its text encoders and nothing else.

    Raises:
        FewstepError: if they are missing or damaged, or the transformers package is.
    """
    if not is_transformers_available():
        raise FewstepError("Text encoders need the transformers package: pip install transformers.")
    quiet()
    name, listed = pipeline_name(folder), read_json(folder / "model_index.json")
    for part, value in listed.items():
        if part in TEXT_MODELS and value[0] is not None and not (folder / part).is_dir():
            raise FewstepError(f"The pipeline '{folder}' has no '{part}'; {WHOLE}.")
    kept = {"scheduler", *TEXT_MODELS}
    left_out: dict[str, Any] = {
        part: None for part, value in listed.items() if isinstance(value, list) and part not in kept
    }
    if "requires_safety_checker" in listed:
        left_out["requires_safety_checker"] = False
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            variant=_variant(folder / "text_encoder"),
            low_cpu_mem_usage=is_accelerate_available(),
            **left_out,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FewstepError(
            f"Cannot load the text encoders of the pipeline '{folder}' ({reason}); download it "
            "again."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for part in TEXT_MODELS:
        module = getattr(pipeline, part, None)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def quiet() -> None:
    """Keeps diffusers and transformers from printing anything but errors."""
    names = ["diffusers.utils.logging"]
    if is_transformers_available():
        names.append("transformers.utils.logging")
    for chatter in map(importlib.import_module, names):
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()

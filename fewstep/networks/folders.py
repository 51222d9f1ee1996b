"""Folders of diffusers pipelines: finding them, their configurations, sizes and hashes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from fewstep.errors import FewstepError
from fewstep.networks.families import FAMILIES, Family
from fewstep.networks.families.family import Configs
from fewstep.remembered import sha256_of

Config = Mapping[str, Any]
TEXT_MODELS = tuple(
    f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
)


def find_folder(where: str | Path) -> Path:
    """A pipeline's folder, or the local copy of a repository of the Hugging Face hub.

    Nothing is downloaded.

    Raises:
        FewstepError: if there is neither.
    """
    path = Path(where)
    if path.is_dir():
        return path
    name = str(where)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise FewstepError(
                f"There is no folder '{name}', and the cache of the Hugging Face hub has no "
                f"repository of that name. If it is to be a folder: `hf download REPOSITORY "
                f"--local-dir {name}`; the head of an experiment, or of its folder's "
                f"defaults.yaml, names the repository. If it is a repository: `hf download {name}`."
            ) from error
    raise FewstepError(f"There is no folder '{path}'; give that of a diffusers pipeline.")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a configuration; of a missing or damaged one, an error that names it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FewstepError(
            f"The pipeline's '{path}' is missing or damaged; download the folder again."
        ) from error
    return found


def pipeline_name(folder: Path) -> str:
    """The class of a pipeline's folder.

    Raises:
        FewstepError: if it is no pipeline's, or not supported.
    """
    try:
        name = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise FewstepError(
            f"'{folder}' is no folder of a diffusers pipeline: it needs a model_index.json, as "
            "save_pretrained or `hf download REPOSITORY --local-dir FOLDER` writes it."
        ) from error
    if name not in FAMILIES:
        raise FewstepError(f"'{folder}' is a {name}; supported are {', '.join(FAMILIES)}.")
    return name


def family_of(folder: Path) -> Family:
    """The model family of a pipeline's folder."""
    return FAMILIES[pipeline_name(folder)]


def part_of(folder: Path, part: str) -> str:
    """The folder of a pipeline's part within its own.

    Of repositories of nothing but a network and a scheduler, as DDPM's, that may be the same.
    """
    flat = not (folder / part).is_dir() and (folder / "config.json").is_file()
    return "." if flat else part


def network_folder(folder: Path) -> Path:
    """The folder of a pipeline's denoising network."""
    return folder / part_of(folder, family_of(folder).part)


# ---------------------------------------------------------------------- sizes


def vae_factors(vae: Config) -> tuple[int, int]:
    """Pixels a latent in time and in space, from a VAE's configuration."""
    name = vae["_class_name"]
    if name == "AutoencoderKLWan":
        return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    if name == "AutoencoderKLLTXVideo":
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        time, space = vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
        return time or vae["patch_size_t"] * halvings, space or vae["patch_size"] * halvings
    blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
    return 1, 2 ** (len(blocks) - 1)


def pixel_factors(folder: Path) -> tuple[int, int]:
    """Pixels a number of a sample in time and in space: of a latent, or 1 where there is no VAE."""
    if not family_of(folder).latent:
        return 1, 1
    return vae_factors(read_json(folder / "vae" / "config.json"))


def native_size(folder: Path) -> tuple[int, int] | None:
    """Height and width in pixels the pipeline was made for, if its folder tells."""
    try:
        family = family_of(folder)
        network = read_json(folder / part_of(folder, family.part) / "config.json")
        _, factor = pixel_factors(folder)
    except (FewstepError, KeyError):
        return None
    sample = network.get("sample_size") or family.latent_size
    if sample is None:
        defaults = _call_defaults(family)
        return (defaults["height"], defaults["width"]) if defaults.get("height") else None
    height, width = sample if isinstance(sample, list) else (sample, sample)
    return height * factor, width * factor


def read_configs(folder: Path, family: Family, size: tuple[int, int] | None = None) -> Configs:
    """The configurations of a pipeline's folder.

    Args:
        size: height and width of samples in pixels; by default what the pipeline was made for.
    """
    network = read_json(folder / part_of(folder, family.part) / "config.json")
    vae = read_json(folder / "vae" / "config.json") if family.latent else {}
    index = read_json(folder / "model_index.json")
    chosen = size or native_size(folder)
    if chosen is None:
        raise FewstepError(f"'{folder}' does not tell for which size it was made; give the size.")
    return Configs(index, network, vae, chosen, vae_factors(vae) if vae else (1, 1))


def sample_shape(configs: Configs, family: Family, frames: int | None = None) -> tuple[int, ...]:
    """Shape of a latent sample, ``(C, H, W)`` or ``(C, F, H, W)``.

    Args:
        frames: of a video, before encoding; by default as many as the pipeline makes.

    Raises:
        FewstepError: if VAE and network make no whole number of patches of it.
    """
    time, space = configs.factors
    height, width = configs.size
    patch = family.patch or configs.network.get("patch_size") or 1
    unit = space * (patch[-1] if isinstance(patch, list) else patch)
    if height % unit or width % unit:
        raise FewstepError(f"Sizes must be multiples of {unit} for this model, not {configs.size}.")
    channels, plane = family.latent_channels(configs.network), (height // space, width // space)
    made = _call_defaults(family).get("num_frames")
    if made is None:
        return (channels, *plane)
    frames = frames or int(made)
    if (frames - 1) % time:
        raise FewstepError(f"This VAE encodes 1 + {time} n frames, not {frames}.")
    return (channels, (frames - 1) // time + 1, *plane)


def _call_defaults(family: Family) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def weights_hash(folder: Path, parts: Iterable[str]) -> str:
    """A hash of all files of some parts of a pipeline."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*")):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{part}/{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()

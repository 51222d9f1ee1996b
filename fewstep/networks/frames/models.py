"""Networks of the transformers library that look at frames and captions: found, never fetched."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import FewstepError
from fewstep.networks.folders import find_folder, read_json
from fewstep.networks.parts import quiet


def find_model(source: str, option: str) -> Path:
    """The folder of a transformers model, given itself or by its name in the local cache.

    Args:
        option: what the error says to set.

    Raises:
        FewstepError: if there is none, or the transformers package is missing.
    """
    if importlib.util.find_spec("transformers") is None:
        raise FewstepError(
            f"'{source}' is read with transformers; install it: pip install "
            "'fewstep[transformers]'."
        )
    try:
        return find_folder(Path(source).expanduser() if source.startswith("~") else source)
    except FewstepError as error:
        raise FewstepError(
            f"There is no network at '{source}': neither a folder nor a name in the cache of the "
            f"Hugging Face hub. Get it with `hf download NAME --local-dir FOLDER` and set {option}:"
            " FOLDER."
        ) from error


def read_config(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """A model's configuration.

    Args:
        kinds: the ``model_type`` it may have.

    Raises:
        FewstepError: if it is missing, damaged or of another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise FewstepError(
            f"'{folder}' has no config.json: it is no folder of a transformers model, as "
            "`hf download NAME --local-dir FOLDER` makes it."
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in kinds:
        raise FewstepError(
            f"'{folder}' holds a model of type {config.get('model_type')!r}; needed is "
            f"{' or '.join(map(repr, kinds))}."
        )
    return config


def load_frozen(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of a transformers class, float32, frozen and in eval mode.

    Raises:
        FewstepError: if the folder is damaged, or lacks weights, which would stay random.
    """
    quiet()
    try:
        network, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the library raises many types, safetensors' own among them
        reason = str(error).strip().split("\n")[0]
        raise FewstepError(
            f"Cannot read '{folder}' as a {kind.__name__} ({reason}); download it again."
        ) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise FewstepError(
            f"'{folder}' lacks {len(missing)} weights of a {kind.__name__}, such as "
            f"'{missing[0]}'; give the folder of the right model."
        )
    return network.requires_grad_(False).eval()


def weights_sha256(folder: Path) -> str:
    """The hash of a model's weights, which tells one network from another."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

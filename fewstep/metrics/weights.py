"""Weights of the networks that metrics look through: local files, found and checked, never fetched.

Metrics are read for years, so what they look through is pinned: by a file's hash, which also goes
into every protocol.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.remembered import sha256_of


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights.

    Attributes:
        name: of the file in ``$TORCH_HOME/hub/checkpoints``.
        source: where to get it.
        sha256: the first digits of its hash, as far as they are known.
        option: which option of the metric takes another path.
    """

    name: str
    source: str
    sha256: str = ""
    option: str = "weights"

    def locate(self, given: str | None = None, sha256: str | None = None) -> Path:
        """The file at a given path, or the published one in the cache, with its hash checked.

        A file at a given path may be any; only ``sha256`` is asked of it.

        Raises:
            FewstepError: if it is missing, or is not the file that its hash names.
        """
        path = Path(given).expanduser() if given else self.cached
        if not path.is_file():
            known = f" (sha256 {self.sha256}...)" if self.sha256 else ""
            raise FewstepError(
                f"There are no weights at '{path}'. Get {self.name}{known} from {self.source} and "
                f"put it at '{self.cached}', or give its path as '{self.option}' of the features: "
                f"metrics: [{{class_path: ..., init_args: {{features: {{class_path: ..., "
                f"init_args: {{{self.option}: PATH}}}}}}}}]."
            )
        expected = sha256 or ("" if given else self.sha256)
        found = file_sha256(path)
        if not found.startswith(expected.lower()):
            raise FewstepError(
                f"The weights '{path}' are not the expected ones: their sha256 is {found}, not "
                f"{expected}. Get the file again from {self.source}."
            )
        return path

    @property
    def cached(self) -> Path:
        """Where PyTorch keeps the file."""
        return Path(torch.hub.get_dir(), "checkpoints", self.name)


def file_sha256(*paths: Path) -> str:
    """The hash of one file, or of several one after the other, in hexadecimal digits."""
    return sha256_of(*paths)


def read_state(path: Path) -> Mapping[str, Tensor]:
    """A state dict, read without running any code that the file may hold.

    Raises:
        FewstepError: if it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors alike
        raise FewstepError(
            f"The weights '{path}' cannot be read ({error}). The file may be cut short: get it "
            "again."
        ) from error


def fill(network: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads a whole state dict.

    Raises:
        FewstepError: if it belongs to another network.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise FewstepError(
            f"The weights '{path}' are of another network than {type(network).__name__}: "
            f"{' '.join(line.strip() for line in lines[:3])[:300]}"
        ) from error


def model_folder(model: str) -> Path:
    """The folder of a transformers model: a local one, or that of the Hugging Face cache.

    Args:
        model: a folder, or a name such as ``openai/clip-vit-large-patch14``.

    Raises:
        FewstepError: if it is in neither place, or transformers is missing.
    """
    if importlib.util.find_spec("transformers") is None:
        raise FewstepError(
            f"The model '{model}' needs transformers; install it: "
            "pip install 'fewstep[transformers]'."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FewstepError(
            f"The model '{model}' is no folder and not in the Hugging Face cache. Metrics fetch "
            f"nothing by themselves: run `hf download {model}` where there is internet, and copy "
            "the cache (HF_HOME) here or give the folder's path as 'model'."
        ) from error


def model_sha256(folder: Path) -> str:
    """The hash of a model folder's weights.

    Raises:
        FewstepError: if the folder has none.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return file_sha256(*files)
    raise FewstepError(
        f"The folder '{folder}' has no model.safetensors and no pytorch_model.bin: it is not a "
        "whole transformers model. Get it again, or name another folder as 'model'."
    )


def load_model(kind: Any, folder: Path) -> Any:
    """A transformers model of a class, from a folder alone, in float32.

    Raises:
        FewstepError: if the folder cannot be read, or lacks weights of the model, which
            transformers would make up.
    """
    try:
        network, info = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # OSError, safetensors' own, missing keys of a configuration
        raise FewstepError(
            f"The model in '{folder}' cannot be read as {kind.__name__} ({error}). Get it again, "
            "or name another folder as 'model'."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise FewstepError(
            f"The folder '{folder}' has no weights for {len(missing)} parts of {kind.__name__} "
            f"('{missing[0]}'): it holds another model. Name the right folder as 'model'."
        )
    return network

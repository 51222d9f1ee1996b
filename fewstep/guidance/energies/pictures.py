"""Networks that look at pictures: loaded from files, and shown pictures as they expect them.

The one place where pixels in [-1, 1] become what a network takes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.metrics.frames import Preparation
from fewstep.metrics.weights import fill, read_state
from fewstep.networks.frames.features import coloured
from fewstep.networks.frames.models import find_model, load_frozen

FILTERS = {"bilinear": 2, "bicubic": 3}
OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state", "sample")


def prepared(pixels: Tensor, preparation: Preparation) -> Tensor:
    """Pictures as a network takes them, float32 and with gradient to the pixels.

    Args:
        pixels: ``(N, 3, H, W)`` or grey ``(N, 1, H, W)`` in [-1, 1].
        preparation: resizes (antialiased), crops to the middle and normalises.

    Raises:
        FewstepError: if these are no pictures.
    """
    if pixels.ndim != 4:
        raise FewstepError(
            f"This energy looks at pictures (N, C, H, W), not at shape {tuple(pixels.shape)}. "
            "Put it into EachFrame for videos, and into Decoded for latents."
        )
    # Of floating-point pixels, the resized ones are not rounded to 8 bits.
    return preparation((coloured(pixels).float() + 1) * 127.5)


class PictureNetwork(nn.Module):
    """A frozen network of pictures ``(N, C, H, W)`` in [-1, 1], in evaluation mode.

    Args:
        network: takes normalised pictures.
        size: height and width of what it takes; None leaves pictures as large as they are.
        mean, std: of the colours it was trained with, for pixels in [0, 1]; 0.5 shows it [-1, 1].
        resample: filter of the resizing, which is antialiased.
        output: which of several outputs to take; by default the logits, the embeddings, or the
            first.
        preparation: instead of the options before: what a transformers model's folder says.
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        resample: str = "bicubic",
        output: str | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        super().__init__()
        if resample not in FILTERS:
            raise FewstepError(f"resample is {' or '.join(FILTERS)}, not '{resample}'.")
        self.network = network.requires_grad_(False).eval()
        self.output = output
        self.preparation = preparation or Preparation(
            None, size, FILTERS[resample], None, tuple(mean), tuple(std)
        )
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Its output ``(N, ...)``, float32."""
        given = prepared(pixels, self.preparation)
        with torch.autocast(given.device.type, enabled=False):
            return the_tensor(self.network(given), self.output).float()

    def extra_repr(self) -> str:
        """What tells it from another one with the same weights."""
        return f"output={self.output!r}, preparation={self.preparation}"

    def train(self, mode: bool = True) -> PictureNetwork:
        """Stays in evaluation mode."""
        return super().train(False)


class PretrainedClassifier(PictureNetwork):
    """An image classifier of the transformers library, for :class:`ClassLabel`.

    Args:
        model: its folder, or its name in the Hugging Face cache; nothing is downloaded.

    Raises:
        FewstepError: if it is missing, damaged or no classifier.
    """

    def __init__(self, model: str = "google/vit-base-patch16-224") -> None:
        folder = find_model(model, "model")
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 - slow, an extra

        network = load_frozen(AutoModelForImageClassification, folder)
        super().__init__(network, preparation=Preparation.read(folder))


def load_network(class_path: str, weights: str, **init_args: Any) -> nn.Module:
    """A frozen network of any class, with its weights.

    Args:
        class_path: such as ``my_code.BiSeNet`` or ``transformers.AutoModelForDepthEstimation``.
        weights: for classes with ``from_pretrained`` the model's folder or its name in the Hugging
            Face cache; else a file of weights, safetensors or torch's own. Nothing is downloaded,
            and no code in a file is run.
        init_args: of the class, for those without ``from_pretrained``.

    Raises:
        FewstepError: if there is no such class or file, or they do not belong together.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FewstepError(
            f"There is no class '{class_path}' ({error}). Give its whole path, such as "
            "my_code.MyNetwork, and start where my_code can be imported."
        ) from error
    if hasattr(kind, "from_pretrained"):
        return load_frozen(kind, find_model(weights, "weights"), **init_args)
    network = kind(**init_args)
    if not isinstance(network, nn.Module):
        raise FewstepError(f"'{class_path}' makes a {type(network).__name__}, which is no network.")
    return with_weights(network, weights)


def with_weights(network: nn.Module, weights: str) -> nn.Module:
    """A network with the weights of a file, frozen and in evaluation mode.

    Raises:
        FewstepError: if the file is missing or damaged, or of another network.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FewstepError(
            f"There are no weights at '{path}' for a {type(network).__name__}; nothing is "
            "downloaded. Give the path of a .safetensors or .pt file."
        )
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FewstepError(
                f"The weights '{path}' cannot be read ({error}). Get the file again."
            ) from error
    else:
        state = dict(read_state(path))
    if all(name.startswith("module.") for name in state):  # saved from within DataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    fill(network, state, path)
    return network.requires_grad_(False).eval()


def the_tensor(output: Any, name: str | None) -> Tensor:
    """The output of a network that is meant.

    Raises:
        FewstepError: if it has none of that name.
    """
    if name is not None:
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
    elif isinstance(output, (tuple, list)):
        found = output[0]
    else:
        named = (getattr(output, known, None) for known in OUTPUTS)
        found = output if isinstance(output, Tensor) else next(filter(_there, named), None)
    if not isinstance(found, Tensor):
        raise FewstepError(
            f"A network returned a {type(output).__name__} without a tensor '{name or 'logits'}'; "
            "set output to the name of what is to be compared."
        )
    return found


def _there(value: Any) -> bool:
    return isinstance(value, Tensor)

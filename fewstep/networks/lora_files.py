"""LoRA adapters as files that other programs read, and merged into the weights.

Two layouts. ``diffusers``: what ``pipeline.load_lora_weights(folder)`` reads (0.34 or newer, which
knows where alpha is kept). ``kohya``: the one of kohya-ss' trainers and of most user interfaces,
for the U-Nets of Stable Diffusion 1.x, 2.x and XL.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.diffusion.denoiser import Backbone, Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.families import FAMILIES
from fewstep.networks.lora import LoRADenoiser, adapter_layers
from fewstep.networks.lora_targets import LoRA, inner_network
from fewstep.spec import build, describe

Layout = Literal["diffusers", "kohya"]
FILE_NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for
ALPHA_KEY = "lora_adapter_metadata"  # where diffusers looks for a LoRA's options
KOHYA_PREFIX = "lora_unet_"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds.

    Attributes:
        path: of the file.
        layout: whose names its tensors have.
        tensors: ``A`` and ``B`` by name and ``lora_A`` or ``lora_B``, as in the file: with dots
            between the parts of a layer's name, or with underscores if it is kohya's.
        alpha: by layer, where the file says it.
    """

    path: Path
    layout: Layout
    tensors: dict[tuple[str, str], Tensor]
    alpha: dict[str, float]

    @property
    def ranks(self) -> set[int]:
        """The ranks of its layers; one, unless another program made it."""
        return {len(tensor) for (_, kind), tensor in self.tensors.items() if kind == "lora_A"}


def save_adapter(denoiser: LoRADenoiser, where: str | Path, layout: Layout = "diffusers") -> Path:
    """Writes a student's or an average's adapter in float32.

    Args:
        denoiser: whose adapter.
        where: a ``.safetensors`` file, or a folder, which gets one.
        layout: see the module; every rank has the adapter whole, so let one of them write it.

    Returns:
        The file.

    Raises:
        FewstepError: for kohya's layout where it has no names for the network's layers.
    """
    path = Path(where)
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "kohya":
        tensors, metadata = _kohya(denoiser), {"format": "pt"}
    else:
        tensors, metadata = _diffusers(denoiser)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)
    return path


def _weights(denoiser: LoRADenoiser) -> dict[tuple[str, str], Tensor]:
    """``A`` and ``B`` of all layers, by name and ``lora_A`` or ``lora_B``."""
    return {
        (name, kind): getattr(layer, kind).weight
        for name, layer in adapter_layers(denoiser.adapter).items()
        for kind in ("lora_A", "lora_B")
    }


def _diffusers(denoiser: LoRADenoiser) -> tuple[dict[str, Tensor], dict[str, str]]:
    part = pipeline_part(denoiser.backbone)
    tensors = {
        f"{part}.{name}.{kind}.weight": _plain(tensor)
        for (name, kind), tensor in _weights(denoiser).items()
    }
    # No more than what sets the output, so that any version of peft takes it.
    options = {
        f"{part}.r": denoiser.lora.rank,
        f"{part}.lora_alpha": denoiser.lora.alpha,
        f"{part}.target_modules": denoiser.adapter_names,
    }
    return tensors, {"format": "pt", ALPHA_KEY: json.dumps(options, sort_keys=True)}


def _kohya(denoiser: LoRADenoiser) -> dict[str, Tensor]:
    network = inner_network(denoiser.backbone)
    if not isinstance(network, UNet2DConditionModel):
        raise FewstepError(
            f"kohya's layout has no names for the layers of {type(network).__name__}, only for the "
            "U-Nets of Stable Diffusion 1.x, 2.x and XL; write the diffusers layout."
        )
    tensors = {}
    for (name, kind), tensor in _weights(denoiser).items():
        key = _kohya_name(name)
        direction = "lora_down" if kind == "lora_A" else "lora_up"
        tensors[f"{key}.{direction}.weight"] = _plain(tensor)
        tensors[f"{key}.alpha"] = torch.tensor(float(denoiser.lora.alpha or denoiser.lora.rank))
    return tensors


def _kohya_name(name: str) -> str:
    return KOHYA_PREFIX + name.replace(".", "_")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def pipeline_part(backbone: Backbone) -> str:
    """The name diffusers' pipelines have for the network: ``unet`` or ``transformer``."""
    families = FAMILIES.values()
    return next((f.part for f in families if isinstance(backbone, f.backbone)), "transformer")


# ---------------------------------------------------------------------- reading


def read_adapter(where: str | Path) -> AdapterFile:
    """Reads an adapter's file in either layout.

    Args:
        where: the file, or a folder with a ``pytorch_lora_weights.safetensors``.

    Raises:
        FewstepError: if it is missing, damaged or no LoRA's.
    """
    path = Path(where)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            options = json.loads((file.metadata() or {}).get(ALPHA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise FewstepError(
            f"Cannot read the adapter file '{path}': it is missing, truncated or no safetensors "
            f"file ({error})."
        ) from error
    kohya = any(".lora_down." in key for key in tensors)
    found = _from_kohya(path, tensors) if kohya else _from_diffusers(path, tensors, options)
    if not found.tensors or len(found.ranks) == 0:
        some = ", ".join(sorted(tensors)[:3])
        raise FewstepError(
            f"'{path}' holds no LoRA that is known here; it has {some or 'nothing'}."
        )
    return found


def _from_diffusers(path: Path, tensors: dict[str, Tensor], options: dict[str, Any]) -> AdapterFile:
    weights: dict[tuple[str, str], Tensor] = {}
    for key, tensor in tensors.items():
        for kind in ("lora_A", "lora_B"):
            if key.endswith(f".{kind}.weight"):
                name = key.removesuffix(f".{kind}.weight")
                weights[_without_part(name), kind] = tensor
    alpha = next((v for k, v in options.items() if k.split(".")[-1] == "lora_alpha"), None)
    return AdapterFile(
        path, "diffusers", weights, {} if alpha is None else {n: float(alpha) for n, _ in weights}
    )


def _without_part(name: str) -> str:
    for part in ("unet.", "transformer."):
        if name.startswith(part):
            return name.removeprefix(part)
    return name


def _from_kohya(path: Path, tensors: dict[str, Tensor]) -> AdapterFile:
    weights, alpha = {}, {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        kind = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}.get(rest)
        if kind is not None:
            weights[name, kind] = tensor
        elif rest == "alpha":
            alpha[name] = float(tensor)
    return AdapterFile(path, "kohya", weights, alpha)


def load_adapter(denoiser: LoRADenoiser, where: str | Path) -> None:
    """Fills a student's or an average's adapter from a file in either layout.

    Raises:
        FewstepError: if the file is unreadable, or of another network, rank, alpha or targets.
    """
    file = read_adapter(where)
    named = (lambda name: name) if file.layout == "diffusers" else _kohya_name
    expected = {(named(n), kind): w for (n, kind), w in _weights(denoiser).items()}
    _check_names(file, {name for name, _ in expected}, denoiser)
    _check_rank_and_alpha(file, denoiser.lora)
    for key, weight in expected.items():
        if key not in file.tensors or file.tensors[key].shape != weight.shape:
            given = list(file.tensors[key].shape) if key in file.tensors else "missing"
            raise FewstepError(
                f"The adapter file '{file.path}' is for another architecture: {key[1]} of "
                f"'{key[0]}' is {given} in it and {list(weight.shape)} here."
            )
    with torch.no_grad():
        for key, weight in expected.items():
            weight.copy_(file.tensors[key])


def _check_names(file: AdapterFile, here: set[str], denoiser: LoRADenoiser) -> None:
    there = {name for name, _ in file.tensors}
    unknown, missing = sorted(there - here), sorted(here - there)
    problems = [f"it adapts {_some(unknown)}, which are not adapted here"] if unknown else []
    problems += [f"it lacks {_some(missing)}"] if missing else []
    if problems:
        raise FewstepError(
            f"The adapter file '{file.path}' is for another architecture or other target_modules "
            f"than this LoRA on {type(denoiser.backbone).__name__}: {' and '.join(problems)}."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _check_rank_and_alpha(file: AdapterFile, lora: LoRA) -> None:
    if file.ranks != {lora.rank}:
        ranks = ", ".join(map(str, sorted(file.ranks)))
        raise FewstepError(
            f"The adapter file '{file.path}' has rank {ranks} and this LoRA {lora.rank}; set "
            f"lora.rank: {ranks}."
        )
    # A file that does not say is read by everyone as of a scale of 1.
    names = {name for name, _ in file.tensors}
    wrong = {file.alpha.get(name, float(lora.rank)) for name in names} - {lora.scale * lora.rank}
    if wrong:
        alpha = ", ".join(f"{value:g}" for value in sorted(wrong))
        raise FewstepError(
            f"The adapter file '{file.path}' has alpha {alpha} and this LoRA "
            f"{lora.scale * lora.rank:g}; set lora.alpha: {alpha}."
        )


# ---------------------------------------------------------------------- merging


@torch.no_grad()
def merge(denoiser: LoRADenoiser) -> Backbone:
    """A new network on the CPU with the adapter fused into float32 weights, and no trace of peft.

    Frozen and in eval mode. A collective where the base is sharded: call it on all ranks.
    """
    merged: Backbone = build(describe(denoiser.backbone), Backbone)
    state = {
        name.replace(".base_layer.", "."): _whole(tensor)
        for name, tensor in denoiser.backbone.state_dict().items()
    }
    merged.load_state_dict(state)
    network, adapted = inner_network(merged), inner_network(denoiser.backbone)
    for name in denoiser.adapter_names:
        layer: Any = adapted.get_submodule(name)
        delta: Tensor = layer.get_delta_weight(denoiser.name)
        network.get_submodule(name).get_parameter("weight").add_(delta.float().cpu())
    return merged.requires_grad_(False).eval()


def merged_denoiser(denoiser: LoRADenoiser) -> Denoiser:
    """A denoiser like any other, on a merged network of its own: to sample from or to learn from.

    What :func:`merge` says holds here too.
    """
    return Denoiser(
        merge(denoiser), denoiser.schedule, denoiser.prediction_type, denoiser.alpha_floor
    ).eval()


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.float().cpu() if whole.is_floating_point() else whole.cpu()

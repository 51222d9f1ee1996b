"""Gates in files beside a network: ``rdm_gates.safetensors`` and their options as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.errors import FewstepError
from fewstep.networks.gates.apply import install, remove_gates
from fewstep.networks.gates.gated import gate_spec, gates_of, network_of
from fewstep.networks.gates.spec import ResidualGates

WEIGHTS = "rdm_gates.safetensors"
OPTIONS = "rdm_gates.json"


def save_gates(model: nn.Module, folder: str | Path) -> Path:
    """Writes a network's gates and their options.

    Args:
        model: a denoiser, a backbone or a network; of a sharded one every rank takes part, and of
            several ranks the first one writes.
        folder: gets both files, such as the network's own folder in a pipeline. The options come
            last, so that there are gates only when they are whole.

    Returns:
        The file of the gates; it is there once the first rank has returned.

    Raises:
        FewstepError: if it has none.
    """
    spec, folder = gate_spec(model), Path(folder)
    tensors = gate_tensors(model)
    if dist.is_initialized() and dist.get_rank() > 0:
        return folder / WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    weights, options = (folder / f"{name}.partial" for name in (WEIGHTS, OPTIONS))
    save_file(tensors, weights, {"format": "pt"})
    options.write_text(json.dumps(spec.config, indent=2) + "\n", encoding="utf-8")
    weights.replace(folder / WEIGHTS)
    options.replace(folder / OPTIONS)
    return folder / WEIGHTS


def load_gates(model: nn.Module, folder: str | Path) -> ResidualGates:
    """Puts gates from files on a network, which then computes what it did when they were saved.

    Returns:
        Their options.

    Raises:
        FewstepError: if the files are missing, damaged or of another network, or if it has gates.
    """
    folder = Path(folder)
    spec, tensors = read_gates(folder)
    install(model, spec)
    here = _named(model)
    problems = [f"it has no '{name}'" for name in sorted(here.keys() - tensors.keys())]
    problems += [f"'{name}' is not here" for name in sorted(tensors.keys() - here.keys())]
    problems += [
        f"'{name}' is {list(tensors[name].shape)} and here {list(parameter.shape)}"
        for name, parameter in here.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if problems:
        remove_gates(model)
        raise FewstepError(
            f"'{folder / WEIGHTS}' is of another network than this "
            f"{type(network_of(model)).__name__}: {problems[0]}."
        )
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(tensors[name])
    return spec


def has_gates(folder: Path) -> bool:
    """Whether there are gates beside the network in a folder."""
    return (folder / OPTIONS).is_file()


def read_gates(folder: Path) -> tuple[ResidualGates, dict[str, Tensor]]:
    """The options of a folder's gates, and their parameters by name.

    Raises:
        FewstepError: if the files are missing or damaged.
    """
    try:
        options: Any = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        return ResidualGates(**options), tensors
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FewstepError(
            f"Cannot read gates from '{folder}': it needs {OPTIONS} and {WEIGHTS}, as "
            f"`fewstep gates apply` writes them ({error})."
        ) from error


def gate_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The values of a network's gates by name, whole and on the CPU."""
    return {name: _whole(parameter) for name, parameter in _named(model).items()}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates' parameters by their names in the network."""
    return {
        f"{gate_name}.{name}": parameter
        for gate_name, gate in gates_of(network_of(model))
        for name, parameter in gate.named_parameters()
    }


def _whole(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu().contiguous()

"""Writing an exported student's folder: whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks import DiT
from fewstep.networks.families import DiffusersBackbone, Family
from fewstep.networks.families.base import plain_config
from fewstep.networks.folders import family_of, part_of, read_json
from fewstep.networks.gates import can_merge, is_gated, merge_gates, save_gates
from fewstep.networks.gates.apply import remove_gates
from fewstep.networks.parts import WHOLE
from scripts.export.calls import FILE_NAME

NOT_COMPARED = ("time_cond_proj_dim",)
"""What a student may have that its base has not: an input for the guidance scale."""


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes its place when it is complete.

    Raises:
        FewstepError: if there is something in that place already, unless it is an earlier export
            and may be overwritten.
    """
    folder = folder.resolve()
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not overwrite:
        raise FewstepError(f"'{folder}' is not empty; give another --dest, or add --overwrite.")
    if occupied and not (folder / FILE_NAME).is_file():
        raise FewstepError(
            f"'{folder}' is no earlier export (it has no {FILE_NAME}), so --overwrite will not "
            "delete it; give another --dest."
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def plain_network(denoiser: Denoiser) -> Any:
    """The diffusers network inside a student.

    Raises:
        FewstepError: if there is none.
    """
    backbone = denoiser.backbone
    if isinstance(backbone, DiT):
        return backbone.transformer
    if isinstance(backbone, DiffusersBackbone):
        return backbone.network
    raise FewstepError(
        f"A {type(backbone).__name__} is no network of diffusers', so it cannot be exported."
    )


def check_base(base: Path, denoiser: Denoiser) -> Family:
    """Checks that a base pipeline is of the student's architecture.

    Returns:
        its family.

    Raises:
        FewstepError: naming the difference.
    """
    family = family_of(base)
    if type(denoiser.backbone) is not family.backbone:
        raise FewstepError(
            f"'{base}' is a {family.pipeline}, whose network is a "
            f"{family.backbone.network_class.__name__}; the student's backbone is "
            f"{type(denoiser.backbone).__name__}. Give the pipeline it was distilled from: "
            "--pipeline FOLDER."
        )
    there = read_json(base / part_of(base, family.part) / "config.json")
    here = plain_config(plain_network(denoiser))
    if there.get("_class_name") == type(plain_network(denoiser)).__name__:
        names = [n for n in here if n in there and n not in NOT_COMPARED and here[n] != there[n]]
        if names:
            listed = ", ".join(f"{n} {there[n]} there, {here[n]} here" for n in names[:3])
            raise FewstepError(
                f"The network of '{base}' differs from the student's ({listed}). Give the pipeline "
                "it was distilled from: --pipeline FOLDER."
            )
    return family


def write_network(network: Any, folder: Path, half: bool) -> bool:
    """Writes a network's configuration and weights as safetensors, in float32 or float16.

    Residual gates are merged into the weights. Those that are no change of a weight go into files
    of their own beside them, which diffusers does not read.

    Returns:
        Whether there are such files.

    Raises:
        FewstepError: if weights do not fit float16.
    """
    beside = is_gated(network) and not can_merge(network)
    if beside:
        save_gates(network, folder)
        remove_gates(network)
    elif is_gated(network):
        merge_gates(network)
    network = network.to(torch.float16 if half else torch.float32)
    for name, weight in network.named_parameters() if half else []:
        if not weight.isfinite().all():
            raise FewstepError(
                f"The weights '{name}' leave float16's range; export without --half."
            )
    network.save_pretrained(folder, safe_serialization=True)
    return beside


def write_pipeline(
    folder: Path, base: Path, family: Family, denoiser: Denoiser, scheduler: Any, half: bool
) -> bool:
    """Writes a pipeline: the student's network and scheduler, and the base's other parts.

    Those are hard links where the file system allows it, otherwise copies.

    Returns:
        Whether gates lie beside the network, see :func:`write_network`.

    Raises:
        FewstepError: if the base lacks a part.
    """
    network = plain_network(denoiser)
    index = read_json(base / "model_index.json")
    for part, kind in index.items():
        replaced = part in (family.part, "scheduler")
        if replaced or not isinstance(kind, list) or kind[0] is None:
            continue
        if not (base / part).is_dir():
            raise FewstepError(f"The base pipeline '{base}' has no '{part}'; {WHOLE}.")
        shutil.copytree(base / part, folder / part, copy_function=_link)
    index[family.part] = ["diffusers", type(network).__name__]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    scheduler.save_pretrained(folder / "scheduler")
    return write_network(network, folder / family.part, half)


def _link(source: str, target: str) -> None:
    """A hard link to a file itself (the hub's cache has symbolic ones), or a copy."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)

"""Gates beside the network of a pipeline's folder, and merged into a new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of, network_folder, read_json
from fewstep.networks.gates import (
    GateTable,
    ResidualGates,
    apply_gates,
    has_gates,
    is_gated,
    load_gates,
    merge_gates,
    save_gates,
)
from fewstep.networks.loading import find_checkpoint
from fewstep.networks.pipelines import load_network
from scripts.export.folder import new_folder, write_network


def apply(pipeline: Path, spec: ResidualGates, overwrite: bool = False) -> GateTable:
    """Puts gates beside a pipeline's network.

    Returns:
        The gates, to be printed.

    Raises:
        FewstepError: if it is no pipeline's folder, has gates that may not be replaced, nothing in
            it can be gated so, or the gates would change what its trained network computes.
    """
    part = network_folder(pipeline)
    if spec.init != "identity":
        raise FewstepError(
            f"--init {spec.init} would change what its trained network computes: alpha would start "
            f"elsewhere than at 1 and spoil what '{part}' has learnt. Leave it "
            "out. Such a start belongs in `gates:` of an experiment that trains from scratch."
        )
    if has_gates(part) and not overwrite:
        raise FewstepError(f"'{part}' has gates already; add --overwrite to replace them.")
    network = load_network(pipeline, family_of(pipeline))
    table = apply_gates(network, spec)
    if not is_gated(network):
        raise FewstepError("These options make no gates; choose another --mode, or add --skip.")
    save_gates(network, part)
    return table


def merge(pipeline: Path, dest: Path) -> int:
    """Writes a pipeline with the gates merged into its weights.

    Parts other than the network are copied.

    Returns:
        How many gates were merged.

    Raises:
        FewstepError: if there are none, some cannot be merged, or the folder is taken or lies
            within the pipeline's.
    """
    _check_no_run(pipeline)
    network = load_network(pipeline, family_of(pipeline))
    load_gates(network, network_folder(pipeline))
    merged = merge_gates(network)
    with new_pipeline(pipeline, dest, network) as folder:
        write_network(network, folder, half=False)
    return len(merged)


@contextmanager
def new_pipeline(pipeline: Path, dest: Path, network: nn.Module) -> Iterator[Path]:
    """A copy of a pipeline's folder, but for the network, whose place is to be filled.

    Yields:
        where the network goes.

    Raises:
        FewstepError: if the folder is taken or lies within the pipeline's.
    """
    if dest.resolve().is_relative_to(pipeline.resolve()):
        raise FewstepError(
            f"'{dest}' lies within '{pipeline}', and would be copied into itself; give another "
            "--dest."
        )
    own = family_of(pipeline).part
    with new_folder(dest, overwrite=False) as folder:
        for path in pipeline.iterdir():
            if path.is_dir() and path.name != own:
                shutil.copytree(path, folder / path.name)
            elif path.is_file():
                shutil.copy2(path, folder / path.name)
        index = read_json(pipeline / "model_index.json")
        index[own] = ["diffusers", type(network).__name__]
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model_index.json").write_text(text, encoding="utf-8")
        yield folder / own


def _check_no_run(source: Path) -> None:
    """Refuses what fewstep has trained, whose gates another command merges."""
    if (source / "model_index.json").is_file():
        return
    try:
        find_checkpoint(source)
    except FewstepError:
        return
    raise FewstepError(
        f"'{source}' is no pipeline's folder but what fewstep has trained; `fewstep export "
        f"{source} --dest FOLDER` merges its gates into the weights that it writes, where it can."
    )

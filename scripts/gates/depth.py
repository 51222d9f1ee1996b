"""Networks of another depth: ``fewstep gates grow`` and ``fewstep gates prune``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.families import DiffusersBackbone
from fewstep.networks.folders import family_of, network_folder
from fewstep.networks.gates import grow, is_gated, load_gates, prune, save_gates
from fewstep.networks.gates.apply import remove_gates
from fewstep.networks.gates.gated import network_of
from fewstep.networks.gates.surgery import NewBlocks
from fewstep.networks.loading import (
    METADATA_KEY,
    find_checkpoint,
    load_denoiser,
    read_checkpoint,
)
from fewstep.networks.pipelines import load_denoiser_of, load_network
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder
from fewstep.seeding import torch_generator
from lightning_modules.chains import PLAIN_ODE, Chain, Record, chain_of, default_steps
from scripts.export.folder import write_network
from scripts.gates.folders import new_pipeline

Result = TypeVar("Result")


def grow_depth(source: str, dest: Path, new_blocks: NewBlocks = "half") -> int:
    """Doubles the depth of a gated network, and writes what becomes of it.

    Args:
        source: a pipeline's folder with gates, a checkpoint, or a run's or an experiment's folder.
        dest: a new folder, if the source is a pipeline's; otherwise a new checkpoint.
        new_blocks: see :func:`fewstep.networks.gates.grow`.

    Returns:
        The new number of blocks.

    Raises:
        FewstepError: if it has no gates, or its depth cannot be changed.
    """
    folder = Path(source)
    if not is_pipeline(folder):
        return _of_checkpoint(source, dest, lambda denoiser, _: grow(denoiser, new_blocks))
    network = load_network(folder, family_of(folder))
    load_gates(network, network_folder(folder))
    depth = grow(network, new_blocks)
    _write_pipeline(network, folder, dest)
    return depth


def prune_depth(
    source: str,
    dest: Path,
    blocks: int,
    samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[int]:
    """Takes away the blocks that add least to their stream, and writes what is left.

    What they add is measured on samples of the network's own, with noise of random times.

    Args:
        source, dest: as of :func:`grow_depth`; gates are not needed.
        blocks: how many go.
        samples: how many are measured.
        steps: sampling steps they are made with, as the network's own method samples; by default
            20 of a network that was not trained for few, else the most that it serves best.
        seed: of all that is random.
        device: where they are made.

    Returns:
        The numbers that the removed blocks had.

    Raises:
        FewstepError: if its depth cannot be changed, or it needs prompts to sample.
    """

    def change(denoiser: Denoiser, record: Record) -> list[int]:
        record = record if "method" in record else PLAIN_ODE
        plain = record["method"] == PLAIN_ODE["method"]
        count = steps or (20 if plain else default_steps(record)[-1])
        chain = chain_of(record, denoiser.schedule, count)
        denoiser.to(device)
        removed = prune(
            denoiser, blocks, lambda: run_on_own_samples(denoiser, chain, samples, seed)
        )
        denoiser.to("cpu")
        return removed

    folder = Path(source)
    if not is_pipeline(folder):
        return _of_checkpoint(source, dest, change)
    if family_of(folder).encode is not None:
        raise _needs_prompts(source)
    denoiser = load_denoiser_of(folder).denoiser
    removed = change(denoiser, PLAIN_ODE)
    _write_pipeline(network_of(denoiser), folder, dest)
    return removed


def is_pipeline(folder: Path) -> bool:
    """Whether this is a pipeline's folder."""
    return (folder / "model_index.json").is_file()


@torch.no_grad()
def run_on_own_samples(denoiser: Denoiser, chain: Chain, count: int, seed: int) -> None:
    """One forward pass on samples of the network's own, with noise of random times.

    Args:
        denoiser: class-conditional, of all classes alike, or unconditional.
        chain: that they are sampled along, four at a time.
        count: of the samples.
        seed: of noise, times and classes.

    Raises:
        FewstepError: if it needs prompts.
    """
    backbone, schedule = denoiser.backbone, denoiser.schedule
    classes = getattr(backbone, "num_classes", None)
    if classes is None and isinstance(backbone, DiffusersBackbone):
        raise _needs_prompts(type(backbone).__name__)
    numbers = torch_generator(seed, "prune")
    device = next(denoiser.parameters()).device
    cond = {}
    if classes is not None:
        cond["class_labels"] = torch.randint(classes, (count,), generator=numbers).to(device)
    first, noise = torch.randn(2, count, *denoiser.sample_shape, generator=numbers).to(device)
    t = schedule.sample_times((count,), numbers).to(device)
    made = []
    for low in range(0, count, 4):
        some = {name: value[low : low + 4] for name, value in cond.items()}
        draws = [torch_generator(seed, "prune", n) for n in range(low, min(low + 4, count))]
        made.append(chain.sample(denoiser, first[low : low + 4], some, draws))
    x0 = torch.cat(made)
    denoiser.raw(schedule.add_noise(x0, noise, t), t, cond)


def _needs_prompts(source: str) -> FewstepError:
    return FewstepError(
        f"'{source}' needs prompts to sample, and `fewstep gates prune` has none. Use "
        "fewstep.networks.gates.prune with a forward pass of your own."
    )


def _of_checkpoint(source: str, dest: Path, change: Callable[[Denoiser, Record], Result]) -> Result:
    """Changes the denoiser of a checkpoint, and writes a checkpoint of it alone."""
    if dest.exists():
        raise FewstepError(f"'{dest}' is there already; give another --dest.")
    denoiser, path = load_denoiser(source).denoiser, find_checkpoint(source)
    old = read_remainder(path) if is_sharded_checkpoint(path) else read_checkpoint(path)
    result = change(denoiser, old[METADATA_KEY])
    state = {f"ema.{name}": value for name, value in denoiser.state_dict().items()}
    metadata = {**old[METADATA_KEY], "denoiser": denoiser.to_spec()}
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.with_name(f"{dest.name}.partial")
    torch.save({METADATA_KEY: metadata, "state_dict": state}, partial)
    partial.replace(dest)
    return result


def _write_pipeline(network: nn.Module, source: Path, dest: Path) -> None:
    """Writes a pipeline with another network, and the gates that it has beside it."""
    with new_pipeline(source, dest, network) as part:
        if is_gated(network):
            save_gates(network, part)
            remove_gates(network)
        write_network(network, part, half=False)

"""What residual gates cost: gated training steps and passes against ungated ones, in one run.

All sides are the same DiT with the same weights on the same batch; blocks of steps alternate, and
the median block of each is compared. Merged gates are of the branches; their network is an ordinary
one again, so its ratio says how far the machine's noise goes.

    python -m scripts.benchmark_gates --device cuda --width 768 --layers 12 --batch 64
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.contracts import Batch
from fewstep.networks import DiT
from fewstep.networks.gates import ResidualGates, apply_gates, gate_parameters, merge_gates
from scripts.benchmark_step import Step, measure

UNGATED, MERGED = "ungated", "merged"
GATES = {
    "branches": ResidualGates(mode="alpha_beta"),
    "blocks": ResidualGates(mode="full", level="block"),
}


def contestants(options: argparse.Namespace) -> dict[str, DiT]:
    """The network without gates, with each kind of them, and with merged ones."""
    heads = max(options.width // 64, 1)
    plain = DiT(options.size, 4, 2, options.layers, heads, options.width // heads)
    found = {UNGATED: plain}
    for name, spec in GATES.items():
        found[name] = copy.deepcopy(plain)
        apply_gates(found[name], spec)
    found[MERGED] = copy.deepcopy(found["branches"])
    with torch.no_grad():
        for parameter in gate_parameters(found[MERGED]):
            parameter.add_(0.01)
    merge_gates(found[MERGED])
    for network in found.values():
        network.to(options.device)
        for block in network.feature_blocks if options.compile else ():
            network.get_submodule(block).compile()
    return found


def evaluated(network: nn.Module, batch: Batch, low: torch.dtype | None) -> Tensor:
    """The network's output, under autocast to ``low`` if that is given."""
    sample = batch["sample"]
    t = torch.full((len(sample),), 500.0, device=sample.device)
    with torch.autocast(sample.device.type, low, enabled=low is not None):
        output: Tensor = network(sample, t, **batch["cond"])
    return output.float()


def training_step(network: nn.Module, low: torch.dtype | None) -> Step:
    """Forward, backward, clipping and AdamW."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(batch: Batch, update: int) -> None:
        (evaluated(network, batch, low) - 1).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sampling_step(network: nn.Module, low: torch.dtype | None) -> Step:
    """One evaluation without gradients."""

    @torch.no_grad()
    def step(batch: Batch, update: int) -> None:
        evaluated(network, batch, low)

    return step


def table(title: str, seconds: Mapping[str, float]) -> str:
    """Milliseconds of each, and their ratio to those without gates."""
    lines = [
        f"  {name:10s} {1000 * found:9.2f} ms   {found / seconds[UNGATED]:.3f}"
        for name, found in seconds.items()
    ]
    return "\n".join([f"{title}, and its ratio to {UNGATED}", *lines])


def main(arguments: list[str] | None = None) -> None:
    """Prints times and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=16, help="height and width of a latent")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--length", type=int, default=3, help="steps a block")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    options = parser.parse_args(arguments)
    networks = contestants(options)
    shape = (options.batch, 4, options.size, options.size)
    batch: Batch = {
        "sample": torch.randn(shape, device=options.device),
        "cond": {"class_labels": torch.arange(options.batch, device=options.device) % 10},
        "key": [],
    }
    low = torch.bfloat16 if options.bf16 else None
    count = sum(p.numel() for p in networks[UNGATED].parameters())
    gates = sum(p.numel() for p in gate_parameters(networks["branches"]))
    print(
        f"{count / 1e6:.1f} M parameters, {gates:,} of gates on branches, batch {options.batch}, "
        f"{options.device}"
    )
    for title, make in (("a training step", training_step), ("an evaluation", sampling_step)):
        steps = {name: make(network, low) for name, network in networks.items()}
        print(table(title, measure(steps, batch, options.blocks, options.length)))


if __name__ == "__main__":
    main()

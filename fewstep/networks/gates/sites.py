"""Where a network's gates go: the units that its options choose, and its long skips."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from fewstep.errors import FewstepError
from fewstep.networks.gates.blocks import (
    Side,
    Stream,
    class_name,
    keeps_its_stream,
    kind_of,
    position_of,
)
from fewstep.networks.gates.spec import ResidualGates

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SKIPS = "res_hidden_states_tuple"
FUSE = "skip_linear"
GATE, TEXT_GATE, SKIP_GATE = "rdm_gate", "rdm_gate_text", "rdm_skip"
GATE_NAMES = (GATE, TEXT_GATE, SKIP_GATE)


@dataclass(frozen=True)
class Site:
    """A residual unit that is gated.

    Attributes:
        name: of the layer or block with the gate.
        block: of the block it belongs to; the layer itself if it is in none that is known.
        kind: the block's class.
        channels: of what is gated.
        channel_dim: where they are in it: -1 of tokens, 1 of maps.
        side: whose tokens it adds to.
        stream: of a gate around a block, the stream.
    """

    name: str
    block: str
    kind: str
    channels: int
    channel_dim: int
    side: Side = "sample"
    stream: Stream | None = None

    @property
    def gate(self) -> str:
        """What the gate is called in the layer or block that has it."""
        return TEXT_GATE if self.stream is not None and self.side == "text" else GATE


@dataclass(frozen=True)
class SkipSite:
    """Long skips that are gated.

    Attributes:
        name: of the up block that takes them, or of a U-ViT's fuse map.
        kind: its class.
        count: how many it takes; None for a fuse map, which takes one.
        channels: of no account, as a gate has one number a skip.
        gate: what the gate is called in it.
    """

    name: str
    kind: str
    count: int | None
    channels: None = None
    gate: str = SKIP_GATE


def find_sites(network: nn.Module, spec: ResidualGates) -> list[Site]:
    """The units to gate, in the network's order.

    Raises:
        FewstepError: if there are none, some blocks are not known, a pattern is in no name, or a
            gate would never be called.
    """
    known = list(branch_sites(network) if spec.level == "branch" else block_sites(network))
    chosen = known
    if spec.include is not None:
        chosen = _included(network, spec, known)
    elif known:
        _check_known(network, spec)
    for pattern in spec.exclude or ():
        if not any(_names(network, pattern, site) for site in chosen):
            raise FewstepError(
                f"gates.exclude: '{pattern}' is in the name of no unit that would be gated, and no "
                f"class of their blocks. {_some(chosen)}"
            )
    left = [s for s in chosen if not any(_names(network, p, s) for p in spec.exclude or ())]
    if not left:
        raise FewstepError(
            f"No residual unit of {type(network).__name__} is left to gate at the level "
            f"'{spec.level}'. {_some(known)} Change gates.include or gates.exclude, or let its "
            "blocks say `residual_branches` and `residual_stream`."
        )
    if spec.level == "branch":
        _check_called(network, left)
    return left


def _names(network: nn.Module, pattern: str, site: Site) -> bool:
    """Whether a pattern is in a unit's name, or is its block's class or a base of that."""
    if re.search(pattern, site.name):
        return True
    classes = itertools.takewhile(
        lambda cls: cls is not nn.Module, type(network.get_submodule(site.block)).__mro__
    )
    return any(re.fullmatch(pattern, cls.__name__) for cls in classes)


def _unknown_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Blocks with layers, by their class's name, of which no branch is known."""
    modules = dict(network.named_modules())
    known = [name for name, module in modules.items() if kind_of(module) is not None]
    return {
        name: module
        for name, module in modules.items()
        if "Block" in type(module).__name__
        and any(isinstance(layer, LAYERS) for layer in module.modules())
        # Neither in a block that is known nor around one, as a U-Net's large ones are.
        and not any(_is_within(name, k) or _is_within(k, name) for k in known)
    }


def _is_within(name: str, outer: str) -> bool:
    """Whether a module is another one or within it; all are within the network itself, ''."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def _check_known(network: nn.Module, spec: ResidualGates) -> None:
    """Refuses networks of which some blocks would get gates and others, unknown, would not."""
    unknown = Counter(type(block).__name__ for block in _unknown_blocks(network).values())
    if not unknown:
        return
    told = ", ".join(f"{count} {kind}" for kind, count in unknown.items())
    way = (
        "Name the last layers of their branches by gates.include, beside '.', which stands for all "
        "that are known"
        if spec.level == "branch"
        else "Let their class say `residual_branches` and `residual_stream`"
    )
    raise FewstepError(
        f"{type(network).__name__} has blocks whose residual branches are not known ({told}); they "
        f"would have no gates beside others that do. {way}; or gate only those that are known: "
        "gates.include: ['.']."
    )


def _check_all_named(network: nn.Module, spec: ResidualGates, wanted: list[Site]) -> None:
    """Refuses patterns that name known units and, without effect, layers of unknown blocks."""
    chosen = {site.name for site in wanted}
    for name, block in _unknown_blocks(network).items():
        for inner, layer in block.named_modules(prefix=name):
            missed = isinstance(layer, LAYERS) and inner not in chosen
            for pattern in spec.include or () if missed else ():
                if pattern != "." and re.search(pattern, inner):
                    raise FewstepError(
                        f"gates.include: '{pattern}' names units that are known, and those alone "
                        f"get gates; but also '{inner}', of a {type(block).__name__} that is not "
                        "known. Name such layers by a pattern that no known unit has."
                    )


def _check_called(network: nn.Module, sites: list[Site]) -> None:
    """Refuses layers whose weights are read without calling them, so that no hook of theirs runs.

    Their gates would have no effect, until they were merged into the weights.
    """
    for site in sites:
        parent = network.get_submodule(site.name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise FewstepError(
                f"A gate on '{site.name}' would have no effect: torch's MultiheadAttention reads "
                "the weights of this layer without calling it. Leave it out with gates.exclude, or "
                "gate whole blocks (gates.level: block)."
            )


def branch_sites(network: nn.Module) -> Iterator[Site]:
    """The last layers of all residual branches that are known, in the network's order.

    Raises:
        FewstepError: for one that is no linear or convolutional layer any more.
    """
    seen = set()
    for name, block in network.named_modules():
        kind = kind_of(block)
        for branch in kind.branches if kind is not None else ():
            layer = _find(block, branch.layer)
            if layer is None or layer in seen:
                continue
            seen.add(layer)
            if not isinstance(layer, LAYERS):
                raise FewstepError(
                    f"'{_join(name, branch.layer)}' is a {type(layer).__name__}; gates go on "
                    "linear and convolutional layers. Add gates before the layer is replaced."
                )
            yield _layer_site(
                _join(name, branch.layer), layer, name, class_name(block), branch.side
            )


def _layer_site(name: str, layer: Layer, block: str, kind: str, side: Side = "sample") -> Site:
    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return Site(name, block, kind, channels, -1 if linear else 1, side)


def block_sites(network: nn.Module) -> Iterator[Site]:
    """The streams of all blocks that are known to keep theirs, in the network's order."""
    known = [(name, block, kind_of(block)) for name, block in network.named_modules()]
    blocks = [(name, block, kind) for name, block, kind in known if kind is not None]
    for name, block, kind in blocks:
        for stream in kind.streams if keeps_its_stream(block) else ():
            last = _find(block, stream.last)
            # What the last block makes of the text is used by nothing.
            unused = stream.side == "text" and name == blocks[-1][0]
            if isinstance(last, LAYERS) and not unused:
                site = _layer_site(name, last, name, class_name(block), stream.side)
                channel_dim = stream.channel_dim or site.channel_dim
                yield replace(site, stream=stream, channel_dim=channel_dim)


def _included(network: nn.Module, spec: ResidualGates, known: list[Site]) -> list[Site]:
    """The units in whose names one of the patterns is, in the network's order."""
    wanted: list[Site] = []
    for pattern in spec.include or ():
        found = [site for site in known if _names(network, pattern, site)]
        found = found or _elsewhere(network, spec, pattern, known)
        wanted += [site for site in found if site not in wanted]
    if spec.level == "branch":
        _check_all_named(network, spec, wanted)
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    return sorted(wanted, key=lambda site: order[site.name])


def _elsewhere(
    network: nn.Module, spec: ResidualGates, pattern: str, known: list[Site]
) -> list[Site]:
    """Layers that a pattern names though they end no branch that is known."""
    everything = pattern == "."  # stands for all that are known, and there are none
    named = [
        (n, m) for n, m in network.named_modules() if n and re.search(pattern, n) and not everything
    ]
    if spec.level == "branch":
        layers = [(n, m) for n, m in named if isinstance(m, LAYERS)]
        if layers:
            return [_layer_site(n, m, n, type(m).__name__) for n, m in layers]
    elif named:
        name, module = named[0]
        raise FewstepError(
            f"gates.include: '{pattern}' names '{name}', a {class_name(module)}, whose stream is "
            "not known, or not kept. Let the class say `residual_branches` and `residual_stream` "
            "(fewstep.networks.gates.blocks.ResidualBlock), or set gates.level: branch."
        )
    raise FewstepError(
        f"gates.include: '{pattern}' is in no name of {type(network).__name__} and no class of its "
        f"blocks. {_some(known)}"
    )


def find_skips(network: nn.Module) -> list[SkipSite]:
    """The long skips of a U-shaped network.

    Raises:
        FewstepError: if it has none.
    """
    found = []
    for name, module in network.named_modules():
        resnets = getattr(module, "resnets", None)
        if isinstance(resnets, nn.ModuleList) and position_of(module, SKIPS) is not None:
            found.append(SkipSite(name, class_name(module), len(resnets)))
        if name.split(".")[-1] == FUSE and isinstance(module, nn.Linear):
            if module.in_features != 2 * module.out_features:
                raise FewstepError(
                    f"gates.skip: '{name}' does not take a stream and a skip of "
                    f"{module.out_features} channels each; set gates.skip: false."
                )
            found.append(SkipSite(name, class_name(module), None))
    if not found:
        raise FewstepError(
            f"gates.skip: {type(network).__name__} has no long skips: no up blocks that take "
            f"'{SKIPS}', and no fuse map named '{FUSE}'. Set gates.skip: false."
        )
    return found


def _find(block: nn.Module, path: str) -> nn.Module | None:
    """A module within a block; None if the block has none of this name."""
    found: nn.Module | None = block
    for part in path.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _join(block: str, path: str) -> str:
    return f"{block}.{path}" if block else path


def _some(sites: list[Site]) -> str:
    names = ", ".join(f"'{site.name}'" for site in sites[:3])
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    return f"There are {names}{more}." if sites else "There are none that are known."

"""What each gated unit adds to its block's stream, as it is seen while the network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.networks import UViT
from fewstep.networks.gates import ResidualGates, apply_gates, gate_parameters, gates_of
from fewstep.networks.gates.streams import StreamNorms, gate_places, watched_streams

Tinies = Callable[[str], Any]
ATTENTION, MLP = "blocks.0.attn1.to_out.0", "blocks.0.ff.net.2"


def seen(it: Any) -> list[StreamNorms]:
    with torch.no_grad(), watched_streams(it.network) as streams:
        it()
    return streams


def chain(tiny: Tinies) -> Any:
    """Plain pre-LN blocks, which add what their branches give as it is."""
    it = tiny("uvit")
    it.network = UViT(8, 3, num_layers=2, num_heads=2, head_dim=8, long_skips=False)
    apply_gates(it.network, ResidualGates())
    return it


def norms_of(streams: list[StreamNorms], gate: str, network: nn.Module) -> StreamNorms:
    place = gate_places(network)[gate]
    return next(norms for norms in streams if (norms.block, norms.side) == place)


def test_branches_of_one_block_have_ratios_and_cosines_of_their_own(tiny: Tinies) -> None:
    it = chain(tiny)
    both = seen(it)[0]
    ratios = [both.ratio_of(name) for name in (ATTENTION, MLP)]
    assert ratios[0] != pytest.approx(ratios[1], rel=0.05)
    gates = dict(gates_of(it.network))
    for kept, off in ((ATTENTION, MLP), (MLP, ATTENTION)):
        nn.init.constant_(gates[f"{off}.rdm_gate"].get_parameter("delta"), -1.0)
        alone = seen(it)[0]  # the one branch is all that the block adds
        assert alone.ratio_of(kept) == pytest.approx(alone.ratio, rel=1e-4)
        growth = (alone.after / alone.stream).item() ** 2
        ratio, cosine = alone.ratio_of(kept), alone.cosine_of(kept)
        assert ratio is not None
        assert cosine is not None
        assert growth == pytest.approx(1 + 2 * ratio * cosine + ratio**2, rel=1e-5)
        assert (alone.ratio_of(off), alone.cosine_of(off)) == (0.0, 0.0)
        nn.init.zeros_(gates[f"{off}.rdm_gate"].get_parameter("delta"))


def test_what_a_branch_adds_is_what_its_gate_gives(tiny: Tinies) -> None:
    it = chain(tiny)
    before = seen(it)[0].ratio_of(ATTENTION)
    nn.init.constant_(dict(gates_of(it.network))[f"{ATTENTION}.rdm_gate"].get_parameter("delta"), 1)
    after = seen(it)[0].ratio_of(ATTENTION)
    assert before is not None
    assert after == pytest.approx(2 * before, rel=1e-5)


SMALL = ["dit", "pixart", "sd3", "flux", "wan", "ltx", "latte", "unet2d", "video_dit", "own_latte"]
LARGE = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("unet", "modelscope", "animatediff")
]


@pytest.mark.parametrize("level", ["branch", "block"])
@pytest.mark.parametrize("kind", [*SMALL, *LARGE])
def test_every_gate_of_a_known_stream_is_seen(kind: str, level: Any, tiny: Tinies) -> None:
    it = tiny(kind)
    apply_gates(it.network, ResidualGates(level=level))
    with torch.no_grad():
        for parameter in gate_parameters(it.network):
            parameter.add_(0.1 * torch.randn_like(parameter))
    streams = seen(it)
    blocks = {norms.block for norms in streams}
    known = {g: p for g, p in gate_places(it.network).items() if p is not None and p[0] in blocks}
    assert known
    for gate in known:
        norms, unit = norms_of(streams, gate, it.network), gate.rpartition(".")[0]
        ratio, cosine = norms.ratio_of(unit), norms.cosine_of(unit)
        if ratio is None:  # the last block's text, which nothing takes
            assert gate.endswith(("to_add_out.rdm_gate", "ff_context.net.2.rdm_gate"))
            continue
        assert 0 < ratio < 100
        assert cosine is not None
        assert 0 < abs(cosine) <= 1
        if level == "block":
            assert ratio == pytest.approx(norms.ratio)


def test_branches_are_seen_once_and_then_no_more(tiny: Tinies) -> None:
    it = chain(tiny)
    with torch.no_grad(), watched_streams(it.network) as streams:
        it()
        before = [norms.ratio_of(MLP) for norms in streams]
        it.given["x_t"] = 2 * it.given["x_t"]
        it()
    assert [norms.ratio_of(MLP) for norms in streams] == before
    modules = list(it.network.modules())
    assert not any(module._forward_pre_hooks for module in modules)
    assert sum(len(module._forward_hooks) for module in modules) == 4  # those of the gates


def test_cosines_are_of_tokens_that_belong_together_in_blocks_that_fold_them(tiny: Tinies) -> None:
    it = tiny("own_latte")
    apply_gates(it.network, ResidualGates())
    for number in range(2):  # across space, across time
        kept: list[torch.Tensor] = []
        block = it.network.blocks[number]

        def keep(_module: nn.Module, args: Any, output: Any, kept: Any = kept) -> None:
            kept.append(args[0])

        block.norm1.register_forward_hook(keep)
        streams = seen(it)
        block.attn1.to_out[0].register_forward_hook(lambda _, __, output, k=kept: k.append(output))
        with torch.no_grad():
            it()
        folded, added = kept[-2:]
        wanted = torch.nn.functional.cosine_similarity(added.flatten(), folded.flatten(), dim=0)
        cosine = streams[number].cosine_of(f"blocks.{number}.attn1.to_out.0")
        assert cosine == pytest.approx(wanted.item(), abs=1e-6)

"""Streams in float32 through networks that compute in bfloat16."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.networks.gates import (
    ResidualGates,
    apply_gates,
    gates_of,
    load_gates,
    merge_gates,
    save_gates,
)
from fewstep.networks.gates.precision import STREAMS, StreamLinear
from fewstep.networks.gates.sites import block_sites

Tinies = Callable[[str], Any]
# How much of the error at the last block is left at most, in networks of two blocks, whose
# embedding is rounded as well. Maps change their size or channels on the way, which starts another
# stream, and Flux rounds most in its embeddings.
LEFT = dict.fromkeys(("dit", "pixart", "sd3", "wan", "ltx", "latte", "video_dit"), 0.75)
OTHERS = 0.97


def last_stream(it: Any, network: nn.Module, autocast: bool = False) -> Tensor:
    """What the last block makes of the sample's stream."""
    *_, site = (site for site in block_sites(network) if site.side == "sample")
    found: list[Tensor] = []

    def look(_block: nn.Module, _args: Any, output: Any) -> None:
        found.append(output if site.stream.output is None else output[site.stream.output])

    handle = network.get_submodule(site.name).register_forward_hook(look)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        it(network)
    handle.remove()
    return found[0]


def gated(it: Any, stream_dtype: Any, alpha: float = 0.1) -> nn.Module:
    """A copy whose branches count little, so that what is rounded is the stream."""
    network: nn.Module = copy.deepcopy(it.network)
    apply_gates(network, ResidualGates(mode="alpha", stream_dtype=stream_dtype))
    with torch.no_grad():
        for _, gate in gates_of(network):
            gate.get_parameter("delta").fill_(alpha - 1)
    return network


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_a_float32_stream_is_rounded_less(family: str, autocast: bool, tiny: Tinies) -> None:
    it = tiny(family)
    wanted = last_stream(it, gated(it, "same"))
    errors, dtypes = [], []
    for stream_dtype in ("same", "float32"):
        network = gated(it, stream_dtype)
        found = last_stream(it, network if autocast else network.to(torch.bfloat16), autocast)
        errors.append(((found.float() - wanted).norm() / wanted.norm()).item())
        dtypes.append(found.dtype)
    assert dtypes[1] == torch.float32
    # Modulation or positions in float32 make the streams of some so under autocast anyway.
    wide_already = autocast and dtypes[0] == torch.float32
    assert errors[1] < (1.01 if wide_already else LEFT.get(family, OTHERS)) * errors[0]


@pytest.mark.parametrize("level", ["branch", "block"])
def test_branches_and_the_output_stay_in_bfloat16(family: str, level: Any, tiny: Tinies) -> None:
    it = tiny(family)
    apply_gates(it.network, ResidualGates(mode="alpha", level=level, stream_dtype="float32"))
    network = it.network.to(torch.bfloat16)
    seen = set()
    for module in network.modules():
        of_branch = not isinstance(module, StreamLinear)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and of_branch:
            module.register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    output = it(network)
    assert output.dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    output.square().mean().backward()
    assert all(g.get_parameter("delta").grad is not None for _, g in gates_of(network))


def test_in_float32_nothing_changes(family: str, tiny: Tinies) -> None:
    it = tiny(family)
    plain = it()
    apply_gates(it.network, ResidualGates(stream_dtype="float32"))
    assert torch.equal(it(), plain)


def test_copies_pickles_and_files_keep_the_streams_precision(tiny: Tinies, tmp_path: Any) -> None:
    it = tiny("dit")
    plain = copy.deepcopy(it.network)
    apply_gates(it.network, ResidualGates(stream_dtype="float32"))
    save_gates(it.network, tmp_path)
    assert load_gates(plain, tmp_path).stream_dtype == "float32"
    again = pickle.loads(pickle.dumps(it.network))
    for network in (copy.deepcopy(it.network), again, plain):
        assert last_stream(it, network.to(torch.bfloat16)).dtype == torch.float32
    merge_gates(plain)
    assert last_stream(it, plain).dtype == torch.bfloat16
    assert not any(hasattr(module, STREAMS) for module in plain.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


@pytest.mark.slow
@pytest.mark.threads
def test_compiled_blocks_keep_their_streams_in_float32(tiny: Tinies) -> None:
    it = tiny("video_dit")
    network = gated(it, "float32", 0.5).to(torch.bfloat16)
    expected = last_stream(it, network)
    for block in network.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = last_stream(it, network)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


class Casting(nn.Module):
    """A block that rounds its stream."""

    residual_branches = ("last",)
    residual_stream = "z"

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, z: Tensor) -> Tensor:
        return (z + self.last(z)).to(self.last.weight.dtype)


def test_streams_that_would_not_be_float32_are_refused() -> None:
    network = nn.Sequential(Casting())
    apply_gates(network, ResidualGates(stream_dtype="float32"))
    network(torch.randn(2, 4))
    with pytest.raises(FewstepError, match="a Casting gives its 'z' in bfloat16"):
        network.to(torch.bfloat16)(torch.randn(2, 4))
    unknown = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FewstepError, match="no block of this Sequential is known to keep"):
        apply_gates(unknown, ResidualGates(include=["0"], stream_dtype="float32"))
    with pytest.raises(FewstepError, match=r"gates\.mode none has none"):
        ResidualGates(mode="none", stream_dtype="float32")

"""A diffusers network behind the Backbone face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Backbone, Cond
from fewstep.errors import FewstepError

NullShapes = Mapping[str, Sequence[int] | None]


class DiffusersBackbone(Backbone):
    """Holds a network of diffusers' and what its pipeline feeds the unconditional branch.

    A family sets ``network_class`` and writes ``forward`` and ``feature_blocks``. One whose
    networks may tell variances, in as many channels again, sets ``may_tell_variance`` and returns
    them all.

    Args:
        network: the network, or its plain configuration, from which it is built untrained.
        sample_shape: shape of one latent sample, ``(C, H, W)`` or ``(C, F, H, W)``.
        null: for each conditioning that the unconditional branch gets a value of its own, the
            shape ``(1, ...)`` of that value; None where it is zeros. The values themselves are
            buffers, so that checkpoints hold them.
    """

    network_class: ClassVar[Any]
    may_tell_variance: ClassVar[bool] = False

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        sample_shape: Sequence[int],
        null: NullShapes | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            network = self.network_class.from_config(dict(network))
        self.network: Any = network
        self.sample_shape = tuple(sample_shape)
        shapes = {name: None if s is None else list(s) for name, s in (null or {}).items()}
        self.config = {
            "network": plain_config(self.network),
            "sample_shape": list(sample_shape),
            "null": shapes,
        }
        twice = self.config["network"].get("out_channels") == 2 * self.sample_shape[0]
        self.learned_variance = self.may_tell_variance and twice
        for name, shape in shapes.items():
            if shape is not None:
                self.register_buffer(f"null_{name}", torch.zeros(shape))

    @property
    def num_tokens(self) -> int:
        """Tokens that the network makes of a sample; what a flow's dynamic shift depends on."""
        height, width = self.sample_shape[-2:]
        patch = self.network.config.get("patch_size") or 1
        return (height // patch) * (width // patch)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's conditionings, where the null condition says them."""
        null = self.config["null"]
        return {name: tuple(shape[1:]) for name, shape in null.items() if shape is not None}

    def fill_null(self, values: Cond) -> None:
        """Takes the values of the null condition, each ``(1, ...)``."""
        for name, shape in self.config["null"].items():
            if shape is not None:
                self.get_buffer(f"null_{name}").copy_(values[name])

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """What its pipeline gives the unconditional branch; the rest of ``cond`` stays.

        Raises:
            FewstepError: if a conditioning is not shaped like the null condition.
        """
        if not self.config["null"]:
            raise FewstepError(
                f"This {type(self).__name__} holds no null condition, which guidance needs; load "
                "it from its pipeline's folder with the null condition."
            )
        found = dict(cond)
        for name, shape in self.config["null"].items():
            given = cond[name]
            if shape is None:
                found[name] = torch.zeros_like(given)
                continue
            null = self.get_buffer(f"null_{name}")
            if null.shape[1:] != given.shape[1:]:
                raise FewstepError(
                    f"'{name}' has shape {list(given.shape[1:])} a sample and the pipeline's null "
                    f"condition {list(null.shape[1:])}; encode the text as the pipeline does."
                )
            found[name] = null.to(given.dtype).expand(given.shape)
        return found


def plain_config(network: Any) -> dict[str, Any]:
    """A diffusers network's constructor arguments as plain values."""
    config: dict[str, Any] = json.loads(network.to_json_string())
    return {name: value for name, value in config.items() if not name.startswith("_")}

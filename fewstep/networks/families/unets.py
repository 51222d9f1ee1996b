"""What all U-Nets of diffusers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.networks.families.base import DiffusersBackbone, NullShapes, plain_config


def unet_blocks(network: Any) -> dict[str, int]:
    """The down, middle and up blocks of a backbone's ``network``, with the channels they give."""
    channels = list(network.config["block_out_channels"])
    down = {f"network.down_blocks.{i}": width for i, width in enumerate(channels)}
    middle = {"network.mid_block": channels[-1]} if network.mid_block is not None else {}
    up = {f"network.up_blocks.{i}": width for i, width in enumerate(reversed(channels))}
    return down | middle | up


class UNetBackbone(DiffusersBackbone):
    """A U-Net, whose down, middle and up blocks are its features and its shards.

    Args:
        network, sample_shape, null: see :class:`DiffusersBackbone`.
        guidance_embedding_dim: size of the guidance-scale embedding ``timestep_cond (B, dim)`` that
            the network takes, as consistency models do; 0 for none. By default what the network
            has; if it is built anew, this is what it gets.
    """

    def __init__(
        self,
        network: Mapping[str, Any] | nn.Module,
        sample_shape: Sequence[int],
        null: NullShapes | None = None,
        guidance_embedding_dim: int | None = None,
    ) -> None:
        if guidance_embedding_dim and isinstance(network, Mapping):
            network = {**network, "time_cond_proj_dim": guidance_embedding_dim}
        super().__init__(network, sample_shape, null)
        dim = self.network.config.get("time_cond_proj_dim") or 0
        self.config["guidance_embedding_dim"] = dim
        self.guidance_input = "timestep_cond" if dim else None

    def add_guidance_input(self, dim: int) -> None:
        """Adds what diffusers builds for a ``time_cond_proj_dim``, with weights of zero.

        A linear map of the embedding ``(B, dim)``, added to the time's own embedding (Luo et al.
        2023, latent consistency models, after Meng et al. 2022).
        """
        if self.guidance_input is not None:
            return
        embedding = self.network.time_embedding
        like = embedding.linear_1.weight
        layer = nn.Linear(dim, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(layer.weight)
        embedding.cond_proj = layer.requires_grad_(like.requires_grad)
        self.network.register_to_config(time_cond_proj_dim=dim)
        self.config |= {"network": plain_config(self.network), "guidance_embedding_dim": dim}
        self.guidance_input = "timestep_cond"
        self.added_layer = "time_embedding.cond_proj"

    @property
    def feature_blocks(self) -> dict[str, int]:
        return unet_blocks(self.network)


class TextUNet(UNetBackbone):
    """A U-Net whose conditioning is one embedded text, ``encoder_hidden_states (B, L, D)``."""

    def text_inside(self, text: Tensor, x_t: Tensor) -> Tensor:
        """The text as the network takes it, for samples ``x_t (B, C, ...)``."""
        return text

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Args: ``x_t (B, C, ...)``, ``t (B,)``, text ``(B, L, D)``, guidance ``(B, dim)``."""
        output: Tensor = self.network(
            x_t,
            t,
            self.text_inside(encoder_hidden_states, x_t),
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return output

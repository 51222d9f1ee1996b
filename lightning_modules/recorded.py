"""What checkpoints say of themselves, and what is asked of those that are loaded."""

from __future__ import annotations

from typing import Any

from fewstep.networks.loading import METADATA_KEY
from lightning_modules.checks import check_same_experiment, load_strictly
from lightning_modules.sampling import SampledRoles


class RecordedRoles(SampledRoles):
    """Checkpoints hold trained and averaged roles; of frozen ones they hold source and hash.

    Attributes:
        provenance: where each frozen role came from.
        loaded_metadata: what the checkpoint that was loaded said of itself.
    """

    provenance: dict[str, dict[str, str]]
    loaded_metadata: dict[str, Any] | None

    @property
    def student_updates(self) -> int:
        """Optimiser updates the student has had."""
        return self.global_step

    def method_metadata(self) -> dict[str, Any]:
        """What of this method a checkpoint must record and agree on, as plain values."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of itself, in plain values."""
        return {
            "format": 1,
            "method": type(self).__name__,
            "denoiser": self.student.to_spec(),
            "frozen": self.provenance,
            "student_updates": self.student_updates,
            **self.method_metadata(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the metadata that loading checks and rebuilds from; callbacks may add theirs."""
        checkpoint.setdefault(METADATA_KEY, {}).update(self.metadata())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another experiment, naming the difference."""
        stored = checkpoint.get(METADATA_KEY)
        check_same_experiment(stored, self.metadata())
        self.loaded_metadata = stored

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without frozen roles, whose source and hash are in the metadata."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        hidden = tuple(f"{prefix}{role}." for role in self.frozen_roles)
        for name in [n for n in state if n.startswith(hidden)] if hidden else []:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads all but the frozen roles; anything else missing or unknown is an error."""
        return load_strictly(super().load_state_dict, state_dict, self.frozen_roles, assign)

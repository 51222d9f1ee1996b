"""Building a method's roles without weights: shapes, dtypes and who is trained, and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fewstep.diffusion import Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.folders import family_of, find_folder, read_configs, read_json
from fewstep.networks.gates import ResidualGates
from fewstep.networks.loading import METADATA_KEY, find_checkpoint, read_checkpoint
from fewstep.networks.pipelines import LoadedPipeline, load_denoiser_of, read_null
from fewstep.networks.sharded import is_sharded_checkpoint, read_remainder
from fewstep.networks.text import TextEncoding
from fewstep.spec import Spec, describe
from lightning_modules import FewStepModule, Pretrained
from lightning_modules.preparation import check_precision
from lightning_modules.roles import is_pipeline
from scripts.experiments import find_experiment, with_defaults
from scripts.plan.judges import without_weights

# Precisions in which Lightning converts all of a module.
WEIGHTS = {"64-true": torch.float64}
SOURCES = ("teacher_source", "start_source")  # where methods say what networks they start from


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built meanwhile have their parameters on the meta device.

    Narrower than ``torch.device("meta")`` on purpose: schedules and grids are built along with the
    networks, and they compute with values.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    patched: Any = nn.Module
    patched.register_parameter = register_on_meta
    try:
        yield
    finally:
        patched.register_parameter = register


def build_without_weights(model: FewStepModule, precision: str = "32-true") -> list[str]:
    """Builds a method's roles on the meta device; a teacher's checkpoint is not loaded.

    Args:
        model: the method.
        precision: Lightning's name of it.

    Returns:
        what a reader must know about how that was possible.

    Raises:
        FewstepError: if nothing says what the teacher's architecture is, or for a precision that
            methods refuse.
    """
    check_precision(precision)
    notes: list[str] = []
    if model.compile_blocks:
        notes.append("Blocks are planned as if not compiled, which saves some activations.")
        model.compile_blocks = False
    for name in SOURCES:
        source = getattr(model, name, None)
        if isinstance(source, str) and is_pipeline(source):
            source = Pretrained(source)
        if isinstance(source, Pretrained) and not isinstance(source, _Outlined):
            setattr(model, name, _Outlined(source))
        elif isinstance(source, str):
            spec, note = architecture_of(source)
            notes += [note] if note else []
            setattr(model, name, partial(Denoiser.from_spec, spec))
    with parameters_on_meta():
        notes += without_weights(model)
        model.configure_model()
    # A teacher that came ready-made has real parameters.
    nn.Module.to(model, "meta", WEIGHTS.get(precision))
    return notes


class _Outlined(Pretrained):
    """A pipeline whose network gets no weights, so that its folder needs to hold none.

    Where only the text encoders know the shape of text, they run, and need theirs.
    """

    def __init__(self, source: Pretrained) -> None:
        super().__init__(**vars(source))
        folder = find_folder(self.folder)
        family, self._null = family_of(folder), None
        known = self.negative_prompt is None and family.zero_null(
            read_json(folder / "model_index.json")
        )
        if self.empty is not None:
            self._null = read_null(self.empty)
        elif family.text_shapes is not None:
            shapes = family.text_shapes(read_configs(folder, family, self.size))
            self._null = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
        elif family.encode is not None and not known:
            self._null = TextEncoding(folder).null(self.negative_prompt)

    def load(self) -> LoadedPipeline:
        """Builds the denoiser."""
        options = self.size, self.frames, self._null
        negative = self.negative_prompt
        return load_denoiser_of(self.folder, *options, negative_prompt=negative, weights=False)


def architecture_of(source: str) -> tuple[Spec, str | None]:
    """A teacher's description, from its checkpoint's metadata or else its experiment's file.

    Args:
        source: a checkpoint, a run's or an experiment's folder.

    Returns:
        the description and, if there is no checkpoint yet, a sentence that says where it is from.

    Raises:
        FewstepError: if there is neither a checkpoint nor an experiment of that name.
    """
    try:
        checkpoint = find_checkpoint(source)
    except FewstepError as missing:
        try:
            file = find_experiment(_experiment_name(source))
            spec = _described_in(file)
        except FewstepError:
            raise missing from None
        return spec, (
            f"'{source}' holds no checkpoint yet: its architecture is that of '{file}', "
            "without changes made on the command line."
        )
    # The file is mapped into memory, so that weights are never read.
    read = read_remainder if is_sharded_checkpoint(checkpoint) else read_checkpoint
    spec = read(checkpoint)[METADATA_KEY]["denoiser"]
    return spec, None


def _experiment_name(source: str) -> str:
    parts = [p for p in Path(source).parts if not p.startswith("version_") and p != "checkpoints"]
    if parts and parts[-1].endswith(".ckpt"):
        parts.pop()
    return "/".join(parts[1:] if parts and parts[0] == "runs" else parts)


def _described_in(file: Path) -> Spec:
    """The denoiser that an experiment trains, with the gates that it adds."""
    options: dict[str, Any] = {}
    for part in with_defaults(file):
        model = (yaml.safe_load(part.read_text()) or {}).get("model") or {}
        options |= model.get("init_args") or {}
    spec, gates = _ungated_in(options, file), options.get("gates")
    if not gates:
        return spec
    backbone = spec["backbone"]
    changes = [*backbone.get("changes", ()), describe(ResidualGates(**gates))]
    return {**spec, "backbone": {**backbone, "changes": changes}}


def _ungated_in(options: dict[str, Any], file: Path) -> Spec:
    """The denoiser that a method with these options starts from."""
    if "backbone" in options:
        return _completed(
            {
                "backbone": options["backbone"],
                "schedule": options["schedule"],
                "prediction_type": options.get("prediction_type", "epsilon"),
                "alpha_floor": 0.0,
            }
        )
    source = options.get("start") or options.get("teacher")
    if isinstance(source, str) and is_pipeline(source):
        return _outlined(Pretrained(source))
    if isinstance(source, str):
        return architecture_of(source)[0]
    if isinstance(source, dict) and source.get("class_path", "").endswith("Pretrained"):
        return _outlined(Pretrained(**source["init_args"]))
    if isinstance(source, dict) and "backbone" in source.get("init_args", {}):
        return _completed({"alpha_floor": 0.0, **source["init_args"]})
    raise FewstepError(f"'{file}' does not say what network it trains.")


def _outlined(source: Pretrained) -> Spec:
    """The denoiser of a pipeline's folder."""
    outlined = _Outlined(source)
    with parameters_on_meta():
        return outlined.load().denoiser.to_spec()


def _completed(spec: Any) -> Any:
    """The description with the empty ``init_args`` that an experiment may leave out."""
    if not isinstance(spec, dict):
        return spec
    filled = {name: _completed(value) for name, value in spec.items()}
    return {"init_args": {}, **filled} if "class_path" in filled else filled

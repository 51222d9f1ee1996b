"""LoRA students: trained and averaged adapters on a teacher's own weights.

Three denoisers share one network. Its layers are peft's; which adapter they use is one name that a
denoiser sets for the time of a call, so changing it costs nothing and touches no layer.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Cond, Denoiser
from fewstep.errors import FewstepError
from fewstep.networks.gates.gated import is_gated
from fewstep.networks.lora_switch import Switched, make_switched, pinned, using
from fewstep.networks.lora_targets import LoRA, find_targets, inner_network
from fewstep.spec import Spec

# ---------------------------------------------------------------------- adapters


class AdapterLayer(nn.Module):
    """One layer's ``A`` and ``B``, as peft made them, and its dropout."""

    def __init__(self, down: nn.Module, up: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.lora_A = down
        self.lora_B = up
        self.dropout = dropout


class Adapter(nn.Module):
    """All adapted layers of a network, each in the place it has there.

    So the tensors of ``transformer_blocks.0.attn.to_q`` are named
    ``transformer_blocks.0.attn.to_q.lora_A.weight``, as they are in peft's files.
    """

    def __init__(self, layers: dict[str, AdapterLayer]) -> None:
        super().__init__()
        self._order = list(layers)  # private, as any other name may be that of a network's part
        for name, layer in layers.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, layer)


def adapter_layers(adapter: Adapter) -> dict[str, AdapterLayer]:
    """An adapter's layers by name, in the network's order."""
    found = {name: adapter.get_submodule(name) for name in adapter._order}
    return {name: layer for name, layer in found.items() if isinstance(layer, AdapterLayer)}


class SharedTeacher(Denoiser):
    """The base of a LoRA, without adapters: the only one of its denoisers that holds weights."""

    def outputs(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor | None]:
        with using(None):
            return super().outputs(x_t, t, cond)


class LoRADenoiser(Denoiser):
    """A base with an adapter of its own.

    The adapter alone belongs to this module: its parameters, its state, its device and mode. All
    of the base's are its owner's, whoever that is.

    Args:
        base: the owner of the network.
        adapter: what is trained or averaged.
        name: of the adapter in the network's layers.
        lora: the options it was made with, all resolved.
    """

    def __init__(self, base: Denoiser, adapter: Adapter, name: str, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.__dict__["backbone"] = base.backbone  # past Module, which would make it this one's own
        self.schedule = base.schedule
        self.prediction_type = base.prediction_type
        self.alpha_floor = base.alpha_floor
        self.adapter = adapter
        self.name = name
        self.lora = lora
        layers = dict(inner_network(base.backbone).named_modules())
        for layer_name, layer in adapter_layers(adapter).items():
            _connect(layers[layer_name], name, layer, lora.scale)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapted layers, in the network's order."""
        return list(adapter_layers(self.adapter))

    def outputs(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, Tensor | None]:
        with using(self.name):
            return super().outputs(x_t, t, cond)

    def to_spec(self) -> Spec:
        """The base's description and the LoRA's options; see :func:`rebuild`."""
        return {**super().to_spec(), "lora": asdict(self.lora)}


def _connect(layer: Any, name: str, adapter: AdapterLayer, scale: float) -> None:
    """Lets a peft layer use an adapter that is registered elsewhere."""
    layer.lora_A[name] = adapter.lora_A
    layer.lora_B[name] = adapter.lora_B
    layer.lora_dropout[name] = adapter.dropout
    layer.scaling[name] = scale


@dataclass(frozen=True)
class SharedBase:
    """Three denoisers over one network.

    Attributes:
        teacher: the base alone, frozen; it holds the network.
        student: with the adapter that is trained.
        ema: with an adapter that starts as the student's: frozen and in eval mode.
    """

    teacher: SharedTeacher
    student: LoRADenoiser
    ema: LoRADenoiser


def share_base(teacher: Denoiser, lora: LoRA, seed: int = 0) -> SharedBase:
    """Puts adapters on a teacher's network, which stays the teacher's and is frozen.

    The student starts as the teacher, exactly. Adapters are float32, whatever the base is.

    Args:
        teacher: its network is changed in place; use what is returned from here on.
        lora: the adapters' options.
        seed: adapters are drawn from it alone, so alike on all ranks.

    Raises:
        FewstepError: if peft is missing, the network has adapters already, or a target matches
            nothing.
    """
    network = inner_network(teacher.backbone)
    if any(isinstance(module, Switched) for module in network.modules()):
        raise FewstepError(
            f"This {type(teacher.backbone).__name__} has adapters already; load the teacher anew "
            "for another LoRA."
        )
    if is_gated(network):
        raise FewstepError(
            f"This {type(teacher.backbone).__name__} has residual gates, which adapters on its "
            "layers would go past; merge them into the weights first (merge_gates)."
        )
    patterns, names = find_targets(network, lora.target_modules)
    added = teacher.backbone.added_layer
    if added is not None and added not in names:
        raise FewstepError(
            f"lora.target_modules leaves out '{added}', the new input for the guidance scale, "
            "which would stay without effect. Add 'cond_proj', or set guidance_embedding: false."
        )
    lora = replace(lora, alpha=lora.scale * lora.rank, target_modules=patterns)
    base = SharedTeacher(
        teacher.backbone, teacher.schedule, teacher.prediction_type, teacher.alpha_floor
    )
    adapter = _inject(network, names, lora, seed)
    base.requires_grad_(False).eval()
    student = LoRADenoiser(base, adapter.requires_grad_(True).train(), "student", lora)
    average = copy.deepcopy(adapter).requires_grad_(False)
    return SharedBase(base, student, LoRADenoiser(base, average, "ema", lora).eval())


def _inject(network: nn.Module, names: list[str], lora: LoRA, seed: int) -> Adapter:
    """Has peft adapt the layers, and takes the adapters out of the network's module tree."""
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    # On the CPU, whatever the default device is: so the draws are the same on all devices, and no
    # other random numbers change.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, network, adapter_name="student")
    del network.peft_config  # peft's own bookkeeping, which would no longer be true
    return Adapter({name: _taken_out(network.get_submodule(name)) for name in names})


def _taken_out(layer: Any) -> AdapterLayer:
    parts = (layer.lora_A["student"], layer.lora_B["student"], layer.lora_dropout["student"])
    for attribute in ("lora_A", "lora_B", "lora_dropout"):
        delattr(layer, attribute)
        setattr(layer, attribute, {})  # a plain dictionary: what is in it is registered elsewhere
    make_switched(layer)
    return AdapterLayer(*parts).float()


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FewstepError(
            "LoRA students need the peft package: pip install 'fewstep[lora]'."
        ) from error
    return peft


# ---------------------------------------------------------------------- checkpoints


def is_lora_spec(spec: Spec) -> bool:
    """Whether a description is a LoRA's, which :func:`rebuild` puts on its base."""
    return "lora" in spec


def rebuild(base: Denoiser, spec: Spec) -> LoRADenoiser:
    """The LoRA denoiser that ``spec`` describes, on its base and with untrained adapters.

    Args:
        base: the loaded base; its network is changed in place.
        spec: what :meth:`LoRADenoiser.to_spec` gave.

    Raises:
        FewstepError: if it was made on another base.
    """
    found = base.to_spec()
    for key in ("backbone", "schedule", "prediction_type"):
        if _plain(found[key]) != _plain(spec[key]):
            raise FewstepError(
                f"This LoRA was trained on another base: its {key} was {_plain(spec[key])}, and "
                f"here it is {_plain(found[key])}. Give the base it was trained on."
            )
    student = share_base(base, LoRA(**spec["lora"])).student
    student.alpha_floor = spec["alpha_floor"]
    return student


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


__all__ = [
    "Adapter",
    "LoRA",
    "LoRADenoiser",
    "SharedBase",
    "SharedTeacher",
    "adapter_layers",
    "is_lora_spec",
    "pinned",
    "rebuild",
    "share_base",
    "using",
]

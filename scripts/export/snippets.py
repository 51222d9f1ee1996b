"""The lines of Python that sample from an export: with diffusers alone, unless it has gates."""

from __future__ import annotations

import inspect
import json
from typing import Any

from scripts.export.calls import Call

VISIT = (
    "set_timesteps = pipe.scheduler.set_timesteps",
    "pipe.scheduler.set_timesteps = lambda n=None, device=None, sigmas=None, mu=None: (",
    "    set_timesteps(device=device, {visit})",
    ")",
)


IMPORT_GATES = "from fewstep.networks.gates import load_gates"
GATES = (
    "This network has gates that are no change of its weights. They lie beside it, and diffusers "
    "does not read them: without load_gates it is another network."
)
"""Of exports whose gates cannot be merged."""


def pipeline_snippet(
    folder: str,
    call: Call,
    takes: set[str],
    videos: bool,
    adapter: str = "",
    scheduler: str = "",
    gated: str = "",
) -> str:
    """A call of an exported pipeline.

    Args:
        folder: its path, as the reader will write it; that of the base where there is an adapter.
        takes: the names of the arguments the pipeline takes.
        videos: whether it makes videos.
        adapter: folder of a LoRA adapter and its scheduler, if that is what was exported.
        scheduler: the scheduler's class.
        gated: the part with gates beside it, such as ``unet``; empty if there is none.
    """
    also = f", {scheduler}" if adapter else ""
    put_on = [
        f"pipe.load_lora_weights({_literal(adapter)})  # needs the peft package",
        f"pipe.scheduler = {scheduler}.from_pretrained(",
        f'    {_literal(adapter)}, subfolder="scheduler"',
        ")",
    ]
    examples = {"prompt": "a photo of a cat", "class_labels": [207]}
    asked = {name: value for name, value in examples.items() if name in takes}
    given = [
        f"    {name}={_literal(value)}," for name, value in {**asked, **call.arguments}.items()
    ]
    visit = [line.format(visit=_keywords(call.visit)) for line in VISIT if call.visit]
    lines = [
        "import torch",
        f"from diffusers import DiffusionPipeline{also}",
        *([IMPORT_GATES] if gated else []),
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_literal(folder)})",
        *(put_on if adapter else []),
        *([f"load_gates(pipe.{gated}, {_literal(f'{folder}/{gated}')})"] if gated else []),
        *visit,
        "torch.manual_seed(0)",
        "made = pipe(",
        *given,
        "    generator=torch.Generator().manual_seed(0),",
        f").{'frames' if videos else 'images'}[0]",
    ]
    return "\n".join(lines)


def transformer_snippet(
    folder: str,
    call: Call,
    scheduler: Any,
    shape: tuple[int, ...],
    num_classes: int,
    learned_variance: bool = False,
    gated: bool = False,
) -> str:
    """Sampling, by hand, a class-conditional transformer that is no pipeline's.

    Args:
        folder: of ``transformer/`` and ``scheduler/``, as the reader will write it.
        shape: of a sample, ``(C, H, W)``.
        num_classes: number of classes; the label after the last means "no class".
        learned_variance: whether the output tells variances too, which are left out.
        gated: whether it has gates beside it.
    """
    name = type(scheduler).__name__
    arguments = dict(call.arguments)
    guidance = arguments.pop("guidance_scale")
    step = {n: arguments.pop(n) for n in ("eta",) if n in arguments}
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = "".join(f", {n}={v!r}" for n, v in step.items())
    extra += ", generator=generator" if draws else ""
    times = _keywords({n: v for n, v in arguments.items() if n != "num_inference_steps"})
    load = f"from_pretrained({_literal(folder)}, subfolder="
    mean = f"[:, :{shape[0]}]" if learned_variance else ""
    output = [
        f"        output = network(x, timestep=t.expand(len(x)), class_labels=labels).sample{mean}",
    ]
    if guidance != 1:
        output = [
            f"        both = torch.cat([labels, torch.full_like(labels, {num_classes})])",
            "        doubled = torch.cat([x, x])",
            "        output = network(doubled, timestep=t.expand(len(both)), class_labels=both)",
            f"        given, null = output.sample{mean}.chunk(2)",
            f"        output = null + {guidance!r} * (given - null)",
        ]
    lines = [
        "import torch",
        f"from diffusers import DiTTransformer2DModel, {name}",
        *([IMPORT_GATES] if gated else []),
        "",
        f'network = DiTTransformer2DModel.{load}"transformer")',
        *([f"load_gates(network, {_literal(f'{folder}/transformer')})"] if gated else []),
        f'scheduler = {name}.{load}"scheduler")',
        f"scheduler.set_timesteps({times or call.num_steps})",
        f"labels = torch.arange({num_classes})",
        "generator = torch.Generator().manual_seed(0)",
        f"x = torch.randn(len(labels), {', '.join(map(str, shape))}, generator=generator)",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        *output,
        f"        x = scheduler.step(output, t, x{extra}).prev_sample",
        "images = x.clamp(-1, 1)  # pixels, -1 is black",
    ]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """A value as Python code, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())

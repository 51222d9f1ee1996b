"""``fewstep export``: reads a checkpoint, finds its scheduler, writes the folder."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write a trained student as a plain diffusers pipeline: its network, a scheduler that visits exactly
the times it was trained for, the base pipeline's other parts, and a model card with the call that
samples as fewstep does. Nothing of fewstep is needed to use it, unless the student has gates that
are no change of a weight: those lie beside its network, and the card says how they are read.
"""

EPILOG = """\
  fewstep export runs/sd15/pcm_4 --dest exports/pcm_4
  fewstep export runs/sd15/lcm/version_0 --dest exports/lcm --steps 2 4 --half
  fewstep evaluate -c sd15/pcm_4 --pipeline exports/pcm_4 --steps 4
  fewstep sample -c sd15/pcm_4 --pipeline exports/pcm_4     # from the same noise as the run's

Each scheduler is run beside the student's own sampler before it is written; where diffusers has
none that does the same, the export is refused.
"""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep export``.

    Raises:
        FewstepError: for what the user can mend.
    """
    options = _parser().parse_args(arguments)
    # Reading networks needs torch; it waits until here, so that --help answers at once.
    from scripts.export.exporting import export
    from scripts.export.students import Request

    exported = export(
        Request(
            checkpoint=options.checkpoint,
            folder=options.dest,
            pipeline=options.pipeline,
            base=options.base,
            role=options.role,
            steps=options.steps,
            guidance=options.guidance,
            adapter=options.adapter,
            half=options.half,
            overwrite=options.overwrite,
        )
    )
    for note in exported.notes:
        print(f"Note: {note}")
    steps = ", ".join(str(call.num_steps) for call in exported.calls)
    print(f"Exported to {options.dest}: {exported.scheduler}, for {steps} steps.")
    print(f"How to call it: {options.dest / 'README.md'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fewstep export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a checkpoint, a run's folder or an experiment's folder (its newest run)",
    )
    parser.add_argument(
        "--dest", metavar="FOLDER", type=Path, required=True, help="folder to write"
    )
    parser.add_argument(
        "--pipeline",
        metavar="FOLDER",
        help="the base pipeline, for VAE and text encoders; by default what the checkpoint says",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER_OR_CHECKPOINT",
        help="where the base of a LoRA student is now, if it has moved; its hash is checked",
    )
    parser.add_argument("--role", default="ema", help="whose weights: ema (default) or student")
    parser.add_argument(
        "--steps",
        metavar="K",
        type=int,
        nargs="+",
        help="step counts to export for; by default 1 2 4 8, or as many as a student has phases",
    )
    parser.add_argument(
        "--guidance",
        metavar="SCALE",
        type=float,
        help="guidance scale of the stated call; by default what the run samples with (1 is off)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA student write the adapter and the scheduler, not a whole pipeline with the "
        "adapter merged in",
    )
    parser.add_argument("--half", action="store_true", help="write the network in float16")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in that folder"
    )
    return parser

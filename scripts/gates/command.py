"""``fewstep gates``: its options, and what they lead to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Learnable gates on the residual branches of a pipeline's network (Neural Residual Diffusion):
z + alpha F(z) + beta in place of z + F(z).

  apply    put gates beside the network of a pipeline's folder; whatever reads the folder with
           fewstep has them from then on, and training from it trains them
  merge    write a pipeline whose weights have the gates in them, which needs nothing of fewstep
  report   what the gates of a pipeline, a checkpoint or a run have become
  grow     double a gated network's depth, each block becoming two, of half the step or one of none
  prune    take away the blocks that add least to their stream
  sensitivity   measure how depth and the gates' first values change untrained stacks
"""

EPILOG = """\
  fewstep gates apply models/sd15 --alpha-shape channel
  fewstep gates report runs/digits/rdm --picture gates.png
  fewstep gates merge models/sd15 --dest models/sd15_merged
  fewstep gates grow runs/digits/rdm --dest runs/digits/rdm_grown.ckpt
  fewstep gates prune runs/digits/rdm_grown.ckpt --blocks 2 --dest runs/shorter.ckpt
  fewstep gates sensitivity --dest runs/sensitivity

To merge the gates of a trained student use `fewstep export`, which does so where it can, and lays
them beside the network where not.
"""

APPLY = """\
Put gates that change nothing beside a pipeline's network, in two files: rdm_gates.safetensors and
rdm_gates.json. The network's own files stay as they are. Alpha starts at 1: other starts would
spoil trained weights; they belong in `gates:` of an experiment that trains from scratch.
"""
MERGE = """\
Write a pipeline's folder with the gates merged into the weights: W <- alpha W, b <- alpha b + beta.
The network computes the same. Refused for gates that are no change of a weight: those around whole
blocks, on skips in front of a norm, or with a part that depends on the time.
"""
REPORT = """\
Print each gate's alpha, the spread of alpha over channels, the norm of beta, and rho or the skips'
factor where it has one. Of a run with callbacks.GateReport also what it last wrote down, by depth:
what each gated unit adds to its block's stream and the cosine of both, what the whole block adds,
the stream, and the loss's gradient by it (root mean squares).
"""
GROW = """\
Double the depth of a network with gates: each block becomes two whose alpha and beta are half,
which take its step in two. What the network computes changes by the error of one step, so train it:
`model.init_args.start: DEST` of an experiment such as digits/rdm_grown, or the new pipeline. With
--new-blocks zero the second block's alpha and beta are zero instead, and the network computes
exactly the same; refused where such a block could never learn. A pipeline without gates gets them
by `fewstep gates apply`, a student by `gates:` of its experiment. A new pipeline's gates lie beside
its network, where diffusers does not see them: `fewstep gates merge` makes it an ordinary one, if
they are on branches.
"""
PRUNE = """\
Take away the blocks that add least to their stream, on samples of the network's own with noise of
random times. Networks that need prompts are left to fewstep.networks.gates.prune.
"""
SENSITIVITY = """\
Measure stacks of transformer blocks at initialisation, against their depth L: how much the stream
grows (|z_L| / |z_0|), how much larger the loss's gradient is at the first block than at the last
(g_0 / g_L), and the relative error of z_L in bfloat16, with the stream in bfloat16 and in float32
(gates.stream_dtype). Prints the means over seeds, and writes sensitivity.md, .csv and .png. The
default takes about four minutes of one CPU core.
"""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep gates``.

    Raises:
        FewstepError: for what the user can mend.
    """
    options = _parser().parse_args(arguments)
    # Networks need torch; it waits until here, so that --help answers at once.
    if options.action == "apply":
        from scripts.gates.folders import apply

        print(apply(options.pipeline, _spec(options), options.overwrite))
    elif options.action == "merge":
        from scripts.gates.folders import merge

        print(f"Merged {merge(options.pipeline, options.dest)} gates into {options.dest}.")
    elif options.action == "grow":
        from scripts.gates.depth import grow_depth

        depth = grow_depth(options.source, options.dest, options.new_blocks)
        print(f"{depth} blocks now, {depth // 2} before: {options.dest}")
        if options.dest.is_dir():
            print(
                "Its gates lie beside the network, where diffusers does not see them. `fewstep "
                f"gates merge {options.dest} --dest FOLDER` makes it an ordinary pipeline, if they "
                "are on branches; others are read by fewstep.networks.gates.load_gates."
            )
    elif options.action == "prune":
        _prune(options)
    elif options.action == "sensitivity":
        _measure_sensitivity(options)
    else:
        from scripts.gates.report import picture, read_seen, read_values, seen_text, text

        values, seen = read_values(options.source), read_seen(options.source)
        print(text(values) + (f"\n\n{seen_text(seen)}" if seen else ""))
        if options.picture is not None:
            print(f"Picture: {picture(values, options.picture)}")


def _prune(options: argparse.Namespace) -> None:
    from scripts.gates.depth import prune_depth

    removed = prune_depth(
        *(options.source, options.dest, options.blocks),
        *(options.samples, options.steps, options.seed, options.device),
    )
    print(f"Without the blocks {', '.join(map(str, removed))} (from 0): {options.dest}")


def _measure_sensitivity(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from scripts.gates.chart import draw
    from scripts.gates.sensitivity import Study, table, write_csv

    study = Study(options.networks, options.inits, options.depths, options.width, options.seeds)
    options.dest.mkdir(parents=True, exist_ok=True)
    rows = study.run(lambda numbers: tqdm(numbers, "Stacks", leave=False, disable=None))
    text = table(rows)
    (options.dest / "sensitivity.md").write_text(text + "\n", encoding="utf-8")
    write_csv(rows, options.dest / "sensitivity.csv")
    draw(rows, options.dest / "sensitivity.png")
    print(f"{text}\n\nWritten: {options.dest / 'sensitivity'}.md, .csv and .png")


def _spec(options: argparse.Namespace) -> Any:
    from fewstep.networks.gates import ResidualGates

    names = (
        *("mode", "level", "alpha_shape", "init"),
        *("stream_dtype", "skip", "time_conditioned"),
    )
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    return ResidualGates(**chosen, include=options.include, exclude=options.exclude)


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "fewstep gates", formatter_class=style, description=DESCRIPTION, epilog=EPILOG
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="apply|merge|report|grow|prune|sensitivity"
    )
    apply = actions.add_parser("apply", formatter_class=style, description=APPLY)
    apply.add_argument("pipeline", metavar="PIPELINE", type=Path, help="its folder")
    _add_gate_options(apply)
    apply.add_argument("--overwrite", action="store_true", help="replace the gates that are there")
    merge = actions.add_parser("merge", formatter_class=style, description=MERGE)
    merge.add_argument("pipeline", metavar="PIPELINE", type=Path, help="its folder, with gates")
    merge.add_argument("--dest", metavar="FOLDER", type=Path, required=True, help="what to write")
    report = actions.add_parser("report", formatter_class=style, description=REPORT)
    _add_source(report)
    report.add_argument(
        "--picture", metavar="PNG", type=Path, help="draw alpha and beta as bars as well"
    )
    _add_depths(actions, style)
    _add_sensitivity(
        actions.add_parser("sensitivity", formatter_class=style, description=SENSITIVITY)
    )
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a pipeline's folder with gates, a checkpoint, or a run's or an experiment's folder",
    )


def _add_depths(actions: Any, style: Any) -> None:
    grow = actions.add_parser("grow", formatter_class=style, description=GROW)
    prune = actions.add_parser("prune", formatter_class=style, description=PRUNE)
    for parser in (grow, prune):
        _add_source(parser)
        parser.add_argument(
            "--dest",
            metavar="PATH",
            type=Path,
            required=True,
            help="what to write: a folder from a pipeline's, otherwise a checkpoint",
        )
    grow.add_argument(
        "--new-blocks",
        choices=["half", "zero"],
        default="half",
        help="both blocks take half of the step (default), or new ones start with alpha at zero",
    )
    prune.add_argument("--blocks", metavar="N", type=int, required=True, help="how many go")
    prune.add_argument(
        "--steps",
        metavar="N",
        type=int,
        help="sampling steps they are made with; by default 20, or what a student serves",
    )
    prune.add_argument("--device", default="cpu", help="where they are made, by default cpu")
    for option, default, what in (
        ("--samples", 16, "samples to measure on"),
        ("--seed", 0, "of all that is random"),
    ):
        prune.add_argument(
            option, metavar="N", type=int, default=default, help=f"{what}, by default {default}"
        )


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    kinds, inits = ["pre-LN", "no-norm", "adaLN-Zero"], ["identity", "depth", "ode", "zero"]
    parser.add_argument(
        "--networks", nargs="+", choices=kinds, default=kinds, help="by default all three"
    )
    parser.add_argument(
        "--inits",
        nargs="+",
        choices=inits,
        default=inits,
        help="where alpha starts: 1, 1/sqrt(2L), 1/(2L) or 0; by default all four",
    )
    depths = [4, 8, 16, 32, 64, 128]
    parser.add_argument(
        "--depths", metavar="L", nargs="+", type=int, default=depths, help="by default 4 to 128"
    )
    parser.add_argument("--width", type=int, default=64, help="channels, by default 64")
    parser.add_argument("--seeds", type=int, default=3, help="how many, by default 3")
    parser.add_argument(
        "--dest", metavar="FOLDER", type=Path, required=True, help="what to write the results into"
    )


def _add_gate_options(parser: argparse.ArgumentParser) -> None:
    modes = ["none", "alpha", "beta", "alpha_beta", "alpha_rho", "full"]
    parser.add_argument(
        "--mode",
        choices=modes,
        default="alpha_beta",
        help="which of alpha, beta and rho (alpha_rho: alpha and rho; full: all); by default "
        "alpha_beta",
    )
    parser.add_argument(
        "--level",
        choices=["branch", "block"],
        default="branch",
        help="on each branch (default; can be merged), or around each block, as rho needs",
    )
    parser.add_argument(
        "--alpha-shape",
        choices=["scalar", "channel"],
        default="scalar",
        help="one alpha a gate (default) or one a channel",
    )
    parser.add_argument(
        "--init",
        choices=["identity", "depth", "ode", "zero"],
        default="identity",
        help="alpha starts at 1 (identity, the default); others are refused, as they would spoil "
        "trained weights",
    )
    parser.add_argument(
        "--stream-dtype",
        choices=["same", "float32"],
        default="same",
        help="float32 keeps the stream so where the network computes in half precision",
    )
    parser.add_argument("--skip", action="store_true", help="gate a U-Net's long skips too")
    parser.add_argument(
        "--time-conditioned", action="store_true", help="alpha and beta depend on the time as well"
    )
    for option, what in (("--include", "gate only"), ("--exclude", "do not gate")):
        parser.add_argument(
            option,
            metavar="REGEX",
            nargs="+",
            help=f"{what} what has one of these in its name, or is in a block of this class",
        )

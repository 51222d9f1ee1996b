"""``fewstep shards``: makes, indexes, encodes and checks the shards that data streams from."""

from __future__ import annotations

import argparse
import sys

EPILOG = """\
A shard is a plain WebDataset tar; its index, x.tar.index beside x.tar, makes any record one read
away. All of these commands may be stopped at any time: the same command goes on where it was.

  fewstep shards make data/pets --from ~/pictures/pets --labels folders --val-share 0.05
  fewstep shards check 'data/pets/*.tar' --sheet pets.png
  fewstep shards encode 'data/pets/train-*.tar' --pipeline models/sd15 --dest data/pets-latents
  fewstep shards index 'data/laion/{00000..00127}.tar' --shapes
"""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep shards``.

    Raises:
        SystemExit: with a status other than 0 if the command found fault or was stopped.
        FewstepError: for what the user can mend.
    """
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    if status:
        raise SystemExit(status)


def parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each leaves its function in ``options.run``."""
    from scripts.shards import check, encode, index, make

    commands = argparse.ArgumentParser(
        prog="fewstep shards",
        description="Make, index, encode and check the shards that training data streams from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = commands.add_subparsers(metavar="COMMAND", required=True)
    for module in (make, index, encode, check):
        module.add_to(group)
    return commands

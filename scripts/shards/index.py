"""``fewstep shards index``: indexes for shards that came from elsewhere."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from fewstep.errors import FewstepError
from scripts.shards.parallel import default_workers, in_parallel

EPILOG = """\
Training makes the indexes it lacks in its own cache. Making them here, once and beside the shards,
spares every machine that work.

  fewstep shards index data/laion --shapes
  fewstep shards index 'data/laion/{00000..00127}.tar' --workers 16
"""


def add_to(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = group.add_parser(
        "index",
        help="write the index of each shard beside it",
        description="Write the index x.tar.index beside each local shard x.tar.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tars, folders of them, globs or {0..9} braces"
    )
    parser.add_argument(
        "--shapes",
        action="store_true",
        help="note images' heights and widths, which batches by aspect ratio need",
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="(%(default)s)")
    parser.add_argument("--force", action="store_true", help="make those anew that are there")


def run(options: argparse.Namespace) -> int:
    """Runs the sub-command.

    Raises:
        FewstepError: for remote shards.
    """
    from datamodules.sources import Sources
    from scripts.shards.tars import whole

    sources = Sources()
    addresses = sources.expand(options.shards)
    remote = [address for address in addresses if not sources.is_local(address)]
    if remote:
        raise FewstepError(
            f"'{remote[0]}' is not on this machine, and nothing can be written beside it. Index "
            "the shards before they are uploaded, and upload the indexes too."
        )
    shards = [sources.local(address) for address in addresses]
    due = [s for s in shards if options.force or not whole(s, shapes=options.shapes)]
    job = partial(make_index, shapes=options.shapes)
    faults = [f for f in in_parallel(job, due, options.workers, "Indexing shards") if f]
    for fault in faults:
        print(fault, file=sys.stderr)
    made = len(due) - len(faults)
    print(f"{made:,} indexes made, {len(shards) - len(due):,} were there, {len(faults):,} failed.")
    return 1 if faults else 0


def make_index(shard: Path, shapes: bool) -> str | None:
    """Writes the index of one shard; returns what is wrong with the shard, or None."""
    from datamodules.fields import image_shape
    from datamodules.index import scan
    from scripts.shards.tars import index_path

    try:
        scan(shard, measure=image_shape if shapes else None).save(index_path(shard))
    except FewstepError as error:
        return str(error)
    return None

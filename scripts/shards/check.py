"""``fewstep shards check``: decodes everything and tells what is there and what is wrong."""

from __future__ import annotations

import argparse
import json
from functools import cache, partial
from pathlib import Path

from scripts.shards.parallel import default_workers, in_parallel

EPILOG = """\
Shards may be local or at http(s), s3, gs or hf addresses. The exit status is 1 if a record is
corrupt or there twice (by its key, or by the bytes of its image or video), so that a script can
stop there.

  fewstep shards check data/pets --sheet pets.png
  fewstep shards check 's3://bucket/laion/{00000..00127}.tar' --workers 16 --json laion.json
"""


def add_to(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = group.add_parser(
        "check",
        help="decode everything: statistics, corrupt records, duplicates, a contact sheet",
        description="Decode every part of every record and report on it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tars, folders of them, globs or {0..9} braces"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw a contact sheet, a PNG")
    parser.add_argument(
        "--pictures", type=int, default=64, metavar="N", help="on the sheet (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="(%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs the sub-command; 1 if anything is corrupt or there twice."""
    from datamodules.index import scan
    from datamodules.sources import Sources
    from scripts.shards.census import Census, clean, facts
    from scripts.shards.inspection import Task, inspect_shard
    from scripts.shards.printed import lines
    from scripts.shards.tars import all_or_nothing

    sources = Sources()
    shards = sources.expand(options.shards)
    counts = shared_out(options.pictures if options.sheet else 0, len(shards))
    tasks = [Task(shard, count) for shard, count in zip(shards, counts, strict=True)]
    census = Census()
    job = partial(inspect_shard, sources=sources)
    for found in in_parallel(job, tasks, options.workers, "Checking shards"):
        census.add(found)

    @cache
    def keys(shard: str) -> list[str]:
        return scan(sources.local(shard)).keys

    report = facts(census, lambda shard, number: keys(shard)[number])
    print("\n".join(lines(report)))
    if options.json:
        with all_or_nothing(options.json) as file:
            file.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    if options.sheet:
        from scripts.shards.sheet import draw_sheet

        print(f"Contact sheet: {draw_sheet(census.pictures, options.sheet)}")
    return 0 if clean(report) else 1


def shared_out(total: int, among: int) -> list[int]:
    """A number shared out as evenly as can be."""
    return [total * (n + 1) // among - total * n // among for n in range(among)]

"""``fewstep shards make``: shards from a folder, a table or a built-in data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError, nearest
from scripts.shards.parallel import default_workers, in_parallel

if TYPE_CHECKING:
    from scripts.shards.origins import Origin
    from scripts.shards.plan import Shard

EPILOG = """\
From a folder, every image or video becomes a record, together with the files that share its name:
cat.jpg, cat.txt (a caption), cat.json, cat.cls (a class label), cat.npy and so on. From a table,
every row does. Keys are the files' relative paths.

Records are shuffled unless --no-shuffle is given: sources are mostly sorted by class or origin, and
every shard should be a fair sample of the whole. The order, and which records are held out, depend
on hashes of the keys, so both are the same on any machine and the split stays as data grows.

  fewstep shards make data/pets --from ~/pictures/pets --labels folders --val-share 0.05
  fewstep shards make data/clips --from clips.parquet --caption-column caption --json-columns fps
  fewstep shards make data/moving --from moving-digits --num-clips 20000 --workers 8
"""
REMEDY = "Give the earlier settings to go on, or another DEST to begin anew."


def add_to(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the sub-command."""
    parser = group.add_parser(
        "make",
        help="shards from a folder of files, a table or a built-in data set",
        description="Write images or videos and what belongs to them as WebDataset shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the shards")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="a folder, a .csv or .parquet table, or one of: digits, moving-digits, "
        "moving-digits-watermarked, moving-digits-crisp",
    )
    add = parser.add_argument_group("shards").add_argument
    add("--prefix", default="train", help="of the shards' names (%(default)s)")
    add("--records-per-shard", type=int, default=1000, metavar="N", help="(%(default)s)")
    add("--val-share", type=float, default=0.0, metavar="X", help="held out as val-*.tar (0)")
    add("--shuffle", type=int, default=0, metavar="SEED", help="seed of the order (%(default)s)")
    add("--no-shuffle", action="store_true", help="write records in alphabetical order")
    add("--workers", type=int, default=default_workers(), help="processes (%(default)s)")
    add("--skip-missing", action="store_true", help="leave out records with missing files")
    add("--skip-large", action="store_true", help="leave out records with too large files")
    add = parser.add_argument_group("from a folder").add_argument
    add("--labels", choices=["folders"], help="make class labels of the first-level folders")
    add = parser.add_argument_group("from a table").add_argument
    add("--path-column", default="path", metavar="NAME", help="the files' paths (%(default)s)")
    add("--root", type=Path, help="what they are relative to (the table's folder)")
    add("--caption-column", metavar="NAME", help="becomes txt")
    add("--label-column", metavar="NAME", help="becomes cls; names are numbered")
    add("--json-columns", nargs="+", default=[], metavar="NAME", help="become json")
    add = parser.add_argument_group("moving digits").add_argument
    add("--num-clips", type=int, default=10_000, metavar="N", help="(%(default)s)")
    add("--num-held-out", type=int, default=512, metavar="N", help="val clips (%(default)s)")
    add("--seed", type=int, default=0, help="of everything drawn (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs the sub-command."""
    from datamodules.index import MAX_MEMBER_BYTES
    from scripts.shards.plan import arrange, check_keys, divide, look
    from scripts.shards.tars import agree, all_or_nothing, whole

    _check(options)
    origin = find_origin(options)
    if origin.ignored:
        print(f"{origin.ignored:,} files belong to no image or video, or are pickles: left out.")
    check_keys(origin.entries)
    origin.entries.sort(key=lambda entry: entry.key)
    entries, digest = look(
        origin.entries, options.skip_missing, options.skip_large, MAX_MEMBER_BYTES
    )
    splits = arrange(entries, None if options.no_shuffle else options.shuffle, options.val_share)
    shards = [
        shard
        for split, members in splits.items()
        for shard in divide(
            members, options.dest, _prefix(options, split), options.records_per_shard
        )
    ]
    agree(options.dest / "make.json", {**_settings(options), "contents": digest}, REMEDY)
    if origin.classes is not None:
        with all_or_nothing(options.dest / "classes.json") as file:
            file.write_text(json.dumps(origin.classes, ensure_ascii=False, indent=1) + "\n")
    due = [s for s in shards if not whole(s.path, len(s.entries), shapes=True)]
    for _ in in_parallel(write, due, options.workers, "Writing shards"):
        pass
    _tell(options.dest, splits, len(shards), len(shards) - len(due))
    return 0


def write(shard: Shard) -> None:
    """Writes one shard and its index.

    Raises:
        FewstepError: if a file went missing meanwhile.
    """
    from datamodules.fields import image_shape
    from scripts.shards.tars import write_shard

    records = ((entry.key, entry.parts()) for entry in shard.entries)
    try:
        write_shard(shard.path, records, image_shape)
    except OSError as error:
        raise FewstepError(f"Cannot write '{shard.path}': {error}") from error


def find_origin(options: argparse.Namespace) -> Origin:
    """The records that the options ask for.

    Raises:
        FewstepError: if there is no such source.
    """
    from scripts.shards.origins import BUILT_IN, Columns, from_built_in, from_folder, from_table

    if options.source in BUILT_IN:
        return from_built_in(options.source, options.num_clips, options.num_held_out, options.seed)
    path = Path(options.source).expanduser()
    if path.is_dir():
        return from_folder(path, options.labels == "folders")
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        columns = Columns(
            options.path_column,
            options.caption_column,
            options.label_column,
            tuple(options.json_columns),
        )
        return from_table(path, columns, options.root)
    raise FewstepError(
        f"'{options.source}' is neither a folder nor a .csv or .parquet file nor one of "
        f"{', '.join(BUILT_IN)}.{nearest(options.source, BUILT_IN)}"
    )


def _check(options: argparse.Namespace) -> None:
    from scripts.shards.origins import BUILT_IN

    if options.records_per_shard < 1 or options.workers < 1:
        raise FewstepError("--records-per-shard and --workers must be at least 1.")
    if not 0 <= options.val_share < 1:
        raise FewstepError(f"--val-share is a share from 0 to 1, not {options.val_share}.")
    if options.source in BUILT_IN and (options.val_share or options.labels):
        raise FewstepError(
            f"'{options.source}' has labels and a held-out split of its own; leave out --val-share "
            "and --labels."
        )
    if options.prefix == "val":
        raise FewstepError("The --prefix 'val' is that of held-out records; choose another.")


def _prefix(options: argparse.Namespace, split: str) -> str:
    return "val" if split == "val" else str(options.prefix)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides which records go where; ``contents`` stands for the records themselves."""
    named = ("source", "prefix", "records_per_shard", "val_share")
    settings = {name: getattr(options, name) for name in named}
    return {**settings, "shuffle": None if options.no_shuffle else options.shuffle}


def _tell(dest: Path, splits: Mapping[str, list[Any]], shards: int, before: int) -> None:
    counts = ", ".join(f"{len(found):,} {split}" for split, found in splits.items() if found)
    resumed = f" ({before:,} were there before)" if before else ""
    print(f"{counts} records in {shards:,} shards{resumed}: {dest}")

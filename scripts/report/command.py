"""``fewstep report``: one self-contained HTML page from any set of run folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write one self-contained HTML page that compares runs: leaderboard, what the numbers say, quality
against cost, pictures and clips over training, training curves, training cost, settings that
differ, protocol.
"""

EPILOG = """\
Folders are searched for runs, which are folders with a results.json: give one run, an experiment,
or all of runs/. Runs whose settings differ in nothing but the seed form one row, mean ± standard
deviation. The page needs no network and no other file, so it can be mailed as it is.

  fewstep report runs/
  fewstep report runs/digits/teacher runs/digits/pcm_4/version_2 --output pcm_4.html
  fewstep report runs/digits --tables tables/       # also CSV, Markdown and LaTeX
"""

MEGABYTES = 32.0
"""Of pictures, before base64 adds a third."""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep report``."""
    parser = argparse.ArgumentParser(
        prog="fewstep report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", metavar="RUN_FOLDER", type=Path, nargs="+", help="where to look for runs"
    )
    parser.add_argument(
        "--output", type=Path, help="the page's file; report.html in the first folder by default"
    )
    parser.add_argument("--title", default="fewstep report", help="the page's heading")
    parser.add_argument(
        "--tables", metavar="FOLDER", type=Path, help="write every table there as .csv, .md, .tex"
    )
    parser.add_argument(
        "--max-megabytes",
        metavar="N",
        type=float,
        default=MEGABYTES,
        help="pictures and clips beyond this are made smaller and fewer, and the page says so "
        "(default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    output = options.output or options.folders[0] / "report.html"
    print(
        "Report:",
        build_report(options.folders, output, options.title, options.tables, options.max_megabytes),
    )
    if options.tables is not None:
        print(f"Tables: {options.tables}")


def build_report(
    folders: Sequence[Path],
    output: Path,
    title: str = "fewstep report",
    tables: Path | None = None,
    max_megabytes: float = MEGABYTES,
) -> Path:
    """Writes the page of all runs below some folders.

    Args:
        folders: searched recursively; runs appear in this order.
        output: the page's file; its folder is made if need be.
        title: the page's heading.
        tables: a folder for the tables as CSV, Markdown and LaTeX; None writes none.
        max_megabytes: of pictures and clips; more are made smaller, then fewer.

    Returns:
        ``output``.

    Raises:
        FewstepError: if there is no run, or none that can be read.
    """
    # Reading results needs torch; it waits until here, so that --help answers at once.
    from scripts.report.data import collect
    from scripts.report.export import write_tables
    from scripts.report.page import compile_report, render

    report = compile_report(collect(folders))
    page = render(report, title, round(max_megabytes * 1e6))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)
    if tables is not None:
        write_tables(report.tables, tables)
    return output

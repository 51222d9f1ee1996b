"""``fewstep report``: one self-contained HTML page from any set of run folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
Folders are searched for runs, which are folders with a results.json: give one run, an experiment,
or all of runs/. The page needs no network and no other file, so it can be mailed as it is.

  fewstep report runs/digits
  fewstep report runs/digits/teacher runs/digits/pcm_4/version_2 --output pcm_4.html
"""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep report``."""
    parser = argparse.ArgumentParser(
        prog="fewstep report",
        description="Write one self-contained HTML page that compares runs: leaderboard, what the "
        "numbers say, quality against cost, training curves, sample pictures, protocol.",
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
    options = parser.parse_args(arguments)
    output = options.output or options.folders[0] / "report.html"
    print(f"Report: {build_report(options.folders, output, options.title)}")


def build_report(folders: Sequence[Path], output: Path, title: str = "fewstep report") -> Path:
    """Writes the page of all runs below some folders.

    Args:
        folders: searched recursively; runs appear in this order.
        output: the page's file; its folder is made if need be.
        title: the page's heading.

    Returns:
        ``output``.

    Raises:
        FewstepError: if there is no run, or none that can be read.
    """
    # Reading results needs torch; it waits until here, so that --help answers at once.
    from scripts.report.data import collect
    from scripts.report.page import render

    page = render(collect(folders), title)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)
    return output

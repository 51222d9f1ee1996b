"""``fewstep guidance``: its help, and how an experiment becomes a search."""

from __future__ import annotations

from typing import Any

from fewstep.errors import FewstepError, nearest

HELP = """\
usage: fewstep guidance search -c EXPERIMENT [options]

Tunes training-free guidance: multiplies the strength of an experiment's steering step by step, and
keeps the best by the word of a tuner, a network that is neither the guide nor the judge of the
results. With the same options every method gets the same effort.

  -c EXPERIMENT        one that is steered, such as guidance/digits/few_polyak; every key of it can
                       be overridden, such as --model.init_args.start runs/digits/lcm
  --trials N           settings to try, the same for every method (6)
  --num_samples N      samples of each at each number of steps, from the same noise (128)
  --steps K [K ...]    sampling steps; the score is the mean over them (the experiment's)
  --begin B            the first setting is B times the experiment's numbers (0.25) ...
  --factor F           ... and the next ones F times the one before (2; smoothing.scale 10)
  --knobs A,B          which numbers: fields of the guidance, such as state.rule.strength,
                       smoothing.scale, recurrence.count, or of optimised noise, such as
                       rule.radius; all strengths by default. One is searched along a line, several
                       by TFG's greedy beam, from --begin times the experiment's numbers
  --max_distance R     a setting whose samples are more than R times as far from the nearest data as
                       unguided samples, at any number of steps, cannot win
  --tuner.class_path C --tuner.init_args.X ...   a fewstep.guidance.Judge. By default that of the
                       folder's search.yaml, where --max_distance and the others can stand too
  --seed S             of the noise, which no evaluation starts from (1000)
  --name NAME          folder of the search below runs/EXPERIMENT/search; by default the steps'

Every trial is kept in trials.jsonl as it is made: the same command goes on where it was stopped.
At the end best.yaml holds the winning numbers:

  fewstep guidance search -c guidance/digits/few_polyak --knobs state.radius --steps 1 4
  fewstep evaluate -c guidance/digits/few_polyak \\
      -c runs/guidance/digits/few_polyak/search/1_4_steps/best.yaml --steps 1 4
"""


def main(arguments: list[str]) -> None:
    """Runs ``fewstep guidance``.

    Raises:
        FewstepError: for what the user can mend.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return
    if arguments[0] != "search":
        raise FewstepError(
            f"`fewstep guidance` has one action, search, not '{arguments[0]}'."
            f"{nearest(arguments[0], ['search'])} `fewstep guidance --help` tells more."
        )
    # Networks need torch; it waits until here, so that --help answers at once.
    search_command(arguments)


def search_command(arguments: list[str]) -> Any:
    """Runs one search in this process; what goes wrong is raised."""
    from scripts.guidance.cli import SearchCLI, with_search_files

    return SearchCLI(with_search_files(arguments))

"""``fewstep suite``: a matrix of experiments, here or on a cluster, that ends in a report."""

from __future__ import annotations

from pathlib import Path

from scripts.suite.options import parse_arguments


def main(arguments: list[str]) -> None:
    """Runs ``fewstep suite``.

    Raises:
        FewstepError: for what the user can mend, before anything runs; and at the end, if runs
            have failed.
    """
    options, cluster = parse_arguments(arguments)
    from scripts.suite import command
    from scripts.suite.summary import report

    if options.task is not None and not options.task.isdigit():
        command.run_folder(Path(options.task))
        return
    plan = command.plan_of(options)
    if options.report_only:
        report(plan)
    elif options.task is not None:
        command.run_task(plan, int(options.task))
    elif options.submit:
        command.submit_plan(plan, cluster, options.at_once)
    else:
        command.run_here(plan, options.dry_run, options.stop_on_failure)

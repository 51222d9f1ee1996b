"""``fewstep submit``: training on a SLURM cluster, requeued and resumed when it is preempted."""

from __future__ import annotations

from scripts.slurm.options import parse_arguments


def main(arguments: list[str]) -> None:
    """Runs ``fewstep submit``.

    Raises:
        FewstepError: for what the user can mend; nothing has been submitted then.
    """
    options, fit_arguments = parse_arguments(arguments)
    if options.status is not None:
        from scripts.slurm.status import print_status

        print_status(options.status)
        return
    from scripts.slurm.submit import submit

    submit(options, fit_arguments)

#!/bin/bash
# Written by `fewstep submit`; `sbatch` takes it again as it is.
{{directives}}

{{run}}
rm -f "$run/PREEMPT" "$run/slurm/exit"

# SLURM signals this shell alone, {{signal_before}} s before it takes the nodes away. The first rank
# finds the file; then all ranks save after the same update, and the first leaves with status 75.
trap 'touch "$run/PREEMPT"' USR1

{{setup}}
# A job that comes back goes on from the run's newest checkpoint.
{{checkpoint}}

# In the background, since a shell handles no signal while it waits for a command before it.
# --wait: when one rank has left, the others have a minute to follow.
{{launch}} \
  {{command}} &
training=$!
while kill -0 "$training" 2>/dev/null; do
  wait "$training" # returns early when the signal comes
done
wait "$training" # the shell remembers the status
status=$?
echo "$status" >"$run/slurm/exit"

if [ "$status" -eq 75 ]; then
  echo "$(date -Is) saved in time; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

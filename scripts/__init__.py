"""The commands; `fewstep` is their front door."""

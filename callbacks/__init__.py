"""Callbacks; they know a method only by ``sample`` and ``decode`` and so work with all of them."""

from callbacks.alarms import Alarms
from callbacks.checkpoints import Checkpoints
from callbacks.console import Progress
from callbacks.evaluation import Evaluation
from callbacks.finite import FiniteLosses
from callbacks.gates import GateReport
from callbacks.preemption import Preempted, Preemption
from callbacks.samples import Samples
from callbacks.sensitivity import Sensitivity
from callbacks.throughput import Throughput

__all__ = [
    "Alarms",
    "Checkpoints",
    "Evaluation",
    "FiniteLosses",
    "GateReport",
    "Preempted",
    "Preemption",
    "Progress",
    "Samples",
    "Sensitivity",
    "Throughput",
]

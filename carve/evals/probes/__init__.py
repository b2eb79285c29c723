"""Probes: small tasks, generated from seeds, that show what a memory can do."""

from carve.evals.probes.tasks import TASKS, Batch, Task, make_task
from carve.evals.probes.training import ProbeScore, probe_config, train_probe

__all__ = ["TASKS", "Batch", "ProbeScore", "Task", "make_task", "probe_config", "train_probe"]

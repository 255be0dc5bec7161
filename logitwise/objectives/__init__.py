"""The objectives: one file each, one interface (`base.Objective`)."""

from logitwise.objectives.base import Objective
from logitwise.objectives.lfq import LogitAware
from logitwise.objectives.mse import MeanSquaredError

OBJECTIVES: dict[str, Objective] = {"lfq": LogitAware(), "mse": MeanSquaredError()}

__all__ = ["OBJECTIVES", "Objective"]

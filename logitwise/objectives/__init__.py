"""The objectives: one file each, one interface (`base.Objective`)."""

from logitwise.objectives.base import Objective, Taps
from logitwise.objectives.hard_labels import HardLabels
from logitwise.objectives.lfq import LogitAware
from logitwise.objectives.logit_mse import LogitMeanSquaredError
from logitwise.objectives.mixed import Mixed
from logitwise.objectives.mse import MeanSquaredError
from logitwise.objectives.teacher_argmax import TeacherArgmax
from logitwise.objectives.topk import TopK

OBJECTIVES: dict[str, type[Objective]] = {
    "lfq": LogitAware,
    "mse": MeanSquaredError,
    "logit_mse": LogitMeanSquaredError,
    "hard_labels": HardLabels,
    "teacher_argmax": TeacherArgmax,
    "topk": TopK,
    "mixed": Mixed,
}

__all__ = ["OBJECTIVES", "Objective", "Taps"]

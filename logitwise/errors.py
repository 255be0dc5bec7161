"""Every error that logitwise raises for a reason a user can act on.

LogitwiseError                 what happened, why, what to do; an exit code
├── InputError          (2)    refused before any work; nothing was written
│   ├── SourceError            the model: missing, corrupt, unsupported
│   ├── RecipeError            an option: unknown, out of range, at odds with another
│   ├── CalibrationError       the calibration text: missing, empty, too short
│   ├── FormatError            the checkpoint format cannot hold what is asked
│   └── OutputError            the place where the result should go
├── MachineError        (1)    memory, disk or a process failed; run the same command again
└── UnmetError          (3)    finished, but something asked for was not met (--strict)
"""


class LogitwiseError(Exception):
    """One problem in three sentences.

    Args:
        what: what was refused or failed, naming the tensor, file, layer or key.
        why: the reason, with the values that were found.
        remedy: the next step for the user.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(f"{what}\n  why:  {why}\n  do:   {remedy}")
        self.what, self.why, self.remedy = what, why, remedy


class InputError(LogitwiseError):
    """Input that is refused before any work; nothing was written."""

    exit_code = 2


class SourceError(InputError):
    """The model cannot be read, or is not one that can be quantized."""


class RecipeError(InputError):
    """An option or recipe key is unknown, out of range or at odds with another."""


class CalibrationError(InputError):
    """The calibration text is missing, unreadable or too short."""


class FormatError(InputError):
    """The checkpoint format cannot hold what is asked of it, or a file is not of that format."""


class OutputError(InputError):
    """The output folder cannot be used."""


class MachineError(LogitwiseError):
    """The machine failed (memory, disk); the work can be resumed."""

    exit_code = 1


class UnmetError(LogitwiseError):
    """The work finished, but something asked for was not met: under --strict, or a refit that gained nothing."""

    exit_code = 3

"""Adafactor as transformers computes it, compiled."""

from adafactor_compiled.adafactor import Adafactor
from adafactor_compiled.schedule import AdafactorSchedule, get_adafactor_schedule
from adafactor_compiled.step_in_backward import StepInBackward

__version__ = "0.1.0"

__all__ = ["Adafactor", "AdafactorSchedule", "StepInBackward", "__version__", "get_adafactor_schedule"]

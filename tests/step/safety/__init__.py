"""What may happen to parameters, gradients and state between two steps, and around one: see test_safety.py, which runs this.

A case steps an optimizer of one path, and compares it with the reference path on plain copies; or it sees an error, and that
nothing has changed.
"""

from safety import dtypes, forks, gradients, modes, state, threads
from safety.cases import CASES

__all__ = ["CASES", "dtypes", "forks", "gradients", "modes", "state", "threads"]

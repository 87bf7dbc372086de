"""The keys of a parameter group that are not options: which of them were meant to be one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from adafactor_compiled._state.options import OPTIONS

# What others call it.
ALIASES = {
    "learningrate": "lr",
    "learnrate": "lr",
    "lrate": "lr",
    "lrs": "lr",
    "epsilon": "eps",
    "eps1": "eps",
    "eps2": "eps",
    "wd": "weight_decay",
    "scaleparam": "scale_parameter",
    "caution": "cautious",
    "mindimsize": "min_dim_size_to_factor",
}
CLOSE = 0.86  # of 1: one letter in seven may be another


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


MEANT = {_letters(option): option for option in OPTIONS} | ALIASES


def option_meant(key: object) -> str | None:
    """The option that a key of a group is a misspelling of; None for an option, and for a name of its own.

    Torch, its schedulers, loggers and trainers keep what they like in a group: `name`, `initial_lr`, `rank`. An option with
    words added, as in `weight_decay_mult`, is a name of its own too.
    """
    if not isinstance(key, str) or key in OPTIONS:
        return None
    letters = _letters(key)
    close = difflib.get_close_matches(letters, MEANT, 1, CLOSE)
    meant = MEANT[close[0]] if close else None
    return None if letters not in MEANT and f"_{meant}_" in f"_{key}_" else meant


def check_names(keys: Iterable[object]) -> None:
    """Raise ValueError for a misspelled option, which would be ignored."""
    for key in keys:
        option = option_meant(key)
        if option is not None:
            raise ValueError(
                f"unknown key in a parameter group: {key!r}, which is close to `{option}`; name the option so, or a key of "
                "your own otherwise"
            )

"""Random numbers that can be drawn again: each is a pure function of (seed, row, view).

The teachers' answers are computed once per view and kept; the student must later see exactly the same input (a
"consistent" teacher, Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent"). So no
generator with a state is used, and a row's view depends neither on its batch nor on the process that draws it.
"""

import numpy as np
from torch import Tensor

from hf_hpmkd.tasks.base import UNAUGMENTED

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the result depends on every bit of x. Wraps
    modulo 2^64.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """Uniform numbers per row, one stream per purpose; `active` marks the rows that are to be augmented at all."""

    def __init__(self, seed: int, rows: Tensor, views: Tensor) -> None:
        view_numbers = np.asarray(views, dtype=np.int64)
        self.active = view_numbers != UNAUGMENTED
        state = _mix(np.asarray([seed], dtype=np.uint64) + _GOLDEN)
        state = _mix((state ^ np.asarray(rows, dtype=np.int64).astype(np.uint64)) + _GOLDEN)
        self._state = _mix((state ^ view_numbers.astype(np.uint64)) + _GOLDEN)

    def only(self, members: np.ndarray) -> "Draws":
        part = object.__new__(Draws)
        part.active, part._state = self.active[members], self._state[members]
        return part

    def uniform(self, stream: int) -> np.ndarray:
        """float64 in [0, 1), `(batch,)`."""
        return self.uniforms(stream, 1)[:, 0]

    def uniforms(self, first: int, count: int) -> np.ndarray:
        """So many streams from `first` on side by side, `(batch, count)`."""
        streams = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        mixed = _mix(self._state[:, None] + streams * _GOLDEN)
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def flip(self, stream: int) -> np.ndarray:
        return (self.uniform(stream) < 0.5) & self.active

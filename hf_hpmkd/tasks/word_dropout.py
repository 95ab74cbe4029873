"""Texts with some of their words left out, which can be replayed: the same seed, row and view give the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_hpmkd.tasks.draws import Draws

_AT_ONCE = 256  # rows, as a number is drawn for every word of the longest
_MOST_WORDS = 2**32  # of a first text; the draws for the second one begin there

REVISION = 1  # enters the cache key: raise it when the text of a view changes


@dataclass(frozen=True)
class WordDropout:
    """How a training text is varied: each word, which is what stands between white space, is left out with probability
    `rate` (Iyyer et al. 2015). seed: another seed, other views.

    It may change what a text says. Teachers answer what is left of it; a label is of the whole (`Rows.keeps_labels`).
    Raises ValueError for a rate outside 0 to 1, both excluded, or a negative seed.
    """

    rate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"`rate` must lie between 0 and 1, both excluded, got {self.rate}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more, got {self.seed}.")

    def describe(self) -> dict[str, Any]:
        """What decides the text of a view."""
        return {"policy": "word_dropout", "rate": self.rate, "seed": self.seed, "revision": REVISION}


def drop_words(texts: Sequence[str], rows: Tensor, views: Tensor, how: WordDropout, second: bool = False) -> list[str]:
    """The given view of each text, its words joined by single spaces. rows, views: `(batch,)`; a view of -1
    (UNAUGMENTED) passes the text unchanged, and so is one passed of which no word would be left. second: these are the
    second texts of pairs, for which other words are drawn.
    """
    first_draw = _MOST_WORDS if second else 0
    results: list[str] = []
    for first in range(0, len(texts), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        draw = Draws(how.seed, rows[part], views[part])
        split = [text.split() for text in texts[part]]
        kept = draw.uniforms(first_draw, max(map(len, split))) >= how.rate
        for text, words, keep, active in zip(texts[part], split, kept, draw.active, strict=True):
            left = [word for word, stays in zip(words, keep, strict=False) if stays] if active else []
            results.append(" ".join(left) if left else text)
    return results

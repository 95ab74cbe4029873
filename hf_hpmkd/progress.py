"""Progress bars of long work: as usual in a terminal or notebook, a line now and then where output goes to a file."""

import sys
from typing import Any

from tqdm.asyncio import tqdm as plain_tqdm
from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0
"""In a file, which keeps every state of a bar as a line."""


def progress_bar(*, shown: bool = True, passing: bool = False, **options: Any) -> tqdm:
    """A bar of tqdm's with these options. shown: False draws nothing. passing: of short work inside longer work,
    cleared when done and left out of files.
    """
    live = tqdm is not plain_tqdm or sys.stderr.isatty()  # somebody sees it move, in a notebook or a terminal
    options |= {"leave": not passing, "disable": not shown or (passing and not live)}
    if not live:
        options |= {"mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
    return tqdm(**options)

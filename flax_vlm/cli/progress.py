"""The bar of a long transfer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_vlm.convert.stream import Progress


@contextmanager
def progress_bar(hidden: bool) -> Iterator[Callable[["Progress"], None]]:
    """Bytes, rate, time left and the current tensor, on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, disable=hidden or None) as bar:

        def show(progress: "Progress") -> None:
            if bar.total is None:  # what a killed run left counts as there, not as fast
                bar.total, bar.initial = progress.total, progress.resumed
            bar.set_postfix_str(progress.tensor, refresh=False)
            bar.update(progress.done - bar.n)

        yield show

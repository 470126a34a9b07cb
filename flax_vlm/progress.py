"""The bar of what takes a while, on stderr."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_vlm.convert.stream import Progress


def bar(title: str = "", total: int | None = None, *, hidden: bool | None = None, **options: Any) -> Any:
    """Of bytes, to be used in `with`; `hidden` None shows it where a person looks on: on a terminal, in a notebook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of letters
        from tqdm.auto import tqdm
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=hidden, **options)


@contextmanager
def conversion_bar(title: str = "", hidden: bool | None = None) -> Iterator[Callable[["Progress"], None]]:
    """Bytes, rate, time left and the current tensor of a conversion, which takes what this gives as `progress`."""
    with bar(title, hidden=hidden, leave=False) as tqdm:

        def show(progress: "Progress") -> None:
            if tqdm.total is None:  # what a killed run left counts as there, not as fast
                tqdm.total, tqdm.initial = progress.total, progress.resumed
            tqdm.set_postfix_str(progress.tensor, refresh=False)
            tqdm.update(progress.done - tqdm.n)

        yield show

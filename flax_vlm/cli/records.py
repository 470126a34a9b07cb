"""The command for people who bring data to train on."""

from pathlib import Path

import tyro

from .app import app


@app.command
def records(
    paths: tyro.conf.Positional[tuple[Path, ...]],
    /,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Put records, with their pictures, into one ArrayRecord file, of which any part is read as fast as the next.

    Until it is whole, there is no target.

    Args:
        paths: What to read (.tar of webdataset, .parquet, .jsonl, .array_record), and last the .array_record to write.
        overwrite: Replace a file that is there.
        quiet: No progress bar, and no word at the end.
    """
    from tqdm import tqdm

    from flax_vlm.training.data import webdataset
    from flax_vlm.training.data.records import ENDING, read, write

    *sources, target = paths or (Path(),)
    if not sources or target.suffix != ENDING:
        raise ValueError(f"expected what to read and then the {ENDING} to write, got {' '.join(map(str, paths))}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already. Pass --overwrite to replace it")
    parts = [webdataset.samples(source) if webdataset.is_tar(source) else read(source) for source in sources]
    with tqdm((record for part in parts for record in part), unit=" records", disable=quiet or None) as found:
        number = write(found, target)
    if not quiet:
        print(f"{' '.join(map(str, sources))} -> {target}: {number} records, {target.stat().st_size / 1e9:.2f} GB")

"""Commands for people who want to know what a checkpoint holds, and whether two hold the same."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from flax_vlm.progress import conversion_bar

from .app import app

if TYPE_CHECKING:
    from flax_vlm.convert.inspection import Inspection, Module

FILES = 4  # that are named; --json names all
WIDE = 200  # columns, where no terminal says how many there are
_NUMBERED = re.compile("(|.*_)(0|[1-9][0-9]{0,8})")  # layers_7, 7; not fc1, which is not one of many alike


@app.command
def inspect(
    path: tyro.conf.Positional[Path],
    /,
    diff: Path | None = None,
    depth: int | None = None,
    hashes: bool = False,
    json: bool = False,
) -> None:
    """Show what is in a checkpoint, without loading it: config, tensors, totals by module, where it came from.

    Args:
        path: A checkpoint, native or PyTorch.
        diff: Another one: show what differs instead. Exit code 1 where something does.
        depth: How many levels of modules to show, 0 for none; all by default.
        hashes: Show the SHA-256 of each parameter, of its bytes in PyTorch's layout. Repeated layers are then not
            folded into one.
        json: Print everything as JSON.
    """
    from flax_vlm.convert import inspection

    if depth is not None and depth < 0:
        raise ValueError(f"--depth {depth}: expected how many levels to show, 0 for none")
    found = inspection.inspect(path)
    if diff is not None:
        comparison = inspection.compare(found, inspection.inspect(diff))
        print(dumps(comparison.to_json(), indent=2) if json else comparison.report())
        if not comparison.equal:
            sys.exit(1)
    elif json:
        print(dumps(found.to_json(depth), indent=2))
    else:
        _print_inspection(found, depth, hashes)


@app.command
def verify(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[str | None] = None,
    /,
    forward: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Compare every parameter of two checkpoints bit for bit, or of one with the hashes it was converted with.

    Exit code 1 where something differs. Where dtypes differ, the source is cast to the target's first.

    Args:
        source: A checkpoint, PyTorch or native: a folder, or a repository on the Hub.
        target: Another one, or a part of it (a tower). Without it, the hashes in conversion.json are computed again.
        forward: Also run both on a fixed input, the PyTorch side by transformers, and compare the outputs.
        json: Print everything as JSON.
        quiet: No progress bar, and no word where nothing differs.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator has no part in this
    from flax_vlm.convert import verification
    from flax_vlm.hub import local_folder

    folders = [local_folder(each) for each in (source, target) if each is not None]
    with conversion_bar(hidden=quiet or json or None) as progress:
        found = verification.verify(*folders, forward=forward, progress=progress)
    if json:
        print(dumps(found.to_json(), indent=2))
    elif not (quiet and found.equal):
        print(found.report())
    if not found.equal:
        sys.exit(1)


def _print_inspection(found: "Inspection", depth: int | None, hashes: bool) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    # What is printed comes from files: it is no markup.
    console = Console(width=None if sys.stdout.isatty() else WIDE, markup=False, emoji=False, highlight=False)
    total = f"{len(found.tensors):,} tensors, {found.tree.size:,} parameters, {decimal(found.tree.nbytes)}"
    console.print(f"{found.path}: {found.kind}, {total}")
    console.print("dtypes: " + ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items()))
    console.print(f"files: {_files(found.files)}")
    if found.provenance:
        source, dtype = found.provenance["source"], found.provenance.get("dtype")
        how = f"by flax_vlm {found.provenance.get('flax_vlm')} from {source.get('folder')}"
        cast = f", cast to {dtype}" if dtype else ""
        console.print(_printable(f"converted {how}{cast}: {_files(source['files'])}"))
    console.print()
    for line in _config(found.config) if found.config else ["no config.json"]:
        console.print(line)
    if depth == 0:
        return
    console.print()

    table = Table("", "shape", "dtype", box=None, pad_edge=False, header_style="dim")
    table.add_column("parameters", justify="right")
    table.add_column("bytes", justify="right")
    for column in table.columns:
        column.overflow = "fold"
    shown = found.hashes() if hashes else None
    if hashes:
        table.add_column("sha256", overflow="fold")
    for row in _rows(found.tree, depth, shown):
        table.add_row(*row)
    console.print(table)


def _rows(
    module: "Module", depth: int | None, hashes: Mapping[str, str] | None, guide: str = ""
) -> Iterator[tuple[str, ...]]:
    """What stands below `module`, a line each, drawn as a tree."""
    from rich.filesize import decimal

    if depth == 0:
        return
    runs = _runs(module.children, fold=hashes is None)
    for i, (label, child, times) in enumerate(runs):
        corner, below = ("└─ ", "   ") if i == len(runs) - 1 else ("├─ ", "│  ")
        tensor = child.tensor
        shape = str(list(tensor.shape)) if tensor else f"{times} alike" if times > 1 else ""
        dtype = tensor.dtype.name if tensor else ""
        cells = (guide + corner + label, shape, dtype, f"{child.size * times:,}", decimal(child.nbytes * times))
        yield cells if hashes is None else (*cells, hashes.get(child.name, ""))
        yield from _rows(child, depth and depth - 1, hashes, guide + below)


def _runs(children: Mapping[str, "Module"], fold: bool) -> list[tuple[str, "Module", int]]:
    """Labels, modules and how many each stands for: equal ones whose numbers follow each other are one."""
    runs: list[tuple[str, list[int], Module]] = []
    for name in sorted(children, key=_natural):
        stem, number = _natural(name)
        if fold and runs and number > 0:
            before, numbers, module = runs[-1]
            if before == stem and numbers[-1] == number - 1 and module.contents == children[name].contents:
                numbers.append(number)
                continue
        runs.append((stem, [number], children[name]))
    return [(_label(stem, numbers), module, len(numbers)) for stem, numbers, module in runs]


def _natural(name: str) -> tuple[str, int]:
    """layers_10 as ("layers_", 10), so that it follows layers_9; a name without a number has -1."""
    numbered = _NUMBERED.fullmatch(name)
    return (numbered[1], int(numbered[2])) if numbered else (name, -1)


def _label(stem: str, numbers: list[int]) -> str:
    if len(numbers) > 1:
        stem += f"{{{numbers[0]}..{numbers[-1]}}}"
    elif numbers[0] >= 0:
        stem += str(numbers[0])
    return _printable(stem)


def _printable(text: str) -> str:
    """A name out of a file, without what a terminal would take for commands."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _files(sizes: Mapping[str, int]) -> str:
    """The first few files."""
    from rich.filesize import decimal

    named = [f"{_printable(name)} {decimal(size)}" for name, size in sizes.items()]
    return ", ".join(named[:FILES]) + (f" and {len(named) - FILES:,} more" if len(named) > FILES else "")


def _config(config: Mapping[str, Any], title: str = "config.json") -> Iterator[str]:
    """A paragraph for each object of a config.json."""
    own = [f"{key} {dumps(value)}" for key, value in config.items() if not isinstance(value, dict)]
    yield _printable(f"{title}: {', '.join(own)}")
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _config(value, f"{title} {key}")

"""The command for people who are about to rent TPUs: does it fit, and how fast can it be?"""

import dataclasses
import os
import sys
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from .app import app

if TYPE_CHECKING:
    from .programs import Draft

PRESETS = Path(__file__).parent / "presets"
Remat = Literal["none", "full", "dots", "dots_no_batch"]
WIDE = 160  # columns, where no terminal says how many there are
TRIES = 4  # programs that are compiled to find one that fits


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be changed to make a program fit; what costs least stands first."""

    fsdp: int
    accumulate: int
    remat: Remat
    batch: int

    def __str__(self) -> str:
        return f"--fsdp {self.fsdp} --accumulate {self.accumulate} --remat {self.remat} --batch {self.batch}"


@app.command
def plan(
    model: tyro.conf.Positional[str],
    /,
    topology: str,
    train: bool = False,
    generate: bool = False,
    batch: int = 64,
    seq: int = 1024,
    images: int = 1,
    new_tokens: int = 128,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    slices: int = 1,
    rules: Literal["replicated", "fsdp", "fsdp_tensor"] | None = None,
    remat: Remat = "full",
    accumulate: int = 1,
    vocab_chunk: int = 8192,
    scan_layers: bool | None = None,
    suggest: bool = True,
    quick: bool = False,
    json: bool = False,
) -> None:
    """Compile a step of training, or a generation, for TPUs that are not here, and say what it needs. Nothing is run.

    Bytes are what the TPU's own compiler places in the memory of a chip. Activations are, of its temporaries, what the
    forward pass keeps for the backward pass, counted before the program is compiled. FLOPs are those of the matrix
    products, forward and backward, without what is computed twice to save memory (about 6 a parameter and token, and
    attention); the roofline is the time of the part of a chip that has most to do, if all else hides behind it. Exit
    code 1 where the program does not fit.

    Args:
        model: A checkpoint's folder, of which only config.json is read, or altclip, glm-4v-9b, idefics-9b, idefics-80b.
        topology: The TPUs: v5e:8x8, v5p:4x4x4, v6e:16x16.
        train: Plan a step of training: AdamW, float32 parameters and bfloat16 computation. This is the default.
        generate: Plan a generation: the reading of the prompts, and a token for each; parameters in bfloat16.
        batch: Rows, on all chips together.
        seq: Tokens of a row; of the prompt, for a generation.
        images: Pictures of a row.
        new_tokens: The longest answer, for a generation.
        data: Ways to split the batch alone.
        fsdp: Ways to split parameters and batch; -1 is what --data and --tensor leave.
        tensor: Ways to split heads and feed-forward width.
        slices: Slices of a pod, of that topology each, which --data spans.
        rules: What the axes split; by default fsdp, or fsdp_tensor with --tensor.
        remat: What the backward pass computes again rather than keep.
        accumulate: Parts in which a batch is computed, one after the other.
        vocab_chunk: Words at a time in the loss of a language model; 0 is all.
        scan_layers: Run the layers as a scan; by default in training only.
        suggest: Where it does not fit, look for the nearest setting that does.
        quick: Compile with the least effort, several times as fast; the figures come out a little different.
        json: Print everything as JSON.
    """
    if train and generate:
        raise ValueError("--train and --generate came: expected one of them")
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here has no part in this
    from flax_vlm import parallel
    from flax_vlm.models import registry
    from flax_vlm.parallel import aot

    from . import programs

    found = read_model(model)
    config = registry.read_config(found)
    rules = rules or ("fsdp_tensor" if tensor > 1 else "fsdp")
    chips = aot.devices(topology, slices)
    ways = parallel.make_mesh(data, fsdp, tensor, slices=slices, devices=chips).shape
    load = programs.Load(
        batch=batch,
        seq=seq,
        images=images,
        new_tokens=new_tokens,
        remat=remat,
        scan_layers=not generate if scan_layers is None else scan_layers,
        accumulate=accumulate,
        vocab_chunk=vocab_chunk,
    )

    def compiled(setting: Setting) -> list[dict[str, Any]]:
        mesh = parallel.make_mesh(-1, setting.fsdp, tensor, slices=slices, devices=chips)
        changed = {field: getattr(setting, field) for field in ("accumulate", "remat", "batch")}
        own = dataclasses.replace(load, **changed)
        module = programs.build(config, found.get("architectures"), "generate" if generate else "train", own)
        if not generate:
            return [describe("a step", programs.train_step(module, mesh, rules, own), mesh, rules, quick)]
        if not hasattr(module, "init_cache"):
            raise ValueError(f"{model} does not generate text: expected --train, or a model with a language head")
        names = "the prompts", "a token of each row"
        drafts = programs.generation(module, mesh, rules, own)
        return [describe(name, draft, mesh, rules, quick) for name, draft in zip(names, drafts, strict=True)]

    setting = Setting(ways["fsdp"], accumulate, remat, batch)
    rows = ways["data"] * ways["fsdp"]
    if batch % (rows * accumulate):
        raise ValueError(
            f"--batch {batch}: expected a multiple of {rows * accumulate}, as the mesh splits it {rows} ways and "
            f"--accumulate {accumulate}"
        )
    described = compiled(setting)
    fits = all(each["fits"] for each in described)
    nearest = None
    if not fits and suggest:
        smaller = smaller_settings(setting, rows, rows // slices, generate)
        nearest = next((each for each in smaller if all(made["fits"] for made in compiled(each))), None)
    result = {
        "model": model,
        "topology": topology,
        "chips": len(chips),
        "setting": dataclasses.asdict(setting) | {"tensor": tensor, "seq": seq, "images": images, "rules": rules},
        "programs": described,
        "suggestion": None if nearest is None else str(nearest),
    }
    print(dumps(result, indent=2)) if json else _print(result, suggest)
    if not fits:
        raise SystemExit(1)


def read_model(model: str) -> dict[str, Any]:
    """The config.json of a preset or of a checkpoint's folder."""
    preset = PRESETS / f"{model}.json"
    if preset.is_file():
        return loads(preset.read_text("utf-8"))
    if Path(model).is_dir():
        from flax_vlm import checkpoint

        return checkpoint.read_config(Path(model))
    known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
    raise ValueError(f"{model}: expected the folder of a checkpoint, or one of {known}")


def describe(name: str, draft: "Draft", mesh: Any, rules: str, quick: bool) -> dict[str, Any]:
    """Compiles a program: what it needs, as it is printed."""
    from flax_vlm.parallel import aot, hlo
    from flax_vlm.parallel.roofline import find_chip, roofline

    chip = find_chip(mesh.devices.flat[0].device_kind)
    known = {"program": name, "flops": draft.flops, "tokens": draft.tokens, "bytes": dict(draft.held)}
    try:
        program = aot.compile_for(mesh, rules, draft.jitted, *draft.arguments, quick=quick)
    except aot.DoesNotFit as error:
        return known | {"fits": False, "used": int(error.used), "available": int(error.available)}
    memory, sent = program.memory, hlo.by_kind(program.collectives)
    gathered = sum(each.nbytes * each.times for each in program.collectives if each.kind == "all-gather")
    # At least: all that goes in is read, what comes out or is kept is written (and read), as are gathered parameters.
    moved = memory.arguments + memory.results + 2 * memory.temporaries + 2 * gathered
    bound = roofline(chip, draft.flops / mesh.size, moved, sum(each[1] for each in sent.values()))
    activations = min(draft.activations, memory.temporaries)
    known["bytes"] |= {
        "activations": activations,
        "temporaries": memory.temporaries - activations,
        "outputs": memory.outputs,
    }
    return known | {
        "fits": True,
        "used": memory.total,
        "available": int(chip.memory),
        "collectives": {kind: {"count": count, "bytes": int(nbytes)} for kind, (count, nbytes) in sent.items()},
        "seconds": bound._asdict(),
        "binds": bound.binds,
        "compile_seconds": program.seconds,
    }


def smaller_settings(setting: Setting, rows: int, most_fsdp: int, generate: bool) -> list[Setting]:
    """A few that need less and less memory, the nearest first.

    Args:
      rows: ways in which the mesh splits a batch.
      most_fsdp: ways in which it can split parameters.
    """
    found = []
    if setting.fsdp < most_fsdp:
        found.append(setting := dataclasses.replace(setting, fsdp=most_fsdp))
    if not generate and setting.remat != "full":
        found.append(setting := dataclasses.replace(setting, remat="full"))
    while not generate and setting.batch % (2 * setting.accumulate * rows) == 0:
        found.append(setting := dataclasses.replace(setting, accumulate=2 * setting.accumulate))
    while generate and setting.batch % (2 * rows) == 0:
        found.append(setting := dataclasses.replace(setting, batch=setting.batch // 2))
    return found[:TRIES]


def _print(result: dict[str, Any], suggest: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    setting = ", ".join(f"{name} {value}" for name, value in result["setting"].items())
    table.add_row("model", f"{result['model']} on {result['topology']}, {result['chips']} chips")
    table.add_row("setting", setting)
    rows = result["setting"]["batch"]
    for each in result["programs"]:
        table.add_section()
        table.add_row("program", each["program"])
        verdict = "fits" if each["fits"] else "DOES NOT FIT"
        table.add_row("memory", f"{verdict}: {_size(each['used'])} of {_size(each['available'])} a chip")
        table.add_row("", ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in each["bytes"].items() if nbytes))
        table.add_row("FLOPs", f"{each['flops']:.3g}, {each['flops'] / rows:.3g} a row")
        if not each["fits"]:
            continue
        for kind, sent in each["collectives"].items():
            table.add_row(kind, f"{sent['count']:,} times, {_size(sent['bytes'])} sent by each chip")
        seconds = ", ".join(f"{part} {1e3 * time:.1f} ms" for part, time in each["seconds"].items())
        best = max(each["seconds"].values())
        table.add_row("roofline", f"{1e3 * best:.1f} ms, bound by {each['binds']} ({seconds})")
        table.add_row("", f"{rows / best:,.1f} rows/s, {each['tokens'] / best:,.0f} tokens/s at best")
        table.add_row("compiled in", f"{each['compile_seconds']:.0f} s")
    console = Console(width=None if sys.stdout.isatty() else WIDE, markup=False, highlight=False)
    console.print(table)
    if not all(each["fits"] for each in result["programs"]) and suggest:
        found = result["suggestion"]
        console.print(f"this fits: {found}" if found else "nothing near that fits was found: take more or larger chips")


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"

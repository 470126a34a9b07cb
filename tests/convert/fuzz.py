"""Seeded damage to the files of a small checkpoint: what bad disks, bad tools and bad people do to them.

`damage(folder, seed)` does one such thing, the same one for the same seed, and says in a line what it was.
"""

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors.numpy import save_file

from flax_vlm import convert
from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel
from tests.parity import altclip_cases as cases

CONFIG = replace(
    cases.WHOLE,
    text_config=replace(cases.TEXT, num_hidden_layers=2),
    vision_config=replace(cases.VISION, num_hidden_layers=1),
)
INDEX = "model.safetensors.index.json"

NASTY_SIZES = [0, -1, -3, 1, 2**15, 2**31, 2**53 + 1, 2**63, 10**30, 1.5, True, None, "2", [], {}]
NASTY = [
    *NASTY_SIZES,
    *(float("nan"), float("inf"), -float("inf"), 1e400, 1e300, 10**400, 0.0, -0.5, False),
    *("", "gelu", "softsign", "\0", "\ud800", "\x1b[31m", "a" * 9999, "12", "../../etc/passwd"),
    *([1], [2, 2], [[1], [1]], {"0": [0]}, {"0": [9]}, {"x": 1}, {"1": [0, 0]}, {"0": [1, "a"]}, {"hidden_size": 3}),
    *(["AltCLIPTextModel"], ["AltCLIPModel"], "altclip", "altclip_text_model", "altclip_vision_model"),
]
_NASTY_FILES = ["", ".", "..", "/etc/passwd", "../model.safetensors", "..\\x", "C:x", "gone.safetensors", "a\0b", INDEX]
_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "U16"]


def write_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints to be damaged, in one file and in two with an index."""
    rng = np.random.default_rng(0)
    shapes = flatten_params(nn.meta.unbox(abstract_params(AltCLIPModel(CONFIG))))
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    state = convert.state_dict(CONFIG, unflatten_params(params))
    state = {name: np.array(tensor, order="C") for name, tensor in state.items()}
    config = json.dumps(CONFIG.to_hf() | {"architectures": ["AltCLIPModel"]})
    for name in ("whole", "shards"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    save_file(state, folder / "whole" / "model.safetensors")
    weight_map = {}
    for shard in (0, 1):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        mine = dict(list(state.items())[shard::2])
        save_file(mine, folder / "shards" / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "shards" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / "whole", folder / "shards"]


def damage(folder: Path, seed: int) -> str:
    """Damages one file of a checkpoint and says how."""
    rng = random.Random(seed)
    weights = rng.choice(sorted(folder.glob("*.safetensors")))
    files: list[tuple[Path, list[Callable[[random.Random, Path], str]]]] = [
        (weights, [_flip, _truncate, _splice, _announce, *[_edit_header] * 6]),
        (folder / "config.json", [_flip, _truncate, _splice, *[_edit_config] * 9]),
        (rng.choice([weights, folder / "config.json", *folder.glob(INDEX)]), [_replace]),
    ]
    if (folder / INDEX).exists():
        files.append((folder / INDEX, [_flip, _truncate, _splice, *[_edit_index] * 4]))
    file, ways = rng.choices(files, [6, 5, 1, 3][: len(files)])[0]
    return f"seed {seed}: {folder.name}/{file.name}: {rng.choice(ways)(rng, file)}"


# ----------------------------------------------------------------------------------------------------------- any bytes


def _place(rng: random.Random, data: bytes) -> int:
    """Mostly near the start, where headers are."""
    return rng.randrange(min(len(data), rng.choice([9, 200, 8000, len(data)])))


def _flip(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    places = [(_place(rng, data), rng.randrange(8)) for _ in range(rng.choice([1, 1, 1, 3, 30]))]
    for place, bit in places:
        data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"flip (byte, bit) {places}"


def _truncate(rng: random.Random, file: Path) -> str:
    data = file.read_bytes()
    keep = rng.choice([_place(rng, data), len(data) - rng.choice([1, 4, 100])])
    file.write_bytes(data[:keep])
    return f"truncate to {keep} of {len(data)} bytes"


def _splice(rng: random.Random, file: Path) -> str:
    data = file.read_bytes()
    start, to, length = _place(rng, data), _place(rng, data), rng.choice([0, 1, 8, 100, 4096])
    kept = to + rng.choice([0, length, 8])
    file.write_bytes(data[:to] + data[start : start + length] + data[kept:])
    return f"put bytes {start} to {start + length} in place of those from {to} to {kept}"


def _announce(rng: random.Random, file: Path) -> str:
    data = file.read_bytes()
    new = rng.choice([0, 1, 7, 8, 2**16, len(data) - 8, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1])
    file.write_bytes(new.to_bytes(8, "little") + data[8:])
    return f"announce a header of {new} bytes"


def _replace(rng: random.Random, file: Path) -> str:
    """Something else where the file was."""
    file.unlink()
    links = {"itself": file.name, "nothing": "gone", "its folder": ".", "a device": "/dev/zero"}
    way = rng.choice(["gone", "a folder", "a pipe", "empty", "a pointer", *links])
    if way == "a folder":
        file.mkdir()
    elif way == "a pipe":
        os.mkfifo(file)
    elif way in links:
        file.symlink_to(links[way])
    elif way != "gone":
        file.write_text(
            "" if way == "empty" else "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
        )
    return f"replaced by {way}"


# ---------------------------------------------------------------------------------------------------------------- JSON


class _Twice(dict[str, Any]):
    """A table that is written with one of its names a second time."""

    def __init__(self, table: Mapping[str, Any], name: str, value: Any) -> None:
        super().__init__(table)
        self.name, self.value = name, value

    def text(self) -> str:
        return f"{json.dumps(self)[:-1]}, {json.dumps(self.name)}: {json.dumps(self.value)}}}"


def _write_header(file: Path, table: Mapping[str, Any], data: bytes) -> None:
    text = (table.text() if isinstance(table, _Twice) else json.dumps(table)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _edit_header(rng: random.Random, file: Path) -> str:
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table, data = json.loads(raw[8:start]), raw[start:]
    names = [name for name in table if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    way = rng.randrange(15)
    if way == 0:
        new = rng.choice([b + "x", "", "model." + a, a.replace("layer.0", "layer.7"), a[:-1], a + "\n", "\x1b[2J"])
        table[new] = table.pop(a)
        line = f"rename {a} to {new!r}"
    elif way == 1:
        table[a], table[b] = table[b], table[a]
        line = f"exchange {a} and {b}"
    elif way == 2:
        table[a]["data_offsets"], table[b]["data_offsets"] = table[b]["data_offsets"], table[a]["data_offsets"]
        line = f"exchange the offsets of {a} and {b}"
    elif way == 3:
        table[a]["dtype"] = new = rng.choice([*_DTYPES, *NASTY])
        line = f"dtype of {a}: {new!r}"
    elif way == 4:
        table[a]["shape"] = table[a]["shape"][::-1]
        line = f"reverse the shape of {a}"
    elif way == 5:
        shape = table[a]["shape"] or [1]
        shape[rng.randrange(len(shape))] = rng.choice(NASTY_SIZES)
        table[a]["shape"] = shape
        line = f"shape of {a}: {shape}"
    elif way == 6:
        table[a]["shape"] = new = rng.choice([*NASTY, [1] * 65 + table[a]["shape"], [0, 2**62, 2**62], [2**32, 2**32]])
        line = f"shape of {a}: {str(new)[:60]!r}"
    elif way == 7:
        table[a]["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, 1, 4, 2**40, 2**62])
        line = f"offsets of {a}: {table[a]['data_offsets']}"
    elif way == 8:
        table[a]["data_offsets"] = new = rng.choice([*NASTY, [0], [0, 4, 8], [4, 0], ["0", "4"], [0.0, 4.0]])
        line = f"offsets of {a}: {str(new)[:60]!r}"
    elif way == 9:
        table[a] = new = rng.choice(NASTY)
        line = f"{a}: {str(new)[:60]!r}"
    elif way == 10:
        del table[a]
        line = f"forget {a}"
    elif way == 11:
        table = _Twice(table, a, table[b])
        line = f"{a} again, as {b}"
    elif way == 12:
        items = list(table.items())
        rng.shuffle(items)
        table = dict(items)
        line = "shuffle"
    elif way == 13:
        table["__metadata__"] = new = rng.choice(NASTY)
        line = f"__metadata__: {str(new)[:60]!r}"
    else:
        # A tensor more, after all others, of a name that the model may know.
        name = rng.choice(["more", a.replace(".0.", ".1."), "text_model.roberta.pooler.dense.bias", "logit_scale"])
        table = _Twice(table, name, {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]})
        data += b"more"
        line = f"one more tensor, {name}"
    _write_header(file, table, data)
    return line


def _edit_config(rng: random.Random, file: Path) -> str:
    config = json.loads(file.read_text())
    way = rng.randrange(12)
    if way == 0:
        text = rng.choice(
            ["", "[]", "null", "[" * 10**5, '{"a":' * 10**5, "9" * 5000, "{}", '{"model_type": "altclip"}']
        )
        file.write_text(text)
        return f"{text[:30]!r}, {len(text)} characters"
    if way == 1:
        encoding = rng.choice(["utf-8-sig", "utf-16", "utf-32"])
        file.write_bytes(file.read_text().encode(encoding))
        return encoding
    table, name = config, ""
    if rng.random() < 0.8:
        name = rng.choice(["text_config", "vision_config"])
        table = config[name]
    key = rng.choice([*table, "pruned_heads", "text_config_dict", "position_embedding_type", "is_decoder", "more"])
    if way == 2:
        table.pop(key, None)
        line = f"forget {name} {key}"
    elif way == 3:
        value = {}
        for _ in range(rng.choice([10, 40, 60, 200, 900])):
            value = {"inside": value}
        table[key] = value
        line = f"{name} {key}: deep"
    elif way == 4 and isinstance(table.get(key), int):
        table[key] += rng.choice([-1, 1, 10])
        line = f"{name} {key}: {table[key]}"
    else:
        table[key] = rng.choice(NASTY)
        line = f"{name} {key}: {str(table[key])[:60]!r}"
    file.write_text(json.dumps(config))
    return line


def _edit_index(rng: random.Random, file: Path) -> str:
    index = json.loads(file.read_text())
    table = index["weight_map"]
    a, b = rng.sample(list(table), 2)
    way = rng.randrange(6)
    if way == 0:
        table[a] = new = rng.choice([*_NASTY_FILES, *NASTY])
        line = f"{a} in {str(new)[:60]!r}"
    elif way == 1:
        del table[a]
        line = f"forget {a}"
    elif way == 2:
        table[a], table[b] = table[b], table[a]
        line = f"exchange {a} and {b}"
    elif way == 3:
        table[a + "x"] = table.pop(a)
        line = f"rename {a}"
    elif way == 4:
        index["weight_map"] = new = rng.choice(NASTY)
        line = f"weight_map: {str(new)[:60]!r}"
    else:
        new = rng.choice(_NASTY_FILES)
        index["weight_map"] = dict.fromkeys(table, new)
        line = f"all in {new!r}"
    file.write_text(json.dumps(index))
    return line

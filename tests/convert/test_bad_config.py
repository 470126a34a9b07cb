"""A config.json that cannot be is refused by one sentence, in no time, whatever stands in it."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flax_vlm import checkpoint, convert
from flax_vlm.models import registry
from flax_vlm.models.abstract import abstract_params
from flax_vlm.models.altclip import AltCLIPModel, AltCLIPTextConfig
from flax_vlm.models.config import Depth, Fraction, Size, check_fields, layers_of

from .fuzz import CONFIG, NASTY, write_checkpoints

FAMILIES = list(registry._FAMILIES)


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize(
    ("text", "came"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "a list"),
        ("null", "a NoneType"),
        ('"{}"', "a str"),
        (b'{"a": "\xff"}', "can't decode byte"),
        (b"\xff\xfe{\0}\0", "can't decode byte"),
        ("\ufeff{}", "BOM"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a":' * 51 + "1" + "}" * 51, "more than 50 brackets"),
        ('{"a":' * 10**5, "recursion"),
        ("[" * 10**6, "recursion"),
        (" " * (checkpoint.MAX_CONFIG + 1), "bytes"),
    ],
)
def test_files_that_are_no_config(text: str | bytes, came: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"config\.json: expected JSON of one object, came: .* Download it again"
    ) as it:
        checkpoint.read_config(written(tmp_path, text))
    assert came in str(it.value)
    assert len(str(it.value)) < 400


def test_a_file_without_end(tmp_path: Path):
    with written(tmp_path, "{}").joinpath("config.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room
    with pytest.raises(ValueError, match="more than 16777216 bytes"):
        checkpoint.read_config(tmp_path)


def test_what_files_may_well_hold(tmp_path: Path):
    text = '{"a":' * 49 + '{"NaN": NaN, "é": "\\ud83d\\ude00"}' + "}" * 49
    checkpoint.read_config(written(tmp_path, text))


def places(data: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every value of a config, nested ones too, as the object it stands in and its name there."""
    found = [(data, name) for name in data]
    return found + [place for value in data.values() if isinstance(value, dict) for place in places(value)]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_in_any_place(family: str):
    """It is refused with its name, or is read, and written so that it reads the same."""
    config = registry.read_config({"model_type": family})
    extra = {"text_config_dict": None, "vision_config_dict": None, "pruned_heads": None, "architectures": None}
    data = extra | config.to_hf()
    refused = accepted = 0
    for table, name in places(data):
        kept = table[name]
        for value in NASTY:
            table[name] = value
            try:
                read = registry.read_config(data)
                registry.model_class(read, data["architectures"])
            except ValueError as error:
                assert type(error) is ValueError, (name, value)
                assert "config.json" in str(error), (name, value)
                assert len(str(error)) < 10_500, (name, value)  # a name may be quoted as a whole
                refused += 1
            else:
                assert registry.read_config(read.to_hf()) == read, (name, value)
                accepted += 1
        table[name] = kept
    assert registry.read_config(data) == config
    assert refused > accepted > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", -3, "AltCLIPTextConfig.hidden_size is -3: expected a number above 0"),
        ("hidden_size", "12", "AltCLIPTextConfig.hidden_size is '12': expected int"),
        ("hidden_size", 24.0, "AltCLIPTextConfig.hidden_size is 24.0: expected int"),
        ("hidden_size", True, "AltCLIPTextConfig.hidden_size is True: expected int"),
        ("hidden_size", None, "AltCLIPTextConfig.hidden_size is None: expected int"),
        ("hidden_size", [24], "AltCLIPTextConfig.hidden_size is [24]: expected int"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000: expected a number above 0 and up to 16777216"),
        ("layer_norm_eps", float("nan"), "AltCLIPTextConfig.layer_norm_eps is nan: expected a number from 0 to 1"),
        ("layer_norm_eps", 1e5, "AltCLIPTextConfig.layer_norm_eps is 100000.0: expected a number from 0 to 1"),
        ("initializer_range", 10**400, "expected a finite number"),
        ("initializer_range", float("inf"), "expected a finite number"),
        ("eos_token_id", 2**31, "AltCLIPTextConfig.eos_token_id is 2147483648: expected a number of 32 bits"),
        ("eos_token_id", "2", "AltCLIPTextConfig.eos_token_id is '2': expected int or null"),
        ("hidden_act", "softsign", "unknown activation 'softsign'"),
        ("hidden_act", 3, "AltCLIPTextConfig.hidden_act is 3: expected str"),
        ("is_decoder", 1, "AltCLIPTextConfig.is_decoder is 1: expected bool"),
        ("pruned_heads", [[0, 1]], "pruned_heads is [[0, 1]]: expected an object of lists"),
        ("pruned_heads", {"0": [1, 1]}, "pruned_heads is {'0': [1, 1]}: expected an object of lists"),
        ("pruned_heads", {"first": [1]}, "pruned_heads is {'first': [1]}: expected an object of lists"),
        ("pruned_heads", {"0": [99]}, "pruned_heads names layer 0, heads [99]"),
    ],
)
def test_what_is_said(name: str, value: Any, message: str):
    with pytest.raises(ValueError) as it:
        AltCLIPTextConfig.from_hf({name: value})
    assert str(it.value).startswith("config.json: ")
    assert message in str(it.value)
    assert "Is it the file that came with the weights?" in str(it.value)


@pytest.mark.parametrize("value", [0, False, "", [], 3, "large", [1]])
@pytest.mark.parametrize("name", ["text_config", "text_config_dict"])
def test_a_tower_that_is_no_object_does_not_become_the_default_one(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is .*: expected an object"):
        registry.read_config({"model_type": "altclip", name: value})


@pytest.mark.parametrize("model_type", [None, [], {}, ["altclip"], 3, "gpt2", "a" * 999])
def test_model_types(model_type: Any):
    with pytest.raises(ValueError, match=r"model_type is .*: expected one of altclip") as it:
        registry.read_config({"model_type": model_type})
    assert len(str(it.value)) < 300


@pytest.mark.parametrize("architectures", [5, "AltCLIPModel", {"AltCLIPModel": 1}, True])
def test_architectures(architectures: Any):
    with pytest.raises(ValueError, match=r"architectures is .*: expected a list of names"):
        registry.model_class(CONFIG, architectures)
    assert registry.model_class(CONFIG, [[], None, 3, "AltCLIPModel"]) is AltCLIPModel


def test_null_stays_null():
    """A field whose default is something else would come back as that."""
    config = AltCLIPTextConfig.from_hf({"eos_token_id": None})
    assert config.to_hf()["eos_token_id"] is None
    assert AltCLIPTextConfig.from_hf(config.to_hf()) == config


def test_millions_of_layers_are_refused_before_they_are_built(tmp_path: Path):
    (source, _) = write_checkpoints(tmp_path)
    data = json.loads((source / "config.json").read_text())
    data["text_config"]["num_hidden_layers"] = 10**7
    written(source, json.dumps(data))
    with pytest.raises(ValueError, match=r"asks for 10000001 layers, the checkpoint holds \d+ parameters"):
        convert.to_flax(source, tmp_path / "target")


def test_the_largest_sizes_take_no_room_and_no_time():
    """Not even where nothing in a checkpoint could fit them: what does not fit is then said name by name."""
    start = time.monotonic()
    most = 2**24
    text = dataclasses.replace(
        CONFIG.text_config,
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), most),
        **dict.fromkeys(("max_position_embeddings", "type_vocab_size", "project_dim"), most),
    )
    vision = dataclasses.replace(
        CONFIG.vision_config,
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_channels"), most),
        image_size=most,
        patch_size=most // 256,
    )
    config = dataclasses.replace(CONFIG, text_config=text, vision_config=vision, projection_dim=most)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(AltCLIPModel(config)))) > 2**48
    assert time.monotonic() - start < 20
    with pytest.raises(ValueError, match="make more than 65536 patches"):
        dataclasses.replace(vision, patch_size=most // 257)


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: Depth = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    """What a family to come may look like."""

    inner: Inner = Inner()
    layers: Depth = 4
    width: Size = 5
    rate: Fraction | None = None
    token: int | None = None
    name: str | int = "one"
    tables: tuple[int, ...] = ()


def test_any_config_class_is_checked_by_its_types():
    check_fields(Outer(rate=0, token=-1, name=3, tables=("anything",)))
    assert layers_of(Outer(Inner(30))) == 34
    for name, value in (("rate", 1.5), ("rate", "0"), ("token", 0.5), ("token", 2**31), ("name", None), ("width", 0)):
        with pytest.raises(ValueError, match=rf"Outer\.{name} is "):
            check_fields(dataclasses.replace(Outer(), **{name: value}))
    with pytest.raises(ValueError, match=r"Outer\.width is np\.int64\(3\): expected int"):
        check_fields(Outer(width=np.int64(3)))

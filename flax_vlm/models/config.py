"""Reading config.json into frozen dataclasses, and writing it back.

A config class is a frozen dataclass with the reference's field names and a class variable `model_type`. The types of
its fields say what may stand there (`Size`, `Depth`, `Fraction`, or a plain type), and `check_fields`, called first in
its `__post_init__`, holds them to it. What every `from_hf` does is here too: take the known fields, ignore what
decorates real files, warn about the rest.
"""

import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Mapping, Set
from functools import cache
from reprlib import repr as shortened
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

logger = logging.getLogger("flax_vlm")

Config = TypeVar("Config")


class Range(NamedTuple):
    """What numbers a field may hold, both ends included; `layers` where it says how many of them there are."""

    low: float
    high: float
    words: str
    layers: bool = False


_INT32 = Range(-(2**31), 2**31 - 1, "a number of 32 bits")  # of fields that name no range; tensors index with these
_FINITE = Range(-3.4e38, 3.4e38, "a finite number")  # in float32 too
_SIZE = Range(1, 2**24, f"a number above 0 and up to {2**24}")

# Types for the fields of a config. A plain int is any of 32 bits, a plain float any that is finite.
Size: TypeAlias = Annotated[int, _SIZE]  # a width, a vocabulary, a number of heads
Depth: TypeAlias = Annotated[int, _SIZE._replace(layers=True)]  # the time that a model takes to build grows with it
Fraction: TypeAlias = Annotated[float, Range(0, 1, "a number from 0 to 1")]  # a probability, an epsilon

# Keys of released config.json files that change nothing here: bookkeeping, and the generation defaults that older
# releases of transformers wrote into every config.
DECORATION = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id direct_kd
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_composition is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pooler_fn prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature text_config_dict tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    vision_config_dict
    """.split()
)


def config_from_hf(
    cls: type[Config],
    data: Mapping[str, Any],
    convert: Mapping[str, Callable[[Any], Any]] | None = None,
    ignore: Set[str] = frozenset(),
) -> Config:
    """`cls` from a config.json dictionary; missing fields take the class's defaults.

    Args:
      convert: per field, how to read the value of the file.
      ignore: further keys to pass over in silence.

    Raises:
      ValueError: for a value that cannot be, naming the field.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType] - cls is a dataclass
    try:
        values = {name: data[name] for name in fields & data.keys()}
        values |= {name: read(values[name]) for name, read in (convert or {}).items() if name in values}
        for name, allowed in _scalars(cls).items():
            if float in allowed and type(values.get(name)) is int and abs(values[name]) <= _FINITE.high:
                values[name] = float(values[name])
        config = cls(**values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}. Is it the file that came with the weights?") from error
    unknown = sorted(data.keys() - fields - DECORATION - ignore)
    if unknown:
        logger.warning("%s: config.json holds keys that nothing reads: %s", cls.__name__, ", ".join(unknown))
    return config


def section(data: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The object of a config.json under the first of `names` that holds one; empty where none is there.

    Raises:
      ValueError: for anything else than an object.
    """
    for name in names:
        value = data.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} is {shortened(value)}: expected an object")
        if value:
            return value
    return {}


def check_fields(config: Any) -> None:
    """Raises ValueError for a field of another type than its class declares, or outside its range.

    Fields of other types than numbers, strings and None (nested configs, tuples) are for their own class to check.
    """
    for name, allowed in _scalars(type(config)).items():
        value = getattr(config, name)
        kind = float if type(value) is int and int not in allowed else type(value)
        if kind not in allowed:
            expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
            raise ValueError(f"{type(config).__name__}.{name} is {shortened(value)}: expected {expected}")
        span = allowed[kind]
        if span and not span.low <= value <= span.high:  # so that NaN is outside
            raise ValueError(f"{type(config).__name__}.{name} is {shortened(value)}: expected {span.words}")


def layers_of(config: Any) -> int:
    """How many layers a config asks for, those of its nested configs included."""
    nested = (getattr(config, field.name) for field in dataclasses.fields(config))
    counts = [name for name, allowed in _scalars(type(config)).items() if any(r and r.layers for r in allowed.values())]
    return sum(getattr(config, name) for name in counts) + sum(map(layers_of, filter(dataclasses.is_dataclass, nested)))


@cache
def _scalars(cls: type) -> dict[str, dict[type, Range | None]]:
    """The fields that hold numbers, strings or None: what types each may have, and the range of each type."""
    plain = {int: _INT32, float: _FINITE, bool: None, str: None, types.NoneType: None}
    hints, scalars = typing.get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        either = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        bare = [typing.get_args(each) if typing.get_origin(each) is Annotated else (each, None) for each in either]
        if all(kind in plain for kind, _ in bare):
            scalars[field.name] = {kind: span or plain[kind] for kind, span in bare}
    return scalars


def require_divisible(config: Any, width: str, heads: str) -> None:
    """Raises ValueError where a width does not split evenly into heads."""
    if getattr(config, width) % getattr(config, heads):
        raise ValueError(
            f"{type(config).__name__}: {width} {getattr(config, width)} is not a multiple of {heads} "
            f"{getattr(config, heads)}"
        )


def config_to_hf(config: Any) -> dict[str, Any]:
    """The config.json dictionary of a config dataclass, nested configs included; fields that are None by default, and
    are, left out."""
    data: dict[str, Any] = {"model_type": config.model_type}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = config_to_hf(value)
        if value is not None or field.default is not None:
            data[field.name] = value
    return data

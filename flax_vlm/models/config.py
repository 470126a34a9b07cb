"""Reading config.json into frozen dataclasses, and writing it back.

A config class is a frozen dataclass with the reference's field names and a class variable `model_type`. What every
`from_hf` does is here: take the known fields, check their types, ignore what decorates real files, warn about the rest.
"""

import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

logger = logging.getLogger("flax_vlm")

Config = TypeVar("Config")

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
    ignore: frozenset[str] = frozenset(),
) -> Config:
    """`cls` from a config.json dictionary; missing fields take the class's defaults.

    Args:
      convert: per field, how to read the value of the file.
      ignore: further keys to pass over in silence.

    Raises:
      ValueError: for a value of the wrong type, naming the field.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType] - cls is a dataclass
    values = {}
    for name in fields & set(data):
        value = data[name]
        if convert and name in convert:
            value = convert[name](value)
        values[name] = _checked(cls.__name__, name, value, hints[name])
    unknown = sorted(set(data) - fields - DECORATION - ignore)
    if unknown:
        logger.warning("%s: config.json holds keys that nothing reads: %s", cls.__name__, ", ".join(unknown))
    return cls(**values)


def _checked(owner: str, name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the scalar type `hint` (or a union of such), or an error naming the field."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    scalars = {bool: bool, int: int, float: float, str: str, type(None): type(None)}
    checkable = [kind for kind in allowed if kind in scalars]
    if len(checkable) < len(allowed):  # a nested config or a tuple, made by `convert`
        return value
    if not any(type(value) is kind for kind in checkable):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in checkable)
        raise ValueError(f"config.json: {owner}.{name} is {value!r}: expected {expected}")
    return value


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError for fields that are not above zero."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)}: expected a number above 0")


def require_divisible(config: Any, width: str, heads: str) -> None:
    """Raises ValueError where a width does not split evenly into heads."""
    if getattr(config, width) % getattr(config, heads):
        raise ValueError(
            f"{type(config).__name__}: {width} {getattr(config, width)} is not a multiple of {heads} "
            f"{getattr(config, heads)}"
        )


def config_to_hf(config: Any) -> dict[str, Any]:
    """The config.json dictionary of a config dataclass, nested configs included; fields of value None left out."""
    data: dict[str, Any] = {"model_type": config.model_type}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = config_to_hf(value)
        if value is not None:
            data[field.name] = value
    return data

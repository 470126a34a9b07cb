"""What `generate` is asked to do: transformers' options, by transformers' names, with transformers' defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

# What generation_config.json may hold that changes no answer: it is read over.
_DECORATION = frozenset(
    """transformers_version _from_model_config _commit_hash bos_token_id decoder_start_token_id use_cache
    cache_implementation cache_config max_cache_len disable_compile compile_config prefill_chunk_size low_memory
    return_legacy_cache is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind assistant_early_exit prompt_lookup_num_tokens max_matching_ngram_size
    """.split()
)
# Options of transformers that do not exist here; at these values (or None) they do nothing there either.
_OFF = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_TOKEN_IDS = ("eos_token_id", "pad_token_id")
_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_FOR_BEAMS = ("length_penalty", "early_stopping")
_DEFAULT_NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Greedy unless told otherwise: `do_sample` samples, `num_beams` searches with beams.

    Attributes:
      max_new_tokens, max_length: how many tokens to add, or how many there may be with the prompt (as wide as it was
        given, padding included). `max_new_tokens` wins; with neither 20 are added.
      min_new_tokens, min_length: no stop id before so many; again the first wins.
      temperature, top_k, top_p, min_p: for sampling, in this order. As in transformers `top_k` is 50 unless set; 0 is
        off.
      repetition_penalty: for tokens of the prompt and of the answer so far.
      no_repeat_ngram_size: no n tokens in a row come twice; 0 is off.
      bad_words_ids: sequences of ids that may not come.
      num_return_sequences: how many answers to each prompt; at most `num_beams` of them with beams.
      length_penalty, early_stopping: for beams: a sequence of n new tokens is worth its log probability / n **
        length_penalty, and the search ends as transformers says of True, False and "never".
      eos_token_id: one stop id, or several. A stop id is part of the answer.
      pad_token_id: fills the rows that have ended; the first stop id when None.
      stop_strings: the answer ends with the token that completes one of them. Needs the tokenizer.
      seed: of sampling. A number gives every row its own stream of random numbers, a sequence names one for each
        prompt; a row's answer depends on no other row. A fresh one for each call when None.
      output_scores, output_logits: keep what each step chose from, after or before processing.
      return_dict_in_generate: give the cache back, so that a later call may go on from it.
      inherited: names of options that come with a checkpoint: they may lie idle, where an idle option that a person
        has set is an error.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    seed: int | Sequence[int] | None = None
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False
    inherited: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError for values that mean nothing, and for options that contradict each other."""
        faults = self._bad_values() or self._contradictions()
        if faults:
            raise ValueError("cannot generate with these options:\n  " + "\n  ".join(faults))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """The options of a generation_config.json; of a model's config.json, its stop and padding ids.

        Raises:
          ValueError: for an option that is not known here and would change what is generated.
        """
        if "model_type" in data or "architectures" in data:
            data = {name: data.get(name) for name in _TOKEN_IDS}
        options = _known(data)
        return cls(**options, inherited=frozenset(options))

    def to_hf(self) -> dict[str, Any]:
        """As a dictionary for generation_config.json: what is not at its default."""
        values = {name: getattr(self, name) for name, field in _FIELDS.items() if getattr(self, name) != field.default}
        values.pop("seed", None)  # transformers has none
        return values

    @staticmethod
    def is_option(name: str) -> bool:
        """Whether transformers' generate would take `name` for an option rather than for an input of the model."""
        return name in _FIELDS or name in _DECORATION or name in _OFF

    def updated(self, **options: Any) -> GenerationConfig:
        """These options over the present ones, which may then lie idle; None takes an option back to its default.

        Raises:
          ValueError: as the constructor, and for an option that does not exist.
        """
        changes: dict[str, Any] = {name: field.default for name, field in _FIELDS.items() if name in options}
        changes |= _known(options)
        for winner, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if changes.get(other) is not None and winner not in changes:
                changes[winner] = None  # else one that came with the checkpoint would win over what is asked for now
        return dataclasses.replace(self, **changes, inherited=frozenset(_FIELDS) - changes.keys())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(_as_sequence(ids))

    @property
    def fill_id(self) -> int:
        """What finished rows are filled with."""
        return self.pad_token_id if self.pad_token_id is not None else self.stop_ids[0] if self.stop_ids else 0

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop_strings` as a tuple."""
        texts = self.stop_strings
        return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)

    @property
    def bad_words(self) -> tuple[tuple[int, ...], ...]:
        """`bad_words_ids` without the stop ids: as in transformers these cannot be bad words."""
        words = (tuple(word) for word in self.bad_words_ids or ())
        return tuple(word for word in words if word not in {(stop,) for stop in self.stop_ids})

    def new_tokens(self, prompt_length: int, continued: bool = False) -> tuple[int, int]:
        """How many tokens to add to a prompt: (at most, at least).

        Raises:
          ValueError: for a prompt that is too long for `max_length`, a minimum above the maximum, or, when going on
            from a cache (whose tokens nobody has counted), lengths that include the prompt.
        """
        if continued and (
            (self.max_new_tokens is None and self.max_length is not None)
            or (self.min_new_tokens is None and self.min_length)
        ):
            raise ValueError(
                "max_length and min_length include what is in the cache already, which is not known here: "
                "pass max_new_tokens and min_new_tokens"
            )
        most = self.max_new_tokens
        if most is None:
            most = _DEFAULT_NEW_TOKENS if self.max_length is None else self.max_length - prompt_length
            if most <= 0:
                raise ValueError(
                    f"the prompt has {prompt_length} tokens and max_length is {self.max_length}: nothing is left to "
                    "generate. Pass max_new_tokens"
                )
        least = self.min_new_tokens
        if least is None:
            least = max(0, (self.min_length or 0) - prompt_length)
        if least > most:
            raise ValueError(f"at least {least} new tokens, but at most {most}, cannot be. Check the four lengths")
        return most, least

    def _bad_values(self) -> list[str]:
        tokens = "an id of the vocabulary"
        counts = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        counts_from_0 = ("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size")
        optional = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
        checks: list[tuple[str, bool, str]] = []
        for names, lowest in ((counts, 1), (counts_from_0, 0)):
            for name in names:
                value = getattr(self, name)
                ok = (value is None and name in optional) or _is_int(value, lowest)
                checks.append((name, ok, f"a whole number from {lowest} on"))
        checks += [
            ("temperature", _is_number(self.temperature, above=0), "a number above 0 (greedy is do_sample=False)"),
            ("top_p", _is_number(self.top_p) and 0 <= self.top_p <= 1, "a number from 0 to 1"),
            ("min_p", self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1), "a number from 0 to 1"),
            ("repetition_penalty", _is_number(self.repetition_penalty, above=0), "a number above 0 (1 is off)"),
            ("length_penalty", _is_number(self.length_penalty), "a number"),
            ("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"'),
            ("eos_token_id", all(_is_int(i) for i in self.stop_ids), f"{tokens}, or several"),
            ("pad_token_id", self.pad_token_id is None or _is_int(self.pad_token_id), tokens),
            (
                "bad_words_ids",
                all(word and all(_is_int(i) for i in word) for word in self.bad_words_ids or ()),
                "sequences of one id or more",
            ),
            ("stop_strings", all(isinstance(t, str) and t for t in self.stop_texts), "a text, or several, none empty"),
            (
                "seed",
                self.seed is None or all(_is_int(s) and s < 2**32 for s in _as_sequence(self.seed)),
                "a whole number from 0 to 2**32 - 1, or one for each prompt",
            ),
        ]
        for name in ("do_sample", "output_scores", "output_logits", "return_dict_in_generate"):
            checks.append((name, isinstance(getattr(self, name), bool), "True or False"))
        return [f"{name}: expected {expected}, got {getattr(self, name)!r}" for name, ok, expected in checks if not ok]

    def _contradictions(self) -> list[str]:
        def idle(names: Sequence[str]) -> list[str]:
            return [n for n in names if n not in self.inherited and getattr(self, n) != _FIELDS[n].default]

        faults = []
        if self.do_sample and self.num_beams > 1:
            faults.append("do_sample=True and num_beams > 1: sampling with beams does not exist here. Choose one")
        if not self.do_sample:
            faults += [f"{name} does nothing without do_sample=True" for name in idle(_FOR_SAMPLING)]
        if self.num_beams == 1:
            faults += [f"{name} does nothing without num_beams > 1" for name in idle(_FOR_BEAMS)]
        if self.num_beams == 1 and not self.do_sample and self.num_return_sequences > 1:
            faults.append("num_return_sequences > 1 needs do_sample=True or as many num_beams: greedy has one answer")
        if 1 < self.num_beams < self.num_return_sequences:
            faults.append(f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}")
        if self.stop_texts and self.pad_token_id is None and not self.stop_ids:
            faults.append("stop_strings need pad_token_id (or eos_token_id), to fill the rows that have ended")
        return faults


_FIELDS = {field.name: field for field in dataclasses.fields(GenerationConfig) if field.name != "inherited"}


def _known(data: Mapping[str, Any]) -> dict[str, Any]:
    """The options in transformers' `data` that are set and exist here."""
    unknown = [
        f"{name}={value!r}"
        for name, value in data.items()
        if name not in _FIELDS and name not in _DECORATION and value is not None and value != _OFF.get(name)
    ]
    if unknown:
        raise ValueError(
            f"cannot generate with {', '.join(unknown)}: not known here. Leave it out, or use one of "
            f"{', '.join(_FIELDS)}"
        )
    return {name: value for name, value in data.items() if name in _FIELDS and value is not None}


def _is_int(value: Any, lowest: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest


def _is_number(value: Any, above: float = -math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) > above


def _as_sequence(value: int | Sequence[int]) -> Sequence[int]:
    return value if isinstance(value, Sequence) else (value,)

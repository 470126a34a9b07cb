"""Texts to ids and back, over the `tokenizers` library, with transformers' call and files.

Reads tokenizer.json, or the sentencepiece model or rank file of a checkpoint that has none; the settings around it come
from tokenizer_config.json and special_tokens_map.json, as in transformers 4.x and 5.x.

B texts   T tokens
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from flax_vlm.processing.byte_pairs import glm4_tokenizer, read_ranks
from flax_vlm.processing.sentencepiece import SentencePieceModel, llama_tokenizer, xlm_roberta_tokenizer

# transformers writes about 1e30 for "no limit"; nothing that an int32 position can reach is meant as that.
_NO_LIMIT = 2**31
_XLM_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
_GLM4 = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
# What the files leave out, by how tokenizer_class begins.
_DEFAULTS = {"XLMRoberta": _XLM_ROBERTA, "Llama": _LLAMA, "ChatGLM4": _GLM4}
_SENTENCEPIECE_FILES = {
    "sentencepiece.bpe.model": (xlm_roberta_tokenizer, _XLM_ROBERTA),
    "tokenizer.model": (llama_tokenizer, _LLAMA),
}
# A piece that stands for one byte of UTF-8, where the vocabulary has no piece for a character.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """A tokenizer with its special tokens; `backend` is the `tokenizers.Tokenizer` itself.

    `padding_side`, `truncation_side` ("left" or "right") and `model_max_length` (None: the files set no limit) may be
    changed.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]):
        backend.no_truncation()  # some tokenizer.json carry these along; here each call decides
        backend.no_padding()
        self.backend = backend
        self.config = dict(config)
        self.padding_side: str = config.get("padding_side", "right")
        self.truncation_side: str = config.get("truncation_side", "right")
        limit = config.get("model_max_length")
        self.model_max_length = None if limit is None or limit >= _NO_LIMIT else int(limit)

    @classmethod
    def from_dir(cls, folder: str | Path) -> "Tokenizer":
        folder = Path(folder)
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        kind = str(config.get("tokenizer_class"))
        defaults = next((tokens for name, tokens in _DEFAULTS.items() if kind.startswith(name)), {})
        added = _added_tokens(config, read_json(folder / "added_tokens.json"))
        files = ["tokenizer.json", *_SENTENCEPIECE_FILES]
        name = next((name for name in files if (folder / name).exists()), None)
        if name is None:
            raise FileNotFoundError(f"{folder}: expected one of {files}, found none. Copy the tokenizer there.")
        if name == "tokenizer.json":
            backend = tokenizers.Tokenizer.from_file(str(folder / name))
        elif defaults is _GLM4:
            backend = glm4_tokenizer(read_ranks(folder / name), {t["content"]: index for index, t in added.items()})
        else:
            build, defaults = _SENTENCEPIECE_FILES[name]
            backend = build(SentencePieceModel.read(folder / name))
        _add_missing_tokens(backend, added)
        return cls(backend, defaults | {key: value for key, value in config.items() if value is not None})

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer reads them to equal ids.

        The class is written as PreTrainedTokenizerFast, because that one takes tokenizer.json as it is, while the
        classes named after models rebuild parts of it, not the same parts in every release.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # auto_map would have transformers ask for code that is not here.
        config = {name: _marked(value) for name, value in self.config.items() if name != "auto_map"} | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length or int(1e30),
        }
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, Int32[np.ndarray, "B T"]]:
        """`input_ids` and `attention_mask` of one text or of several.

        padding: True or "longest" to the longest text, "max_length" to `max_length`, False for texts of equal length.
        padding_side: "left" or "right", by default the tokenizer's own.
        truncation: cuts to `max_length`, by default `model_max_length`, and keeps the special tokens around the text.
        pad_to_multiple_of: rounds the width up. jit compiles once for every shape it meets, so a multiple of 32 or 64
            lets texts of many lengths share a few compiled programs.
        """
        texts = [texts] if isinstance(texts, str) else texts
        _check_texts(texts)
        if truncation not in (True, False):
            raise ValueError(f"truncation: expected True or False, got {truncation!r}. Choose one.")
        if max_length is not None and not truncation and padding != "max_length":
            raise ValueError(
                f'max_length={max_length}: expected truncation=True or padding="max_length" too, got neither, and '
                "alone it does nothing. Pass one of them."
            )
        limit = self._limit(max_length) if truncation else None
        rows = self._encode(texts, limit, add_special_tokens)
        return self.pad(
            rows, padding, padding_side, max_length if padding == "max_length" else None, pad_to_multiple_of
        )

    def ordinary_ids(self, text: str) -> list[int]:
        """The ids of one text in which special tokens are letters like others: nobody can write one."""
        text = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for piece, _ in pieces for token in self.backend.model.tokenize(piece)]

    def pad(
        self,
        rows: Sequence[Sequence[int]],
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Int32[np.ndarray, "B T"]]:
        """`input_ids` and `attention_mask` of rows of ids; the options are those of a call."""
        side = padding_side or self.padding_side
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f'padding: expected True, False, "longest" or "max_length", got {padding!r}. Choose one.')
        if side not in ("left", "right"):
            raise ValueError(f'padding_side: expected "left" or "right", got {side!r}. Choose one.')
        if max_length is not None and padding != "max_length":
            raise ValueError(
                f'max_length={max_length}: expected padding="max_length" too, got {padding!r}, and alone it does '
                "nothing. Pass both."
            )
        lengths = [len(row) for row in rows]
        width = max(lengths)
        if padding == "max_length":
            limit = self._limit(max_length)
            if width > limit:
                raise ValueError(f"expected at most max_length={limit} tokens, got {width}. Pass truncation=True.")
            width = limit
        if pad_to_multiple_of and padding:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        if any(length < width for length in lengths):
            if not padding:
                raise ValueError(
                    f"padding=False: expected texts of equal length, got {lengths} tokens. Pass padding=True."
                )
            if self.pad_token_id is None:
                raise ValueError(
                    f"padding: expected a pad_token of the vocabulary, got {self.config.get('pad_token')!r}. Set it in "
                    "tokenizer_config.json, to the eos token if the model has none."
                )
        input_ids = np.full((len(rows), width), self.pad_token_id or 0, np.int32)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            input_ids[i, place] = row
            attention_mask[i, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one row of ids (a list, an array, one id), without transformers' clean-up of spaces."""
        return self.backend.decode(np.atleast_1d(np.asarray(ids, np.int64)).tolist(), skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens besides bos_token and its like; transformers 5.x calls them extra_special_tokens."""
        listed = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens") or []
        return [_content(token) for token in (listed.values() if isinstance(listed, Mapping) else listed)]

    def special_token(self, name: str) -> str:
        """The text of a special token by its name in tokenizer_config.json, such as "bos_token"."""
        if self._special_id(name) is None:
            raise ValueError(
                f"{name}: expected a token of the vocabulary, got {self.config.get(name)!r}. Set it in "
                "tokenizer_config.json."
            )
        return _content(self.config[name])

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._special_id("unk_token")

    def _special_id(self, name: str) -> int | None:
        token = self.config.get(name)
        return None if token is None else self.backend.token_to_id(_content(token))

    def _encode(self, texts: Sequence[str], max_length: int | None, add_special_tokens: bool) -> list[list[int]]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        if max_length is not None:
            room = max_length - (self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0)
            if room < 0:
                raise ValueError(f"max_length: expected room for the special tokens, got {max_length}. Make it larger.")
            for encoding in encodings:
                encoding.truncate(room, direction=self.truncation_side)
        if not add_special_tokens:
            return [encoding.ids for encoding in encodings]
        return [self.backend.post_process(encoding).ids for encoding in encodings]

    def _limit(self, max_length: int | None) -> int:
        limit = self.model_max_length if max_length is None else max_length
        if limit is None:
            raise ValueError(
                "max_length: expected a number, as this tokenizer has no model_max_length. Pass max_length."
            )
        return limit


class TextStream:
    """The text of ids that come one by one: `put` gives what no later id can change any more, `end` the rest.

    All that is given, joined, is `tokenizer.decode` of all the ids; no character comes in halves. A run of byte pieces
    is held back until it ends, as one wrong byte turns all of its characters into U+FFFD. (`DecodeStream` of the
    `tokenizers` library gives them earlier, and then raises, or goes on with other text than decode has.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {index for index, token in added.items() if token.special}
        # The ids that gave text last: without them the next would be decoded as a text's start, which loses its space.
        self._before: list[int] = []
        self._held: list[int] = []

    def put(self, token_id: int) -> str:
        token_id = int(token_id)
        piece = self._tokenizer.backend.id_to_token(token_id)
        if piece is None or token_id in self._skipped:  # decode passes over these
            return ""
        self._held.append(token_id)
        text = "" if _BYTE.fullmatch(piece) else self._held_text()
        if not text or text.endswith("\ufffd"):  # maybe the first bytes of a character
            return ""
        self._before, self._held = self._held, []
        return text

    def end(self) -> str:
        """What was held back; the next `put` then starts a new text."""
        text = self._held_text()
        self._before, self._held = [], []
        return text

    def _held_text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._before + self._held)[len(decode(self._before)) :]


def _check_texts(texts: Any) -> None:
    is_list = isinstance(texts, list | tuple)
    if not is_list or not all(isinstance(text, str) for text in texts):
        came = f"a list of {sorted({type(text).__name__ for text in texts})}" if is_list else type(texts).__name__
        raise TypeError(f"text: expected a str or a list of str, got {came}. Pass one str for each row.")
    if not texts:
        raise ValueError("text: expected one str or more, got an empty list. For pictures alone leave text out.")


def _added_tokens(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[int, Mapping[str, Any]]:
    """The tokens of added_tokens.json (4.x) and of added_tokens_decoder, by id."""
    tokens: dict[int, Mapping[str, Any]] = {index: {"content": content} for content, index in added.items()}
    return tokens | {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}


def _add_missing_tokens(backend: tokenizers.Tokenizer, tokens: Mapping[int, Mapping[str, Any]]) -> None:
    """Those that live only beside the vocabulary, at the ids they name."""
    for index, token in sorted(tokens.items()):
        content = token["content"]
        if backend.token_to_id(content) is None:
            options = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in token}
            special = token.get("special", True)
            backend.add_tokens(
                [tokenizers.AddedToken(content, special=special, **({"normalized": not special} | options))]
            )
        if (found := backend.token_to_id(content)) != index:
            raise ValueError(
                f"added token {content!r}: expected id {index}, as its file says, got {found}. Do tokenizer and "
                "added tokens come from the same checkpoint?"
            )


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _marked(value: Any) -> Any:
    """Tokens with options as tokenizer_config.json has them; in special_tokens_map.json they lack the mark."""
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return {"__type": "AddedToken", **value} if isinstance(value, Mapping) and "content" in value else value


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

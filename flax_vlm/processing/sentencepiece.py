"""SentencePiece model files as `tokenizers` tokenizers, without the sentencepiece and protobuf packages.

Source: sentencepiece's sentencepiece_model.proto, the protobuf wire format, and the fast tokenizers that transformers
builds from such files (convert_slow_tokenizer.py). Older checkpoints hold only this file and no tokenizer.json.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

NORMAL, USER_DEFINED = 1, 4  # kinds of pieces; the others are unknown 2, control 3, unused 5, byte 6
UNIGRAM, BYTE_PAIRS = 1, 2  # kinds of models


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a .model file says and a tokenizer needs; the defaults are those of the .proto."""

    pieces: tuple[Piece, ...]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def read(cls, path: str | Path) -> "SentencePieceModel":
        try:
            return cls.parse(Path(path).read_bytes())
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise ValueError(f"{path}: expected a sentencepiece model, got something else. Is it complete?") from error

    @classmethod
    def parse(cls, data: bytes) -> "SentencePieceModel":
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        return cls(
            pieces=tuple(pieces),
            model_type=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, False)),
            charsmap=normalizer.get(2, b""),
            add_dummy_prefix=bool(normalizer.get(3, True)),
            remove_extra_whitespaces=bool(normalizer.get(4, True)),
        )


def xlm_roberta_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """XLM-R: a unigram model with fairseq's ids, `<s>` A `</s>`, pairs `<s>` A `</s> </s>` B `</s>`.

    The file numbers its pieces `<unk> <s> </s> , . ...`, fairseq `<s> <pad> </s> <unk> , . ... <mask>`: from the fourth
    piece on every id is one more than in the file. The ids equal sentencepiece's own except in rare stacks of combining
    characters, which `tokenizers` normalises as a whole; there they equal transformers'.
    """
    _require(model, UNIGRAM, "XLM-R", remove_extra_whitespaces=True)
    specials = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*specials, *((piece.text, piece.score) for piece in model.pieces[3:]), ("<mask>", 0.0)]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=3, byte_fallback=model.byte_fallback))
    if model.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    _add_special(tokenizer, [text for text, _ in specials])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    _add_user_defined(tokenizer, model)
    return tokenizer


def llama_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """LLaMA: byte-pair encoding with byte fallback, the file's own ids, `<s>` in front.

    Spaces are kept as they are, and every stretch of text between special tokens gets a leading space of its own: the
    behaviour that transformers calls legacy, and with which IDEFICS was trained.
    """
    _require(model, BYTE_PAIRS, "LLaMA", remove_extra_whitespaces=False)
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    merges = _merges(model)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=model.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    _add_special(tokenizer, [piece.text for piece in model.pieces[:3]])
    _add_user_defined(tokenizer, model)
    return tokenizer


def _require(model: SentencePieceModel, model_type: int, name: str, *, remove_extra_whitespaces: bool) -> None:
    first = [piece.text for piece in model.pieces[:3]]
    found = (model.model_type, first, model.add_dummy_prefix, model.remove_extra_whitespaces)
    expected = (model_type, ["<unk>", "<s>", "</s>"], True, remove_extra_whitespaces)
    if found != expected:
        raise ValueError(
            f"sentencepiece model: for {name} expected (model type, first pieces, add_dummy_prefix, "
            f"remove_extra_whitespaces) {expected}, got {found}. Make a tokenizer.json with the tools that trained it."
        )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """SentencePiece joins any two neighbours whose union is a piece, best score first: these pairs, in that order."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    pairs = [
        (score, left, right)
        for text, score in scores.items()
        for left, right in ((text[:i], text[i:]) for i in range(1, len(text)))
        if left in scores and right in scores
    ]
    pairs.sort(key=lambda pair: (pair[0], len(pair[1])), reverse=True)
    return [(left, right) for _, left, right in pairs]


def _add_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in texts])


def _add_user_defined(tokenizer: Tokenizer, model: SentencePieceModel) -> None:
    texts = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: varints as int, everything else as its bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}[wire_type]
        if position + length > len(data):
            raise IndexError("the message ends inside a field")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

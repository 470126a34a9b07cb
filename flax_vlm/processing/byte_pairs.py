"""tiktoken's rank files as `tokenizers` tokenizers, without the tiktoken package.

A file has a line for each token: its bytes in base64, and its rank, which is its id. tiktoken joins, again and again,
the two neighbours whose union has the lowest rank, the first of equals; a stretch of text that is a token stays whole.
Source: github.com/openai/tiktoken, and GLM-4's `tokenization_chatglm.py`.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

GLM4_BEGINNING = ("[gMASK]", "<sop>")
# Between the stretches that this finds nothing is joined.
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Rank by token.

    Raises:
      ValueError: for another file, or one that lacks a rank or a byte.
    """
    try:
        lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{path}: expected lines of a token in base64 and its rank, as tiktoken writes, got something else. Is it "
            "that of the original checkpoint?"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(
            f"{path}: expected a rank from 0 on for every token, all 256 bytes among them, got {len(ranks)} tokens up "
            f"to rank {max(ranks.values(), default=None)}. Is the file complete?"
        )
    return ranks


def glm4_tokenizer(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> Tokenizer:
    """GLM-4: `[gMASK] <sop>` in front. The special tokens, by their ids, are still to be added.

    BPE joins pairs in the order of a list. This one has all pairs whose union is a token, by the rank of that, which is
    tiktoken's order. (Pairs of one union have equal rank there and come one behind the other here; a difference would
    take two of them that overlap, and none was found, in made-up vocabularies neither.)
    """
    if missing := [token for token in GLM4_BEGINNING if token not in special]:
        raise ValueError(
            f"tokenizer: expected the tokens {missing} among the added ones, got {sorted(special)}. Copy "
            "tokenizer_config.json from the original checkpoint."
        )
    spelled = {token: "".join(map(_LETTERS.__getitem__, token)) for token in ranks}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    cuts = ((token[:at], token[at:]) for token in by_rank for at in range(1, len(token)))
    merges = [(spelled[left], spelled[right]) for left, right in cuts if left in ranks and right in ranks]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*GLM4_BEGINNING, "$A"], special_tokens=[(token, special[token]) for token in GLM4_BEGINNING]
    )
    return tokenizer


def byte_letters() -> dict[int, str]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = byte_letters()

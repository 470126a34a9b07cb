"""Stop strings inside the compiled loop: an automaton over bytes, with one table of its moves by token.

The automaton (Aho and Corasick, Commun. ACM 18, 1975) knows how much of a stop string the text ends with. A token's
bytes take it from any state to another, and maybe past the end of a stop string on the way; both are worked out once
for all tokens, so that a step of the loop is one look-up, `table[state, id]`. A match may begin in the prompt and may
end inside a token, as in transformers.

A states   V tokens
"""

from __future__ import annotations

import json
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int16

from flax_vlm.processing.byte_pairs import byte_letters

_MOST_STATES = 2**14  # a table entry is state * 2 + (a stop string ended), in int16


def stop_table(tokenizer: Any, strings: tuple[str, ...]) -> Int16[np.ndarray, "A V+1"]:
    """`table[state, id]` is the next state times 2, plus 1 where the token completes a stop string.

    The last column is for ids that the tokenizer does not have. Tables are kept: the next call with the same
    tokenizer and strings gets the same array.

    Args:
      tokenizer: a `tokenizers.Tokenizer`, or what has one as `backend` or `backend_tokenizer`.
    """
    for name in ("backend", "backend_tokenizer"):
        tokenizer = getattr(tokenizer, name, tokenizer)
    if not isinstance(tokenizer, tokenizers.Tokenizer):
        raise TypeError(f"tokenizer: expected one of the tokenizers library, got {type(tokenizer).__name__}")
    return _stop_table(tokenizer, strings)


def stop_states(
    table: Int16[np.ndarray, "A V+1"], ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"]
) -> Int[np.ndarray, " B"]:
    """The states that the prompts end in."""
    states = np.zeros(len(ids), np.int32)
    for column, known in zip(np.minimum(ids, table.shape[1] - 1).T, mask.T, strict=True):
        states = np.where(known, table[states, column] >> 1, states)
    return states


@lru_cache(maxsize=8)
def _stop_table(tokenizer: tokenizers.Tokenizer, strings: tuple[str, ...]) -> Int16[np.ndarray, "A V+1"]:
    moves, ends = _automaton([text.encode() for text in strings])
    texts = [*token_bytes(tokenizer), b""]
    # The number of states is rounded up, so that strings of about the same length run the same program.
    rows = max(16, 1 << (len(moves) - 1).bit_length())
    if rows > _MOST_STATES:
        raise ValueError(f"stop_strings have {len(moves)} bytes in all: expected at most {_MOST_STATES}. Pass fewer")
    states = np.zeros((rows, len(texts)), np.int16)
    states[: len(moves)] = np.arange(len(moves))[:, None]
    hit = np.zeros(states.shape, bool)
    longest_first = np.argsort([-len(text) for text in texts], kind="stable")
    lengths = np.array([len(texts[i]) for i in longest_first])
    letters = np.frombuffer(b"".join(texts[i] for i in longest_first), np.uint8)
    begins = np.cumsum(lengths) - lengths
    for place in range(lengths[0]):
        longer = longest_first[: int(np.sum(lengths > place))]
        letter = letters[begins[: len(longer)] + place]
        states[:, longer] = moves[states[:, longer], letter]
        hit[:, longer] |= ends[states[:, longer]]
    states[:, -1] = 0  # an unknown token matches nothing
    table = states * 2 + hit
    table.flags.writeable = False
    return table.astype(np.int16)


def _automaton(patterns: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(`moves[state, byte]`, `ends[state]`); state 0 is the beginning."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    moves = np.zeros((len(children), 256), np.int16)
    falls_back_to = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        back = falls_back_to[state]
        ends[state] |= ends[back]
        moves[state] = moves[back]
        for byte, child in children[state].items():
            falls_back_to[child] = moves[back, byte] if state else 0
            moves[state, byte] = child
            queue.append(child)
    return moves, np.array(ends)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """What each token adds to a text, by id; bytes, since a token may hold a part of a letter."""
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    byte_level, byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    letters = {letter: byte for byte, letter in byte_letters().items()} if byte_level else {}
    # Decoders drop the space in front of a text: so every token is decoded behind the same beginning.
    beginning = tokenizer.encode("a", add_special_tokens=False).ids
    begun = tokenizer.decode(beginning, skip_special_tokens=False)
    size = max(tokenizer.get_vocab().values()) + 1
    names = [tokenizer.id_to_token(i) or "" for i in range(size)]
    rows = [[*beginning, i] for i in range(size)]
    texts = []
    for name, whole in zip(names, tokenizer.decode_batch(rows, skip_special_tokens=False), strict=True):
        if byte_level and name and all(letter in letters for letter in name):
            texts.append(bytes(letters[letter] for letter in name))
        elif byte_fallback and len(name) == 6 and name.startswith("<0x"):
            texts.append(bytes([int(name[3:5], 16)]))
        else:
            texts.append((whole.removeprefix(begun) if name else "").encode())
    return texts

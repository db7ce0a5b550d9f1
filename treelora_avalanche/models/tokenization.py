"""From a prompt and an answer to the tokens of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

MIN_PROMPT = 32
"""Tokens of a prompt that stay, where an answer would take all the room."""

_MARK = "\ue000"  # of Unicode's private use


class EncodedSample(NamedTuple):
    """A prompt and its answer as one sequence of tokens.

    :param tokens: prompt, answer, end token.
    :param n_prompt: how many of them are the prompt's.
    :param n_cut: tokens of the answer that did not fit; its end token is then missing too.
    :param n_dropped: tokens of the prompt that did not fit.
    """

    tokens: list[int]
    n_prompt: int
    n_cut: int
    n_dropped: int = 0


class _EncodedPrompt(NamedTuple):
    """The tokens of a prompt in three parts, of which only the middle one may be shortened."""

    head: list[int]
    body: list[int]
    tail: list[int]

    @property
    def n_fixed(self) -> int:
        return len(self.head) + len(self.tail)

    def shortened(self, room: int) -> list[int]:
        """At most ``room`` tokens; what goes first is the beginning of the body."""
        kept = min(len(self.body), max(0, room - self.n_fixed))
        return [*self.head, *self.body[len(self.body) - kept :], *self.tail]


def end_token(tokenizer: Any) -> int:
    """Id of the token that ends an answer.

    :param tokenizer: a tokenizer of transformers.
    :raises ValueError: if it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no end token, and without one a model "
            "cannot learn where an answer ends; set `tokenizer.eos_token` to one of its tokens."
        )
    return int(tokenizer.eos_token_id)


def encode_prompt(tokenizer: Any, prompt: str, room: int) -> list[int]:
    """The tokens of a prompt, ready to be answered.

    A tokenizer with a chat template puts the prompt into a turn of the user, and opens the turn of
    the assistant; without one the prompt stands as it is, as in TRACE. Where it is too long its
    *end* is kept, and with it all that the template adds around it.

    :param tokenizer: a tokenizer of transformers.
    :param prompt: the text.
    :param room: how many tokens there may be.
    :raises ValueError: if not even the template fits.
    """
    encoded = _encode(tokenizer, prompt)
    if room <= encoded.n_fixed:
        raise ValueError(
            f"there is room for {max(room, 0)} tokens of a prompt, and what the tokenizer puts "
            f"around it alone has {encoded.n_fixed}; raise `max_length`, or lower the number of "
            "new tokens."
        )
    return encoded.shortened(room)


def encode_sample(tokenizer: Any, prompt: str, answer: str, max_length: int) -> EncodedSample:
    """The tokens of a prompt, its answer, and the end token.

    What is too long loses the beginning of its prompt, but for :data:`MIN_PROMPT` tokens. Only an
    answer that does not fit beside these loses its end; ``n_cut`` tells.

    :param tokenizer: a tokenizer of transformers.
    :param prompt: the prompt, see :func:`encode_prompt`.
    :param answer: the answer, not empty.
    :param max_length: how many tokens there may be in all.
    :raises ValueError: if the tokenizer has no end token, or there is no room for an answer.
    """
    encoded = _encode(tokenizer, prompt)
    full = [
        *tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"],
        end_token(tokenizer),
    ]
    least = encoded.n_fixed + min(len(encoded.body), MIN_PROMPT)
    if max_length <= least:
        raise ValueError(
            f"`max_length` is {max_length}, and {least} tokens of the prompt are kept whatever its "
            "answer, so that there is no room for one; raise it."
        )
    kept = full[: max_length - least]
    tokens = encoded.shortened(max_length - len(kept))
    n_dropped = encoded.n_fixed + len(encoded.body) - len(tokens)
    return EncodedSample([*tokens, *kept], len(tokens), len(full) - len(kept), n_dropped)


def _encode(tokenizer: Any, prompt: str) -> _EncodedPrompt:
    templated = tokenizer.chat_template is not None
    text = _in_template(tokenizer, prompt) if templated else prompt
    if not tokenizer.is_fast:  # it cannot tell which token stands for which characters
        tokens = tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return _EncodedPrompt([], tokens, [])
    encoded = tokenizer(
        text, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False
    )
    start, end = 0, len(text)
    if templated:  # found by a mark, as the prompt's own words may stand in the template too
        empty = _in_template(tokenizer, _MARK)
        start = empty.index(_MARK)
        end -= len(empty) - start - len(_MARK)
    return _split(encoded["input_ids"], encoded["offset_mapping"], start, end)


def _in_template(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return text


def _split(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], start: int, end: int
) -> _EncodedPrompt:
    """Parts before, within and after the characters ``start`` to ``end``."""
    within = [i for i, (a, b) in enumerate(offsets) if a < b and a >= start and b <= end]
    if not within:
        return _EncodedPrompt(list(tokens), [], [])
    first, last = within[0], within[-1] + 1
    return _EncodedPrompt(list(tokens[:first]), list(tokens[first:last]), list(tokens[last:]))

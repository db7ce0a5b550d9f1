"""Tokenization of a prompt and its answer as one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

MIN_PROMPT = 32
"""Tokens of a prompt that are kept, where an answer would take all the room."""

_MARK = "\ue000"  # of Unicode's private use


class EncodedSample(NamedTuple):
    """Prompt and answer as one token sequence.

    >>> sample = EncodedSample(tokens=[5, 6, 7, 2], n_prompt=2, n_cut=0)
    >>> sample.tokens[sample.n_prompt :]
    [7, 2]

    :param tokens: prompt, answer, end token.
    :param n_prompt: number of tokens of the prompt.
    :param n_cut: tokens of the answer that did not fit; its end token is then missing too.
    :param n_dropped: tokens of the prompt that did not fit.
    """

    tokens: list[int]
    n_prompt: int
    n_cut: int
    n_dropped: int = 0


class _EncodedPrompt(NamedTuple):
    """Tokens of a prompt in three parts, of which only the middle one may be shortened."""

    head: list[int]
    body: list[int]
    tail: list[int]

    @property
    def n_fixed(self) -> int:
        return len(self.head) + len(self.tail)

    def shortened(self, room: int) -> list[int]:
        """Returns at most ``room`` tokens; the beginning of the body is dropped first."""
        kept = min(len(self.body), max(0, room - self.n_fixed))
        return [*self.head, *self.body[len(self.body) - kept :], *self.tail]


def end_token(tokenizer: Any) -> int:
    """Returns the id of the token that ends an answer.

    :param tokenizer: a tokenizer of transformers.
    :raises ValueError: if it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`tokenizer` should have an end token, from which a model learns where an answer "
            f"ends, but this {type(tokenizer).__name__} has none. Set `tokenizer.eos_token` to one "
            "of its tokens."
        )
    return int(tokenizer.eos_token_id)


def names_special_token(tokenizer: Any, text: str) -> bool:
    """Returns whether a user's text contains the name of a special token, such as ``</s>``.

    Such a text is encoded with ``split_special_tokens=True``, so that the name stays text: an end
    token within a text would teach a model to stop there.

    :param tokenizer: a tokenizer of transformers.
    :param text: the text.
    """
    # In lower case, as a tokenizer that lowers texts may find its tokens in them afterwards.
    lowered = text.lower()
    return any(
        token.special and token.content.lower() in lowered
        for token in tokenizer.added_tokens_decoder.values()
    )


def encode_prompt(tokenizer: Any, prompt: str, room: int) -> list[int]:
    """Returns the tokens of a prompt, after which the answer follows.

    A tokenizer with a chat template puts the prompt into a turn of the user, and opens the turn of
    the assistant; without one the prompt is left as it is, as in TRACE. Where it is too long, its
    *end* is kept, and all that the template adds around it.

    :param tokenizer: a tokenizer of transformers.
    :param prompt: the text.
    :param room: maximal number of tokens.
    :raises ValueError: if not even the template fits.
    """
    encoded = _encode(tokenizer, prompt)
    if room <= encoded.n_fixed:
        raise ValueError(
            f"the room for a prompt should be above {encoded.n_fixed} tokens, which the chat "
            f"template alone takes, but is {max(room, 0)}. Raise `max_length`, or lower the number "
            "of new tokens."
        )
    return encoded.shortened(room)


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Returns the tokens of an answer and the end token.

    :param tokenizer: a tokenizer of transformers.
    :param answer: the text.
    :raises ValueError: if the tokenizer has no end token.
    """
    return [
        *tokenizer(
            answer,
            add_special_tokens=False,
            verbose=False,
            split_special_tokens=names_special_token(tokenizer, answer),
        )["input_ids"],
        end_token(tokenizer),
    ]


def encode_sample(tokenizer: Any, prompt: str, answer: str, max_length: int) -> EncodedSample:
    """Returns the tokens of a prompt, its answer, and the end token.

    A sample that is too long loses the beginning of its prompt, up to :data:`MIN_PROMPT` tokens.
    Only an answer that does not fit next to these loses its end, see ``n_cut``.

    :param tokenizer: a tokenizer of transformers.
    :param prompt: the prompt, see :func:`encode_prompt`.
    :param answer: the answer, not empty.
    :param max_length: maximal number of tokens in all.
    :raises ValueError: if the tokenizer has no end token, or there is no room for an answer.
    """
    encoded = _encode(tokenizer, prompt)
    full = encode_answer(tokenizer, answer)
    least = encoded.n_fixed + min(len(encoded.body), MIN_PROMPT)
    if max_length <= least:
        raise ValueError(
            f"`max_length` should be above {least}, the tokens of the prompt that are always kept, "
            f"but is {max_length}. Raise it to make room for an answer."
        )
    kept = full[: max_length - least]
    tokens = encoded.shortened(max_length - len(kept))
    n_dropped = encoded.n_fixed + len(encoded.body) - len(tokens)
    return EncodedSample([*tokens, *kept], len(tokens), len(full) - len(kept), n_dropped)


def _encode(tokenizer: Any, prompt: str) -> _EncodedPrompt:
    templated = tokenizer.chat_template is not None
    text = _in_template(tokenizer, prompt) if templated else prompt
    start, end = 0, len(text)
    if templated:  # found by a mark, as the template may contain the prompt's own words
        empty = _in_template(tokenizer, _MARK)
        start = empty.index(_MARK)
        end -= len(empty) - start - len(_MARK)
    as_text = names_special_token(tokenizer, text[start:end])
    if templated and as_text:  # the template's own special tokens stay what they are
        parts = [(text[:start], False), (text[start:end], True), (text[end:], False)]
        return _EncodedPrompt(
            *(
                tokenizer(part, add_special_tokens=False, split_special_tokens=split)["input_ids"]
                for part, split in parts
            )
        )
    if not tokenizer.is_fast:  # a slow one gives no offsets of tokens in the text
        tokens = tokenizer(text, add_special_tokens=not templated, split_special_tokens=as_text)[
            "input_ids"
        ]
        return _EncodedPrompt([], tokens, [])
    encoded = tokenizer(
        text,
        add_special_tokens=not templated,
        split_special_tokens=as_text,
        return_offsets_mapping=True,
        verbose=False,
    )
    return _split(encoded["input_ids"], encoded["offset_mapping"], start, end)


def _in_template(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return text


def _split(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], start: int, end: int
) -> _EncodedPrompt:
    """Splits tokens into those before, within and after the characters ``start`` to ``end``."""
    within = [i for i, (a, b) in enumerate(offsets) if a < b and a >= start and b <= end]
    if not within:
        return _EncodedPrompt(list(tokens), [], [])
    first, last = within[0], within[-1] + 1
    return _EncodedPrompt(list(tokens[:first]), list(tokens[first:last]), list(tokens[last:]))

"""Shortens the document's text until prompt and answer fit the length budget; nothing else is ever touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from labeltune.errors import PromptError
from labeltune.prompts.template import ChatTemplate, Conversation, Encoded

Side = Literal["head", "tail", "head_tail"]

#: Stands between the two halves that `head_tail` keeps.
ELLIPSIS = "…"


def encode_to_fit(
    template: ChatTemplate,
    conversation: Conversation,
    answer: str | None,
    max_length: int,
    side: Side = "head",
    *,
    where: str = "",
    reserve: int = 0,
) -> Encoded:
    """Encode, shortening `conversation.text` as little as needed for at most `max_length` tokens in all.

    Every attempt tokenizes the whole conversation again, because cutting a text may change how its ends merge with
    their neighbours.

    Args:
        side: which part of the text stays.
        where: `file:line` for the error message.
        reserve: tokens kept free behind the prompt for any answer, so that the prompt is the same with and without one.

    Raises:
        PromptError: instruction, candidates and answer alone exceed `max_length`; the message says by how many tokens.
    """
    encoded = template.encode(conversation, answer)
    excess = needed_tokens(encoded, reserve) - max_length
    if excess <= 0:
        return encoded
    text, (begin, end) = encoded.text, encoded.text_chars
    spans = [
        (max(a, begin) - begin, min(b, end) - begin) for a, b in encoded.offsets[slice(*encoded.text_span)]
    ]
    keep = len(spans) - excess
    whole = excess
    while True:
        keep = max(keep, 0)
        shortened = template.encode(conversation.with_text(_shorten(text, spans, keep, side)), answer)
        excess = needed_tokens(shortened, reserve) - max_length
        if excess <= 0:
            return replace(shortened, excess=whole)
        if keep == 0:
            raise PromptError(
                f"{where + ': ' if where else ''}instruction, candidates and answer alone need {max_length + excess} tokens, "
                f"{excess} more than prompt.max_length={max_length}; raise prompt.max_length or shorten prompt and labels"
            )
        keep -= excess


def needed_tokens(encoded: Encoded, reserve: int) -> int:
    """Tokens of a conversation, with room for any answer (`reserve`) behind its prompt."""
    return max(len(encoded.ids), encoded.answer_span[0] + reserve)


def _shorten(text: str, spans: list[tuple[int, int]], keep: int, side: Side) -> str:
    """The characters of `keep` tokens; `spans` are the tokens' characters."""
    if keep == 0:
        return ""
    if side == "head":
        return text[: spans[keep - 1][1]]
    if side == "tail":
        return text[spans[len(spans) - keep][0] :]
    head = (keep + 1) // 2
    tail = keep - head
    end = spans[len(spans) - tail][0] if tail else len(text)
    head_end = spans[head - 1][1]
    return text[:head_end] + ELLIPSIS + text[max(end, head_end) :]

"""Prompts that hold a document."""

from __future__ import annotations

from collections.abc import Sequence

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel


def in_context_prompt(
    base: BaseModel, document: Sequence[int], question: str, max_new_tokens: int
) -> list[int]:
    """The prompt with the document in it, as much of its beginning as fits into the window.

    Args:
      document: tokens of the document.
      max_new_tokens: room to leave for the answer, in tokens.

    Raises:
      UserError: the question alone does not fit.
    """
    room = base.config.max_length - max_new_tokens
    tail = '\n\n' + question
    kept = min(len(document), room)
    # Tokens may merge differently next to the question, so what fits is measured.
    while kept >= 0:
        prompt = base.tokenizer.prompt(base.tokenizer.decode(document[:kept]) + tail)
        if len(prompt) <= room:
            return prompt
        kept -= len(prompt) - room
    raise UserError(
        f'the question does not fit into the window of {base.config.max_length} tokens '
        f'of {base.name}; shorten it'
    )

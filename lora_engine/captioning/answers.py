"""Finds the tokens of short answers, by which a chat model is asked for probabilities instead of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import BaseModelError


def answer_tokens(tokenizer: Any, answers: Sequence[str]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Returns the token of the space before an answer, if it has one of its own, and the tokens of each answer.

    A tokenizer writes ` 3` as one token, or as a space and `3` (Llama does so with `3` too).

    Args:
        tokenizer: The tokenizer of the model.
        answers: The answers, of one character each.

    Returns:
        At most one token, which may come before an answer, and the tokens of each answer: first the one without a
        space.

    Raises:
        BaseModelError: The tokenizer splits an answer, or does not tell two apart.
    """
    spaces: list[int] = []
    tokens: list[tuple[int, ...]] = []
    for answer in answers:
        bare, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, f" {answer}"))
        spaces += [ids[0] for ids in (bare, spaced) if len(ids) == 2][:1]
        tokens.append(tuple(dict.fromkeys((bare[-1], *(spaced if len(spaced) == 1 else ())))))
        if len(bare) > 2:
            raise BaseModelError(f"the tokenizer of the model splits the answer {answer!r} into {len(bare)} tokens")
    known = [token for ids in tokens for token in ids]
    if len(set(known)) < len(known):
        raise BaseModelError(f"the tokenizer of the model does not tell the answers {', '.join(answers)} apart")
    return list(dict.fromkeys(spaces))[:1], tokens


def followed_by(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Returns the inputs of a model, for one image and text, with tokens after the text.

    Args:
        inputs: `input_ids` and `attention_mask` [1, n], and others; those of the same shape are 0 at the new tokens.
        tokens: The tokens.
    """
    ids: Tensor = inputs["input_ids"]
    following = ids.new_tensor([list(tokens)]).reshape(1, len(tokens))
    fills = {"input_ids": following, "attention_mask": torch.ones_like(following)}
    return {
        name: torch.cat([value, fills.get(name, torch.zeros_like(following)).to(value.dtype)], dim=1)
        if value.shape == ids.shape
        else value
        for name, value in inputs.items()
    }

"""Measures how images relate to real images, prompts and each other. Pure functions of embeddings of length 1.

Every function returns one value per row, which the caller averages per independent unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_engine.errors import SettingsError


def paired_similarity(images: Tensor, reference: Tensor) -> Tensor:
    """Returns the cosine of each image with its own reference.

    Args:
        images: [n, d].
        reference: [n, d], or [d] for all images; an image, or the text of a prompt.

    Returns:
        [n], -1 to 1.
    """
    return (images * reference).sum(dim=-1)


def prompt_margin(images: Tensor, texts: Tensor, own: int) -> Tensor:
    """Returns how much better each image fits its own prompt than the average other prompt.

    An overfitted adapter draws the same image whatever the prompt says: its margin is 0.

    Args:
        images: Images of one prompt, [n, d].
        texts: All prompts, [prompts, d]; two or more.
        own: Row of the images' prompt.

    Returns:
        [n]: cosine with the own prompt minus the mean cosine with the others.

    Raises:
        SettingsError: There is one prompt only.
    """
    if len(texts) < 2:
        raise SettingsError("prompt sensitivity compares prompts, and there is one", remedy="give several prompts")
    cosines = images @ texts.T
    others = (cosines.sum(dim=1) - cosines[:, own]) / (len(texts) - 1)
    return cosines[:, own] - others


def seed_distance(images: Tensor) -> Tensor:
    """Returns the mean distance of each image from the others of the same prompt: the diversity of a prompt.

    Args:
        images: Images of one prompt with different seeds, [n, d]; two or more.

    Returns:
        [n]: mean of 1 - cosine over the other images; their mean is the mean over all pairs.

    Raises:
        SettingsError: There is one image only.
    """
    count = len(images)
    if count < 2:
        raise SettingsError("diversity compares the seeds of a prompt, and there is one", remedy="set seeds: 2 or more")
    return 1.0 - ((images @ images.T).sum(dim=1) - images.square().sum(dim=1)) / (count - 1)


def subject_similarity(images: Tensor, subject: Tensor) -> Tensor:
    """Returns the mean cosine of each image with all images of the subject.

    Args:
        images: [n, d].
        subject: [m, d].

    Returns:
        [n].
    """
    return images @ subject.mean(dim=0)


def nearest_similarity(images: Tensor, candidates: Tensor, among: int | None = None) -> Tensor:
    """Returns the expected cosine of each image with the nearest of some candidates.

    The nearest of many is nearer than the nearest of few. To compare two sets of different sizes, draw equally many
    from both: the value is the exact mean over all subsets of that size.

    Args:
        images: [n, d].
        candidates: [m, d].
        among: Size of the subsets, 1 to m; None takes all candidates.

    Returns:
        [n].
    """
    count = len(candidates)
    size = count if among is None else among
    if not 1 <= size <= count:
        raise SettingsError(f"{size} of {count} candidates cannot be drawn", allowed=f"1 to {count}")
    ordered = (images @ candidates.T).double().sort(dim=1, descending=True).values
    # The k-th nearest is the nearest of a subset that has it and none of the k nearer ones.
    shares, remaining = [], 1.0
    for k in range(count - size + 1):
        share = remaining * size / (count - k)
        shares.append(share)
        remaining -= share
    weights = torch.tensor(shares, dtype=ordered.dtype, device=ordered.device)
    return (ordered[:, : len(shares)] @ weights).to(images.dtype)

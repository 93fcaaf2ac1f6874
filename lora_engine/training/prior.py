"""Class pictures, kept in training so that it does not drift from them: a dataset's, or what the base itself draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.inference.generate import generate
from lora_engine.seeds import derive_seed
from lora_engine.training.examples import Example, Size
from lora_engine.training.spec import Prior

_AT_ONCE = 8


def prior_prompts(prior: Prior, class_word: str | None) -> tuple[str, ...]:
    """The prompts of the class pictures.

    Raises:
        SettingsError: There is neither a prompt nor a class word.
    """
    if prior.prompt:
        return (prior.prompt,) if isinstance(prior.prompt, str) else prior.prompt
    if not class_word:
        raise SettingsError(
            "dreambooth does not know what class the pictures belong to",
            remedy="give class_word in the caption step, give prior a prompt, or use method finetune",
        )
    article = "an" if class_word[0].lower() in "aeiou" else "a"
    return (f"{article} {class_word}",)


def read_class_images(
    folder: Path, prior: Prior, class_word: str | None, sizes: Collection[Size]
) -> tuple[Example, ...]:
    """The training pictures of a dataset as class pictures; those without a caption get the prompts, taking turns.

    Args:
        folder: A dataset.
        prior: For the prompts and the way of the batches.
        class_word: Of the person's pictures; where there is none, that of the dataset.
        sizes: Of the person's pictures.

    Raises:
        DataError: It holds no pictures, or joint batches would have sizes without class pictures.
        SettingsError: A picture without a caption, and neither a prompt nor a class word.
    """
    manifest = Manifest.load(folder)
    pictures = manifest.of_split("train")
    if not pictures:
        raise DataError("there are no class pictures", where=str(folder), remedy="add some, or leave class_dataset out")
    bare = [picture for picture in pictures if not picture.caption.strip()]
    prompts = prior_prompts(prior, class_word or manifest.class_word) if bare else ()
    turns = cycle(prompts)
    found = tuple(
        Example(
            folder / picture.file,
            sha256_file(folder / picture.file),
            picture.caption if picture.caption.strip() else next(turns),
            (picture.height, picture.width),
        )
        for picture in pictures
    )
    missing = sorted(set(sizes) - {example.size for example in found})
    if missing and prior.batches == "joint":
        height, width = missing[0]
        raise DataError(
            f"{len(missing)} of the sizes to train in have no class pictures, first {height} x {width}",
            where=str(folder),
            remedy="preprocess both datasets alike, or set prior.batches to alternating",
        )
    return found


@dataclass(frozen=True)
class ClassImages:
    """Draws class pictures, and keeps them; those that are there already are not drawn again.

    Attributes:
        base: The base, with nothing attached to it.
        prior: How they are drawn.
        prompts: See `prior_prompts`; they take turns.
        folder: Where they are kept, under a name that says everything they depend on.
        seed: Of the run.
        check: Called as they are drawn, with their number so far; may raise to stop.
    """

    base: BaseModel
    prior: Prior
    prompts: tuple[str, ...]
    folder: Path
    seed: int
    check: Callable[[int], None]

    def draw(self, sizes: Sequence[Size]) -> tuple[Example, ...]:
        """Class pictures in the sizes of the person's pictures: spread over them in proportion, at least one each."""
        found: list[Example] = []
        for size, share in sorted(Counter(sizes).items()):
            count = max(1, round(self.prior.count * share / len(sizes)))
            for first in range(0, count, _AT_ONCE):
                self.check(len(found))
                numbers = range(first, min(first + _AT_ONCE, count))
                prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
                files = self._draw_batch(size, numbers, prompts)
                found += [
                    Example(file, sha256_file(file), prompt, size) for file, prompt in zip(files, prompts, strict=True)
                ]
        self.check(len(found))
        return tuple(found)

    def _draw_batch(self, size: Size, numbers: range, prompts: list[str]) -> list[Path]:
        # A batch that is there in part is drawn again whole, so that a run which was stopped here ends up with the
        # same bytes.
        key = {
            "base": self.base.fingerprint,
            "device": self.base.device.type,
            "dtype": str(self.base.dtype) if self.base.quantisation == "none" else self.base.quantisation,
            "prompts": prompts,
            "size": list(size),
            "steps": self.prior.steps,
            "guidance": self.prior.guidance,
            "seed": self.seed,
            "numbers": [numbers.start, numbers.stop],
        }
        folder = self.folder / sha256_bytes(canonical_json(key))[:32]
        files = [folder / f"{number:05d}.png" for number in numbers]
        if all(file.is_file() for file in files):
            return files
        pictures = generate(
            self.base,
            prompts,
            seeds=[derive_seed(self.seed, "class picture", *size, number) for number in numbers],
            steps=self.prior.steps,
            guidance=self.prior.guidance,
            height=size[0],
            width=size[1],
            batch=_AT_ONCE,
        )
        for file, picture in zip(files, pictures, strict=True):
            write_png(file, picture)
        return files

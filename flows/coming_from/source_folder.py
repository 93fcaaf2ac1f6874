"""Reads one folder of images of another trainer's settings: a subset, dataset or concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.coming_from.options import options_of
from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import number, truth

_REPEATS = ("concepts.balancing", "num_repeats", "dataset_repeats", "datasets.num_repeats", "repeats")


@dataclass(frozen=True)
class SourceFolder:
    """A folder of images as another trainer describes it.

    Attributes:
        folder: The setting with its path; None without one.
        is_class: True for class images.
        repeats: Number of times that its images occur per epoch.
        caption: The setting with the caption of images that have none.
        options: Its other options.
        unused: Options that are not carried over, with reasons; `folder` means all of it.
    """

    folder: Setting | None
    is_class: bool
    repeats: int
    caption: Setting | None
    options: tuple[Setting, ...]
    unused: tuple[tuple[Setting, str], ...]

    @classmethod
    def of(cls, settings: Sequence[Setting], trainer: str) -> SourceFolder:
        """Returns the subset of the settings that belong to one folder.

        Raises:
            SpecError: A value has the wrong type.
        """
        by_name = {setting.name: setting for setting in settings}
        folder = next(
            (s for name, s in by_name.items() if name.rpartition(".")[2] in ("image_dir", "folder_path", "path")), None
        )
        counted = next((by_name[name] for name in _REPEATS if name in by_name), None)
        repeats = 1 if counted is None else max(1, round(number(counted)))
        known = options_of(trainer)
        ours = {name: known[name].ours for name in by_name if name in known}
        outside = {"ingest.images", "ingest.repeats", "caption.template"}
        own = ("is_reg", "enabled", "name", "type", "balancing_strategy")
        rest = tuple(s for s in settings if ours.get(s.name) not in outside and s.name.rpartition(".")[2] not in own)
        kind = str(by_name["concepts.type"].value).upper() if "concepts.type" in by_name else "STANDARD"
        is_class = kind == "PRIOR_PREDICTION" or any(
            truth(by_name[name]) for name in ("is_reg", "datasets.is_reg") if name in by_name
        )
        caption = by_name.get("class_tokens") or by_name.get("datasets.default_caption")
        unused = []
        if folder is not None and "concepts.enabled" in by_name and not truth(by_name["concepts.enabled"]):
            unused.append((folder, "the concept is disabled"))
        elif folder is not None and kind == "VALIDATION":
            unused.append((folder, "a concept for validation; set heldout of the step ingest"))
        strategy = by_name.get("concepts.balancing_strategy")
        if counted is not None and strategy is not None and str(strategy.value).upper() == "SAMPLES":
            unused.append((counted, "a number of samples; a dataset has repeats, and 1 was taken"))
            repeats = 1
        elif counted is not None and number(counted) != repeats:
            unused.append((counted, f"repeats are whole numbers; {repeats} was taken"))
        return cls(folder, is_class, repeats, caption, rest, tuple(unused))

    def is_used(self, translation: Translation) -> bool:
        """Notes what of it is not used; returns False for all of it."""
        for setting, reason in self.unused:
            translation.drop(setting, reason)
        return all(setting is not self.folder for setting, _ in self.unused)

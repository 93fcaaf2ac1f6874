"""Selects the steps of a partial run: `--only`, `--from` and `--to`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flows.refusals import nearest
from tasks.errors import SpecError
from tasks.spec import StepSpec


@dataclass(frozen=True)
class Selection:
    """The steps of a partial run; without any name, all steps.

    Attributes:
        only: Just these steps.
        begin: These steps and everything after them.
        end: These steps and what they need; with `begin`, of the steps that it selects.
    """

    only: Sequence[str] = ()
    begin: Sequence[str] = ()
    end: Sequence[str] = ()

    @property
    def is_partial(self) -> bool:
        """Returns True if it may leave out steps."""
        return bool(self.only or self.begin or self.end)

    def to_json(self) -> dict[str, list[str]]:
        """Returns the options that are set, as lineage records them."""
        options = {"only": self.only, "from": self.begin, "to": self.end}
        return {name: list(names) for name, names in options.items() if names}

    def choose(self, steps: Mapping[str, StepSpec]) -> frozenset[str]:
        """Returns the names of the selected steps.

        Args:
            steps: All steps by name, each after its upstream steps.

        Raises:
            SpecError: A name is that of no step, the options exclude each other, or no step is left.
        """
        for option, names in (("--only", self.only), ("--from", self.begin), ("--to", self.end)):
            for name in names:
                if name not in steps:
                    raise SpecError(f"unknown step {name!r}", where=option, **nearest(name, steps))
        if self.only and (self.begin or self.end):
            raise SpecError("--only with --from or --to", where="--only", remedy="leave one of them out")
        if self.only:
            return frozenset(self.only)
        chosen = set(steps)
        if self.begin:
            chosen &= _downstream(self.begin, steps)
        if self.end:
            chosen &= upstream_steps(self.end, steps)
        if not chosen:
            begin, end = ", ".join(self.begin), ", ".join(self.end)
            raise SpecError(f"no step is after {begin} and before {end}", where="--from", remedy="swap the two")
        return frozenset(chosen)


ALL_STEPS = Selection()


def upstream_steps(names: Iterable[str], steps: Mapping[str, StepSpec]) -> set[str]:
    """Returns steps and everything that they need."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in steps and name not in found:
            found.add(name)
            queue += sources_of(steps[name], steps)
    return found


def sources_of(step: StepSpec, steps: Collection[str]) -> list[str]:
    """Returns the steps of the file that a step takes from, or that its condition is about."""
    return [target for _, target, _ in (*step.references(), *step.conditions()) if target in steps]


def _downstream(names: Sequence[str], steps: Mapping[str, StepSpec]) -> set[str]:
    found = set(names)
    for name, step in steps.items():  # each after its upstream steps
        if found.intersection(sources_of(step, steps)):
            found.add(name)
    return found

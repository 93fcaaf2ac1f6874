"""Defines `Translation`: a pipeline as data, with the origin of each setting and what was left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from flows.coming_from.read import Setting

_SECRET = re.compile(r"token$|api_key|secret|password", re.IGNORECASE)


@dataclass
class Translation:
    """A pipeline as data.

    Attributes:
        steps: Kind of step -> its settings; `file` has base, name and seed.
        origins: `step.setting` -> the option that it is from.
        dropped: (option, value, reason) of what could not be carried over.
        counts: Numbers and flags that are turned into settings later, such as `epochs`, and `warmup` as a share.
        texts: Texts that are turned into settings later, such as the sampler of all sample prompts.
    """

    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, Any, str]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def set(self, path: str, value: Any, origin: str) -> None:
        """Sets a value at `step.setting`; `setting` may have several parts. An earlier one is replaced."""
        *parents, key = path.split(".")
        node: dict[str, Any] = self.steps
        for parent in parents:
            inner = node.setdefault(parent, {})
            if not isinstance(inner, dict):
                inner = node[parent] = {"name": inner}
            node = inner
        if isinstance(node.get(key), dict) and not isinstance(value, dict):
            node[key]["name"] = value  # options of it are known
        else:
            node[key] = value
        self.origins[path] = origin

    def get(self, path: str) -> Any:
        """Returns the value at `step.setting`; None if there is none."""
        node: Any = self.steps
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def name_of(self, path: str) -> Any:
        """Returns a value that is a name, or a mapping with a name and options; None if there is none."""
        value = self.get(path)
        return value.get("name") if isinstance(value, dict) else value

    def remove(self, path: str, reason: str = "") -> None:
        """Removes the value at `step.setting`, if there is one; notes it if there is a reason."""
        parent, _, key = path.rpartition(".")
        node = self.get(parent)
        if isinstance(node, dict) and key in node:
            origin, value = self.origins.pop(path, path), node.pop(key)
            if reason:
                self.drop(Setting(origin, value, ""), reason)

    def drop(self, setting: Setting, reason: str) -> None:
        """Notes an option that is not carried over; the values of keys and tokens are not kept."""
        value = "(not shown)" if _SECRET.search(setting.name) else setting.value
        self.dropped.append((setting.name, value, reason))

"""Mutators of data as JSON and YAML hold it: mappings, lists, text and numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

import yaml

from tests.fuzz.mutate_bytes import NUMBERS, PIECES, mutate_text

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 10**6, 2**31, 2**53, 2**63, 2**64, 10**30, 10**120),
    *(
        0.0,
        -0.0,
        0.5,
        1.5,
        1e-300,
        1e30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        [],
        {},
        [[]],
        [{}],
        {"": None},
    ),
    *([1, 2], ["a", "a"], [0] * 2000, {"a": {"a": {"a": {}}}}, {"name": "x"}, *PIECES),
)


def mutate_json(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns JSON with another value or key; of text that is no JSON, changed text."""
    try:
        data = json.loads(content)
    except ValueError:
        return mutate_text(content, others, random)
    text = json.dumps(mutate_tree(data, random), ensure_ascii=random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def mutate_yaml(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns YAML with another value or key; of text that is no plain YAML, changed text."""
    try:
        data = yaml.safe_load(content)
        text = yaml.safe_dump(mutate_tree(data, random), allow_unicode=random.random() < 0.5, sort_keys=False)
        return text.encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return mutate_text(content, others, random)


def mutate_tree(data: Any, random: Random, times: int | None = None) -> Any:
    """Returns a changed copy of the data."""
    root = {"root": copy.deepcopy(data)}
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        parents = list(_containers(root))
        parent = random.choice(parents)
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        if not keys:
            continue
        _change(parent, random.choice(keys), parents, random)
    return root.get("root", next(iter(root.values()), None))


def _containers(node: Any) -> list[Any]:
    found, queue = [], [node]
    while queue and len(found) < 5000:
        current = queue.pop()
        if isinstance(current, dict | list):
            found.append(current)
            queue.extend(current.values() if isinstance(current, dict) else current)
    return found


def _change(parent: Any, key: Any, parents: Sequence[Any], random: Random) -> None:
    value = parent[key]
    action = random.choice(("value", "value", "number", "text", "delete", "rename", "copy", "nest", "grow"))
    if action == "delete":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[random.choice((*PIECES, f"{key}x", str(key)[:-1], str(key).upper()))] = parent.pop(key)
    elif action == "copy":
        other = random.choice(parents)
        parent[key] = copy.deepcopy(
            random.choice(list(other.values() if isinstance(other, dict) else other) or [value])
        )
    elif action == "nest":
        for _ in range(random.choice((1, 2, 60))):
            value = random.choice(([value], {"a": value}))
        parent[key] = value
    elif action == "grow" and isinstance(value, list) and len(value) < 5000:
        parent[key] = value * random.choice((2, 3, 100))
    elif action == "number" and isinstance(value, int | float):
        parent[key] = random.choice(
            (value + 1, value - 1, -value, value * 2, value / 3, value * 10**6, _number(random))
        )
    elif action == "text" and isinstance(value, str):
        parent[key] = mutate_text(value.encode("utf-8", "surrogatepass"), (), random).decode("utf-8", "surrogateescape")
    else:
        parent[key] = copy.deepcopy(random.choice(VALUES))


def _number(random: Random) -> Any:
    try:
        return json.loads(random.choice(NUMBERS))
    except ValueError:
        return random.randint(-(10**9), 10**9)

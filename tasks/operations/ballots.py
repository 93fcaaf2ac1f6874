"""Shows the pairs of a comparison to a voter without names, and records the votes: from a page or from a table.

Each voter has an order of the pairs and of the sides, half of them each way, which follow from a random salt that is in
the store alone. Images have no metadata, and their names have the position only.
"""

from __future__ import annotations

import csv
import hmac
import io
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from lora_engine.documents import read_table
from lora_engine.files import atomic_write
from registry.entities import AdapterVersion, Event
from registry.errors import VoteError
from registry.home import Home
from registry.policy.actors import establish_actor
from registry.policy.votes import Ballot, BlindComparison
from registry.versions.versions import Versions
from registry.versions.voting import Choice, ballot_of, list_compared, list_comparisons, vote
from tasks.operations.votes import SIDES, ComparedSide, ComparisonIndex, read_index

VoteAnswer = Literal["left", "right", "tie", "skip"]
TABLE = "ballot.csv"
_COLUMNS = ("pair", "vote")
_MAX_TABLE = 1_000_000


@dataclass(frozen=True)
class Position:
    """A pair as one voter sees it.

    Attributes:
        pair: Index of the pair in the comparison.
        left: The side that is shown on the left.
    """

    pair: int
    left: ComparedSide

    def choice_of(self, answer: VoteAnswer) -> Choice:
        """Returns what an answer means."""
        if answer in {"tie", "skip"}:
            return answer
        return self.left if answer == "left" else SIDES[1 - SIDES.index(self.left)]


@dataclass(frozen=True)
class OpenBallot:
    """A comparison as one voter sees it.

    Attributes:
        comparison: What the log has of it.
        index: What is in its artifact.
        positions: The pairs in the voter's order.
        ballot: The votes so far.
    """

    comparison: BlindComparison
    index: ComparisonIndex
    positions: tuple[Position, ...]
    ballot: Ballot

    @property
    def next_position(self) -> int | None:
        """Index of the first position without a vote; None if there is none."""
        return next((at for at, one in enumerate(self.positions) if one.pair not in self.ballot.choices), None)


def order_pairs(count: int, salt: str, voter: str) -> tuple[Position, ...]:
    """Returns the order in which a voter sees pairs, with the candidate on the left in half of them.

    Args:
        count: Number of pairs.
        salt: The salt of the comparison.
        voter: The user; names that differ only in case are one user.
    """

    def rank(purpose: str) -> list[int]:
        key = {pair: _keyed(salt, f"{purpose}\n{voter.casefold()}\n{pair}") for pair in range(count)}
        return sorted(range(count), key=lambda pair: key[pair])

    sides = rank("side")
    # With an odd number, the side of the last one is random too.
    odd = _keyed(salt, f"odd\n{voter.casefold()}")[0] % 2
    left = {pair: SIDES[(place + odd) % 2] for place, pair in enumerate(sides)}
    return tuple(Position(pair, left[pair]) for pair in rank("order"))


def open_ballot(versions: Versions, digest: str, *, actor: str | None = None) -> OpenBallot:
    """Returns a comparison as a user sees it.

    Args:
        versions: The registry.
        digest: Digest of the comparison, or at least 8 digits of it.
        actor: The user; None means this process's user.

    Raises:
        VoteError: There is no such comparison, or more than one.
        StoreError: Its files are missing or damaged.
    """
    user = establish_actor(versions, actor)
    comparison, ballots, _ = find_comparison(versions, digest)
    index = read_index(versions.store, comparison.artifact)
    positions = order_pairs(len(index.pairs), index.salt, user)
    return OpenBallot(comparison, index, positions, ballot_of(ballots, user))


def read_pair(versions: Versions, opened: OpenBallot, position: int) -> tuple[bytes, bytes]:
    """Returns the images on the left and on the right of a position as PNG files, which are verified."""
    shown = opened.positions[position]
    entry = opened.index.pairs[shown.pair]
    sides = (shown.left, SIDES[1 - SIDES.index(shown.left)])
    left, right = (versions.store.read(opened.comparison.artifact, getattr(entry, side)) for side in sides)
    return left, right


def record_answer(
    versions: Versions, opened: OpenBallot, position: int, answer: VoteAnswer, *, actor: str | None = None
) -> Event:
    """Records the vote of a user on a position of the user's ballot; see `registry.versions.voting.vote`.

    Raises:
        VoteError: There is no such position or answer, or the ballot is finished.
        Refused: The user has no role that may vote.
        GoneVersion: One of the versions was withdrawn or deleted.
    """
    if not 0 <= position < len(opened.positions):
        raise VoteError(f"no pair {position + 1}", allowed=f"1 to {len(opened.positions)}")
    if answer not in get_args(VoteAnswer):
        raise VoteError(f"vote {str(answer)[:40]!r}", allowed=", ".join(get_args(VoteAnswer)))
    name, _, number = opened.comparison.candidate.partition("@")
    shown = opened.positions[position]
    return vote(
        versions,
        name,
        int(number),
        comparison=opened.comparison.artifact.sha256,
        pair=shown.pair,
        choice=shown.choice_of(answer),
        left=shown.left,
        actor=actor,
    )


def write_ballot(home: Home, digest: str, folder: Path, *, actor: str | None = None) -> list[Path]:
    """Writes the pairs of a comparison as a user sees them: `01-left.png`, `01-right.png`, and a table to fill in."""
    with closing(Versions(home)) as versions:
        opened = open_ballot(versions, digest, actor=actor)
        width = max(2, len(str(len(opened.positions))))
        paths: list[Path] = []
        for at in range(len(opened.positions)):
            for side, image in zip(("left", "right"), read_pair(versions, opened, at), strict=True):
                paths.append(folder / f"{at + 1:0{width}d}-{side}.png")
                atomic_write(paths[-1], image)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *([at + 1, ""] for at in range(len(opened.positions)))])
    atomic_write(folder / TABLE, table.getvalue().encode())
    return [folder / TABLE, *paths]


def record_table(home: Home, digest: str, table: Path, *, actor: str | None = None) -> tuple[list[Event], OpenBallot]:
    """Records the votes of a filled-in table; rows without a vote are left out. All rows are checked first.

    Raises:
        VoteError: The table or a row cannot be used, or a vote is not taken.
        Refused: The user has no role that may vote.
    """
    with closing(Versions(home)) as versions:
        opened = open_ballot(versions, digest, actor=actor)
        answers = read_answers(table, len(opened.positions))
        events = [record_answer(versions, opened, at, answer, actor=actor) for at, answer in answers.items()]
        return events, open_ballot(versions, digest, actor=actor)


def find_comparison(versions: Versions, digest: str) -> tuple[BlindComparison, list[Ballot], AdapterVersion]:
    """Returns a comparison by its digest, or at least 8 digits of it, with its ballots and its version.

    Raises:
        VoteError: There is none, or more than one.
    """
    text = digest.lower()
    found = [
        (comparison, ballots, version)
        for version in (list_compared(versions, text) if len(text) >= 8 else ())
        for comparison, ballots in list_comparisons(versions, version)
        if comparison.artifact.sha256.startswith(text)
    ]
    if len(found) != 1:
        problem = f"{len(found)} comparisons {digest[:16]!r}" if found else f"no comparison {digest[:16]!r}"
        raise VoteError(problem, remedy="`loraline votes NAME@REF` shows their digests; give 8 digits or more")
    return found[0]


def read_answers(path: Path, count: int) -> Mapping[int, VoteAnswer]:
    """Returns position -> answer of each row of a table with a vote.

    Args:
        path: A CSV table with the columns `pair`, counted from 1, and `vote`.
        count: Number of pairs.

    Raises:
        VoteError: The table or a row cannot be used; names line and column.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TABLE + 1)
    except OSError as error:
        raise VoteError(f"the table cannot be read ({error.strerror})", where=str(path)) from None
    if len(content) > _MAX_TABLE:
        raise VoteError("the table is too large", where=str(path), allowed=f"{_MAX_TABLE:,} bytes")
    answers: dict[int, VoteAnswer] = {}
    for row in read_table(content, str(path), _COLUMNS, VoteError):
        pair, answer = (row.cells.get(column, "").strip().lower() for column in _COLUMNS)
        if not answer and pair:
            continue
        if (
            not pair.isascii()
            or not pair.isdecimal()
            or len(pair) > 6
            or not 1 <= int(pair) <= count
            or int(pair) - 1 in answers
        ):
            raise VoteError(f"pair {pair[:40]!r}", where=row.where, allowed=f"each of 1 to {count} once")
        if answer not in get_args(VoteAnswer):
            raise VoteError(f"vote {answer[:40]!r}", where=row.where, allowed=", ".join(get_args(VoteAnswer)))
        answers[int(pair) - 1] = cast("VoteAnswer", answer)
    if not answers:
        raise VoteError("the table has no vote", where=str(path), allowed=f"a row per pair: {', '.join(_COLUMNS)}")
    return answers


def _keyed(salt: str, text: str) -> bytes:
    return hmac.digest(salt.encode(), text.encode(), "sha256")

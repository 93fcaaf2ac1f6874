"""Reads comparisons and votes from the log, and decides whether a version won enough of them. Writes nothing.

A comparison is a set of pairs of images, drawn with equal seeds by a version and by another one. A vote counts once its
user has judged or skipped every pair of the set: nobody can stop at a result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.entities import AdapterVersion, ArtifactRef
from registry.identity import Actor
from registry.policy.alias_policy import VotesPolicy
from registry.policy.approvals import actor_of, read_makers
from registry.policy.policy_file import Policies
from registry.policy.vote_statistics import CountedVote, VoteSummary, summarize_votes
from registry.store.tables import EventRow

BASE = "base"
"""What a version is compared with if that has no adapter."""
KIND = "comparison"
"""Kind of the artifact with the images."""


@dataclass(frozen=True)
class BlindComparison:
    """A set of pairs of images, as the log has it.

    Attributes:
        artifact: The images and what they were drawn from.
        candidate: `name@version` of the version.
        against: `name@version` of the other one, or `base`.
        prompts: Digest of the prompt of each pair.
        seq: Number of its event.
        actor: The user who prepared it.
    """

    artifact: ArtifactRef
    candidate: str
    against: str
    prompts: tuple[str, ...]
    seq: int
    actor: Actor


@dataclass(frozen=True)
class Ballot:
    """The newest vote of one user on each pair of a comparison.

    Attributes:
        voter: The user.
        choices: Pair -> `candidate`, `against`, `tie` or `skip`, and the side that was shown on the left.
        is_finished: True if the user judged or skipped every pair; only then do the votes count.
    """

    voter: Actor
    choices: Mapping[int, tuple[str, str]]
    is_finished: bool


def compared_digests(version: AdapterVersion, other: AdapterVersion | None) -> dict[str, str | None]:
    """Returns the digests that a comparison is bound to: the adapter files of both."""
    return {"sha256": version.sha256, "against_sha256": other.sha256 if other is not None else None}


def read_comparisons(session: Session, version: AdapterVersion) -> list[BlindComparison]:
    """Returns the comparisons of a version that are bound to its digest and that of the other version, oldest first."""
    found = []
    for row in _events(session, version, "compare"):
        details = row.details if isinstance(row.details, Mapping) else {}
        if details.get("sha256") != version.sha256 or not _is_bound(session, details):
            continue
        artifact = ArtifactRef(KIND, str(details["set"]), int(details["size"]))
        prompts = tuple(map(str, details["prompts"]))
        found.append(BlindComparison(artifact, version.ref, str(details["against"]), prompts, row.seq, actor_of(row)))
    return found


def find_voted_on(session: Session, digest: str = "") -> list[AdapterVersion]:
    """Returns the versions that have a comparison whose digest begins with some digits, the latest comparison first."""
    query = select(EventRow).where(EventRow.action == "compare").order_by(EventRow.seq.desc())
    rows = [row for row in session.scalars(query) if isinstance(row.details, Mapping)]
    refs = [f"{row.name}@{row.after}" for row in rows if str(row.details.get("set")).startswith(digest)]
    found = {version.ref: version for version in queries.find_versions(session, set(refs))}
    return [found[ref] for ref in dict.fromkeys(refs) if ref in found]


def read_ballots(session: Session, version: AdapterVersion, comparison: BlindComparison) -> list[Ballot]:
    """Returns the ballot of each user in a comparison, in the order of their first votes.

    Names that differ only in case are one user.
    """
    choices: dict[str, dict[int, tuple[str, str]]] = defaultdict(dict)
    voters: dict[str, Actor] = {}
    for row in _events(session, version, "vote"):
        details = row.details if isinstance(row.details, Mapping) else {}
        if details.get("set") != comparison.artifact.sha256:
            continue
        voter = actor_of(row)
        voters[voter.casefold()] = voter
        choices[voter.casefold()][int(details["pair"])] = str(details["choice"]), str(details["left"])
    pairs = len(comparison.prompts)
    return [Ballot(voters[name], choices[name], len(choices[name]) == pairs) for name in choices]


def read_votes(
    session: Session, policies: Policies, version: AdapterVersion, against: str, *, by_others: bool = False
) -> VoteSummary:
    """Returns the summary of the votes that count: of finished ballots, and of users who may still vote.

    Args:
        session: Reading or writing.
        policies: The policies of the home.
        version: The version.
        against: `name@version` of the other one, or `base`.
        by_others: True leaves out the users who registered the version.
    """
    makers = {maker.casefold() for maker in read_makers(session, version)} if by_others else set()
    counted = []
    for comparison in read_comparisons(session, version):
        if comparison.against != against:
            continue
        digest = comparison.artifact.sha256
        for ballot in read_ballots(session, version, comparison):
            voter = ballot.voter.casefold()
            if not ballot.is_finished or voter in makers or policies.denial(ballot.voter, "vote", version.name):
                continue
            for pair, (choice, left) in ballot.choices.items():
                prompt = comparison.prompts[pair]
                counted.append(CountedVote(voter, prompt, f"{digest}:{pair}", choice, left))
    return summarize_votes(counted)


def find_opponent(session: Session, version: AdapterVersion, alias: str) -> str | None:
    """Returns what votes against an alias compare a version with: `name@version`, or None if nothing has the alias.

    If the version itself has the alias, that is the version that had it before.
    """
    number = queries.alias_target(session, version.name, alias)
    if number == version.version:
        moves = event_log.read_events(session, version.name, alias, after=version.version)
        number = next((event.before for event in reversed(moves) if event.action != "refuse"), None)
    return None if number is None else f"{version.name}@{number}"


def find_unvoted(session: Session, policies: Policies, version: AdapterVersion, alias: str) -> tuple[str, ...]:
    """Returns why the votes of a version do not suffice for an alias, all reasons at once; empty if they do.

    Args:
        session: Reading, or in the transaction that moves the alias.
        policies: The policies of the home.
        version: The version.
        alias: The alias.
    """
    policy = policies.of(alias).votes
    if policy is None:
        return ()
    against = BASE if policy.against == BASE else find_opponent(session, version, policy.against)
    if against is None:
        missing = f"nothing has the alias {policy.against!r}, so there are no votes against it (votes.missing: skip)"
        return () if policy.missing == "skip" else (missing,)
    summary = read_votes(session, policies, version, against, by_others=policy.by_others)
    return tuple(_unmet(policy, summary, version, against))


def _unmet(policy: VotesPolicy, summary: VoteSummary, version: AdapterVersion, against: str) -> Iterator[str]:
    name, prompts = f"votes against {against}", f"{summary.prompts} prompt{'' if summary.prompts == 1 else 's'}"
    how = f": `loraline vote prepare {version.ref} --against {against}`"
    if summary.votes < policy.at_least:
        yield f"{name}: {summary.votes} of {policy.at_least} are cast in finished ballots{how}"
    voters = sum(rate.votes > 0 for rate in summary.voters.values())
    if voters < policy.voters:
        yield f"{name}: {voters} of {policy.voters} users voted"
    if summary.interval is None or summary.win_rate is None:
        return
    low, high = summary.interval
    if low <= policy.win_rate:
        yield (
            f"{name}: win rate {summary.win_rate:.2f} on {prompts}, {low:.2f} to {high:.2f}; "
            f"its lower bound must exceed {policy.win_rate:g}"
        )


def _is_bound(session: Session, details: Mapping[str, Any]) -> bool:
    """Returns True if the other version of a comparison is the one whose images it has."""
    against = str(details.get("against"))
    others = queries.find_versions(session, [against])
    return against == BASE or [other.sha256 for other in others] == [details.get("against_sha256")]


def _events(session: Session, version: AdapterVersion, action: str) -> Iterator[EventRow]:
    query = select(EventRow).where(
        EventRow.name == version.name, EventRow.after == version.version, EventRow.action == action
    )
    yield from session.scalars(query.order_by(EventRow.seq))

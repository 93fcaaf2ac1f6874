"""Records comparisons and votes in the log. See `registry.policy.votes` for what they mean and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy.orm import Session

from registry import changes, event_log, queries
from registry.entities import AdapterVersion, ArtifactRef, Event
from registry.errors import Refused, VoteError
from registry.identity import Actor
from registry.policy.actors import establish_actor
from registry.policy.policy_file import read_policies
from registry.policy.rights import revoked_upstream
from registry.policy.vote_statistics import VoteSummary
from registry.policy.votes import (
    BASE,
    Ballot,
    BlindComparison,
    compared_digests,
    find_unvoted,
    find_voted_on,
    read_ballots,
    read_comparisons,
    read_votes,
)
from registry.refs import split_ref
from registry.versions.guard import guarded
from registry.versions.versions import Versions

Choice = Literal["candidate", "against", "tie", "skip"]
MAX_PAIRS = 1_000


@guarded("compare")
def log_comparison(
    versions: Versions,
    name: str,
    ref: str | int,
    *,
    against: str,
    artifact: ArtifactRef,
    prompts: Sequence[str],
    actor: str | None = None,
) -> Event:
    """Records a comparison of a version, whose images are in the store.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        against: `name@version` of the other one, or `base`.
        artifact: The images; must be recorded in lineage.
        prompts: Digest of the prompt of each pair, at most `MAX_PAIRS`.
        actor: The user; None means this process's user.

    Raises:
        Refused: The actor has no role that may vote, or something upstream of a version was revoked.
        GoneVersion: One of the versions was withdrawn or deleted.
        VoteError: There is no pair, or there are too many.
    """
    user = establish_actor(versions, actor)
    if not 1 <= len(prompts) <= MAX_PAIRS:
        raise VoteError(f"{len(prompts)} pairs", allowed=f"1 to {MAX_PAIRS}")
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        other = _read_other(session, against)
        _require_usable(session, version, other)
        details = {"set": artifact.sha256, "size": artifact.size, "against": against, "prompts": list(prompts)}
        details |= compared_digests(version, other)
        reason = f"{len(prompts)} pairs against {against}"
        return event_log.log_event(session, "compare", actor=user, reason=reason, version=version, details=details)


@guarded("vote")
def vote(
    versions: Versions,
    name: str,
    ref: str | int,
    *,
    comparison: str,
    pair: int,
    choice: Choice,
    left: Literal["candidate", "against"],
    actor: str | None = None,
) -> Event:
    """Records the vote of a user on one pair; replaces the user's earlier one until the user's ballot is finished.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number of the version.
        comparison: Digest of the comparison's artifact.
        pair: Index of the pair.
        choice: The version that is better, `tie`, or `skip` for a pair that cannot be judged.
        left: The side that was shown on the left.
        actor: The user; None means this process's user.

    Raises:
        Refused: The actor has no role that may vote, or something upstream of a version was revoked.
        GoneVersion: One of the versions was withdrawn or deleted.
        VoteError: There is no such comparison or pair, or the user's ballot is finished.
    """
    user = establish_actor(versions, actor)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        found = _find(read_comparisons(session, version), comparison, version.ref)
        _require_usable(session, version, _read_other(session, found.against))
        if not 0 <= pair < len(found.prompts):
            raise VoteError(f"no pair {pair}", where=version.ref, allowed=f"0 to {len(found.prompts) - 1}")
        if ballot_of(read_ballots(session, version, found), user).is_finished:
            raise VoteError(
                f"{user} has voted on all pairs, and the votes are final",
                where=version.ref,
                remedy="prepare another comparison",
            )
        details = {"set": found.artifact.sha256, "pair": pair, "choice": choice, "left": left}
        reason = f"pair {pair + 1} of {len(found.prompts)}"
        return event_log.log_event(session, "vote", actor=user, reason=reason, version=version, details=details)


def ballot_of(ballots: Sequence[Ballot], user: Actor) -> Ballot:
    """Returns the ballot of a user; an empty one if the user has not voted."""
    own = [ballot for ballot in ballots if ballot.voter.casefold() == user.casefold()]
    return own[0] if own else Ballot(user, {}, is_finished=False)


def list_compared(versions: Versions, digest: str = "") -> list[AdapterVersion]:
    """Returns the versions that have a comparison whose digest begins with some digits, the latest comparison first."""
    with versions.lineage.database.read() as session:
        return find_voted_on(session, digest)


def list_comparisons(versions: Versions, version: AdapterVersion) -> list[tuple[BlindComparison, list[Ballot]]]:
    """Returns the comparisons of a version with their ballots, oldest first."""
    with versions.lineage.database.read() as session:
        found = read_comparisons(session, version)
        return [(comparison, read_ballots(session, version, comparison)) for comparison in found]


def count_votes(versions: Versions, version: AdapterVersion, against: str) -> VoteSummary:
    """Returns the summary of the votes of a version against another one (`name@version` or `base`) that count."""
    policies = read_policies(versions.home.path)
    with versions.lineage.database.read() as session:
        return read_votes(session, policies, version, against)


def find_unmet_votes(versions: Versions, version: AdapterVersion) -> dict[str, tuple[str, ...]]:
    """Returns alias -> why the version's votes do not suffice for it; only aliases that need votes and it has not."""
    policies = read_policies(versions.home.path)
    needing = [alias for alias, policy in policies.aliases.items() if policy.votes and alias not in version.aliases]
    with versions.lineage.database.read() as session:
        return {alias: find_unvoted(session, policies, version, alias) for alias in needing}


def _find(comparisons: Sequence[BlindComparison], digest: str, where: str) -> BlindComparison:
    for comparison in comparisons:
        if comparison.artifact.sha256 == digest:
            return comparison
    known = ", ".join(comparison.artifact.sha256[:12] for comparison in comparisons) or "none"
    raise VoteError(f"no comparison {digest[:12]!r}", where=where, allowed=known)


def _read_other(session: Session, against: str) -> AdapterVersion | None:
    return None if against == BASE else queries.read_version(session, *split_ref(against))


def _require_usable(session: Session, *versions: AdapterVersion | None) -> None:
    """Raises an error if a version was withdrawn or deleted, or something upstream of it was revoked."""
    for version in versions:
        if version is None:
            continue
        changes.require_active(session, version.name, version.version)
        revoked = revoked_upstream(session, version)
        if revoked:
            reasons = tuple(f"{subject} was revoked" for subject in revoked)
            raise Refused("it cannot be voted on", reasons=reasons, where=version.ref, remedy="compare other versions")

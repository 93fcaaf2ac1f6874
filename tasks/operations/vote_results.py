"""Reads the results of votes: who voted, how often the version won, and what that means for its aliases."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from registry.entities import AdapterVersion
from registry.home import Home
from registry.policy.vote_statistics import VoteSummary
from registry.policy.votes import BASE, Ballot, BlindComparison
from registry.versions.versions import Versions
from registry.versions.voting import count_votes, find_unmet_votes, list_comparisons
from tasks.operations.promote import find_version


@dataclass(frozen=True)
class VoteResults:
    """The votes of a version.

    Attributes:
        version: The version.
        against: What it was compared with -> the summary of the votes that count.
        comparisons: Its comparisons, with their ballots.
        unmet: Alias -> why the votes do not suffice for it, of each alias whose policy needs votes.
    """

    version: AdapterVersion
    against: Mapping[str, VoteSummary]
    comparisons: tuple[tuple[BlindComparison, list[Ballot]], ...]
    unmet: Mapping[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, which do not say who voted for what."""
        return {
            "version": self.version.ref,
            "results": [{"against": against, **asdict(summary)} for against, summary in self.against.items()],
            "comparisons": [_describe(comparison, ballots) for comparison, ballots in self.comparisons],
            "unmet": {alias: list(reasons) for alias, reasons in self.unmet.items()},
        }


def read_results(home: Home, ref: str, against: str | None = None) -> VoteResults:
    """Returns the votes of a version against all others, or against one.

    Args:
        home: The home.
        ref: `name@version` or `name@alias`.
        against: `base`, an alias of the same adapter, `name@version` or `name@alias`; None means all.

    Raises:
        UnknownName: No such adapter.
        UnknownVersion: No such version.
    """
    with closing(Versions(home)) as versions:
        version = find_version(versions, ref)
        only = None if against is None else _name_of(versions, version, against)
        return results_of(versions, version, only)


def results_of(versions: Versions, version: AdapterVersion, only: str | None = None) -> VoteResults:
    """Returns the votes of a version against all others, or against `only`."""
    comparisons = [entry for entry in list_comparisons(versions, version) if only in {None, entry[0].against}]
    opponents = dict.fromkeys(comparison.against for comparison, _ in comparisons)
    summaries = {against: count_votes(versions, version, against) for against in opponents}
    return VoteResults(version, summaries, tuple(comparisons), find_unmet_votes(versions, version))


def describe_results(results: VoteResults) -> dict[str, str]:
    """Returns what each comparison says, as one text per other version."""
    return {f"votes against {against}": describe_summary(summary) for against, summary in results.against.items()}


def describe_summary(summary: VoteSummary) -> str:
    """Returns one line: rate, interval, counts and agreement."""
    if summary.win_rate is None or summary.interval is None:
        return "no vote counts yet; a ballot counts once it is finished"
    low, high = summary.interval
    voters = sum(rate.votes > 0 for rate in summary.voters.values())
    agreement = "" if summary.agreement is None else f", agreement {summary.agreement:.2f}"
    return (
        f"win rate {summary.win_rate:.2f} ({low:.2f} to {high:.2f}): {summary.wins} won, {summary.losses} lost, "
        f"{summary.ties} tied; {_count(summary.prompts, 'prompt')}, {_count(voters, 'voter')}{agreement}"
    )


def _name_of(versions: Versions, version: AdapterVersion, against: str) -> str:
    if against == BASE:
        return BASE
    return find_version(versions, against if "@" in against else f"{version.name}@{against}").ref


def _describe(comparison: BlindComparison, ballots: list[Ballot]) -> dict[str, Any]:
    return {
        "comparison": comparison.artifact.sha256,
        "against": comparison.against,
        "pairs": len(comparison.prompts),
        "prompts": len(set(comparison.prompts)),
        "event": comparison.seq,
        "actor": str(comparison.actor),
        "ballots": [
            {"voter": str(ballot.voter), "pairs": len(ballot.choices), "finished": ballot.is_finished}
            for ballot in ballots
        ],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""Summarizes votes between two versions: win rate with an exact interval, agreement of the voters. Pure.

The unit is the prompt: its seeds and voters are averaged first, because votes on one prompt are not independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

_CONFIDENCE = 0.95
_SCORES = {"candidate": 1.0, "against": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class CountedVote:
    """A vote.

    Attributes:
        voter: The user.
        prompt: The unit: the prompt that both images were drawn from, or its digest.
        pair: The pair of images; votes of several users on one pair show how far they agree.
        choice: `candidate`, `against`, `tie` or `skip`; a skipped pair counts in no rate.
        left: The side that was shown on the left: `candidate` or `against`.
    """

    voter: str
    prompt: str
    pair: str
    choice: str
    left: str


@dataclass(frozen=True)
class VoterRate:
    """The votes of one user.

    Attributes:
        votes: Number of votes, without skipped pairs.
        win_rate: Share of the candidate, ties as half; None without a vote.
        left_rate: Share of the image on the left among votes for one image; None without one.
    """

    votes: int
    win_rate: float | None
    left_rate: float | None


@dataclass(frozen=True)
class VoteSummary:
    """The result of votes.

    Attributes:
        votes: Number of votes, without skipped pairs.
        wins: Votes for the candidate.
        losses: Votes for the other version.
        ties: Votes for neither.
        skipped: Pairs that users did not judge.
        prompts: Number of independent units.
        win_rate: Mean over the prompts of the candidate's share, ties as half; None without a vote.
        interval: Bounds of the win rate for prompts like these and the same voters, 95 %; None without a vote.
        agreement: Krippendorff's alpha with interval distances: 1 is perfect, 0 is that of chance; None if no pair has
            two votes, or all votes are equal.
        left_rate: Share of the image on the left among votes for one image; far from 0.5, voters follow the side.
        left_interval: Its interval, 95 %.
        voters: User -> the user's votes.
    """

    votes: int
    wins: int
    losses: int
    ties: int
    skipped: int
    prompts: int
    win_rate: float | None
    interval: tuple[float, float] | None
    agreement: float | None
    left_rate: float | None
    left_interval: tuple[float, float] | None
    voters: Mapping[str, VoterRate]


def summarize_votes(votes: Iterable[CountedVote]) -> VoteSummary:
    """Returns the summary of votes; each user has at most one vote per pair."""
    listed = list(votes)
    judged = [vote for vote in listed if vote.choice in _SCORES]
    units = _average(judged)
    lefts = [vote.choice == vote.left for vote in judged if vote.choice != "tie"]
    count = {choice: sum(vote.choice == choice for vote in judged) for choice in _SCORES}
    by_voter: dict[str, list[CountedVote]] = defaultdict(list)
    for vote in listed:
        by_voter[vote.voter].append(vote)
    return VoteSummary(
        votes=len(judged),
        wins=count["candidate"],
        losses=count["against"],
        ties=count["tie"],
        skipped=len(listed) - len(judged),
        prompts=len(units),
        win_rate=fmean(units) if units else None,
        interval=exact_interval(sum(units), len(units)) if units else None,
        agreement=krippendorff_alpha(_by_pair(judged)),
        left_rate=fmean(lefts) if lefts else None,
        left_interval=exact_interval(sum(lefts), len(lefts)) if lefts else None,
        voters={voter: _rate(own) for voter, own in sorted(by_voter.items())},
    )


def exact_interval(successes: float, trials: int) -> tuple[float, float]:
    """Returns the interval of Clopper and Pearson (1934) for a rate, 95 %.

    Halves extend it by the beta distribution. Over all shares of wins and ties it covers at least what it covers
    without ties, which `tests/laws/test_vote_laws.py` computes exactly.

    Args:
        successes: Number of successes, 0 to `trials`; a tie is half of one.
        trials: Number of independent trials, 1 or more.

    Raises:
        ValueError: The counts are out of their range.
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes!r} successes of {trials!r} trials; allowed: 0 to the number of trials, 1 or more")
    tail = (1.0 - _CONFIDENCE) / 2.0
    failures = trials - successes
    low = 0.0 if successes == 0 else float(betaincinv(successes, failures + 1.0, tail))
    high = 1.0 if failures == 0 else float(betaincinv(successes + 1.0, failures, 1.0 - tail))
    return low, high


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Returns Krippendorff's alpha (2011, interval metric) of values by unit; units with one value count in nothing.

    None if no unit has two values, or all values are equal.
    """
    paired = [list(values) for values in units if len(values) > 1]
    pooled = [value for values in paired for value in values]
    if not pooled:
        return None
    total = len(pooled)
    observed = sum(_squared_differences(values) / (len(values) - 1) for values in paired) / total
    expected = _squared_differences(pooled) / (total * (total - 1))
    return None if expected == 0.0 else 1.0 - observed / expected


def _squared_differences(values: Sequence[float]) -> float:
    """Returns the sum over all ordered pairs of the squared difference."""
    return 2.0 * (len(values) * sum(value * value for value in values) - sum(values) ** 2)


def _average(votes: Sequence[CountedVote]) -> list[float]:
    """Returns the score of each prompt: the mean over its pairs of the mean over their voters."""
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        pairs[vote.prompt][vote.pair].append(_SCORES[vote.choice])
    return [fmean(map(fmean, scores.values())) for scores in pairs.values()]


def _by_pair(votes: Sequence[CountedVote]) -> list[list[float]]:
    scores: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        scores[vote.pair].append(_SCORES[vote.choice])
    return list(scores.values())


def _rate(votes: Sequence[CountedVote]) -> VoterRate:
    scores = [_SCORES[vote.choice] for vote in votes if vote.choice in _SCORES]
    lefts = [vote.choice == vote.left for vote in votes if vote.choice in {"candidate", "against"}]
    return VoterRate(len(scores), fmean(scores) if scores else None, fmean(lefts) if lefts else None)

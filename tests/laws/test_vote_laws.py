"""Laws of vote statistics: exact coverage of the interval, units, symmetry, agreement against published values."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from scipy.stats import multinomial

from registry.policy.vote_statistics import CountedVote, exact_interval, krippendorff_alpha, summarize_votes

CHOICES = ("candidate", "against", "tie", "skip")


def vote(prompt: str, choice: str, voter: str = "ann", pair: str = "", left: str = "candidate") -> CountedVote:
    return CountedVote(voter, prompt, pair or prompt, choice, left)


def miss_rates(trials: int, ties: float) -> NDArray[np.float64]:
    """Returns the chances that the interval is above and below the true rate, [rates, 2], summed over all results."""
    wins, tied = (grid.ravel() for grid in np.meshgrid(np.arange(trials + 1), np.arange(trials + 1), indexing="ij"))
    possible = wins + tied <= trials
    wins, tied = wins[possible], tied[possible]
    bounds = np.array([exact_interval(float(s), trials) for s in wins + tied / 2])
    rates = []
    for won in np.linspace(0.0, 1.0 - ties, 21):
        shares = [won, ties, max(0.0, 1.0 - ties - won)]
        chances = multinomial.pmf(np.stack([wins, tied, trials - wins - tied], axis=1), trials, shares)
        true = won + ties / 2
        rates.append([chances[bounds[:, 0] > true + 1e-12].sum(), chances[bounds[:, 1] < true - 1e-12].sum()])
    return np.array(rates)


@pytest.mark.parametrize("trials", [1, 6, 13, 24])
@pytest.mark.parametrize("ties", [0.0, 0.2, 0.6, 1.0])
def test_the_interval_misses_the_true_rate_in_at_most_two_and_a_half_percent_on_each_side(trials, ties):
    assert miss_rates(trials, ties).max() <= 0.025 + 1e-9


def test_the_interval_is_that_of_clopper_and_pearson():
    # Table of the binomial distribution: 6 of 6 has a lower bound of 0.025 ** (1 / 6).
    assert exact_interval(6, 6) == pytest.approx((0.025 ** (1 / 6), 1.0))
    assert exact_interval(0, 6) == pytest.approx((0.0, 1.0 - 0.025 ** (1 / 6)))
    low, high = exact_interval(7, 10)
    tail = sum(math.comb(10, k) * low**k * (1 - low) ** (10 - k) for k in range(7, 11))
    assert tail == pytest.approx(0.025)
    assert sum(math.comb(10, k) * high**k * (1 - high) ** (10 - k) for k in range(8)) == pytest.approx(0.025)
    for successes, trials in ((-1, 3), (4, 3), (0, 0), (math.nan, 3)):
        with pytest.raises(ValueError, match="successes"):
            exact_interval(successes, trials)


def test_agreement_is_krippendorffs_published_value():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", four observers: 0.849 for interval data.
    observers = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    columns = zip(*(line.split() for line in observers), strict=True)
    units = [[float(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.849, abs=0.0005)
    assert krippendorff_alpha([[1.0, 1.0], [0.0, 0.0]]) == 1.0
    assert krippendorff_alpha([[1.0], [0.0]]) is None
    assert krippendorff_alpha([[1.0, 1.0], [1.0, 1.0]]) is None


def test_voters_who_agree_and_seeds_of_a_prompt_do_not_narrow_the_interval():
    one = summarize_votes([vote(f"p{number}", "candidate") for number in range(8)])
    voters = summarize_votes(
        [vote(f"p{number}", "candidate", voter=voter) for number in range(8) for voter in ("ann", "ben", "carl")]
    )
    seeds = summarize_votes(
        [vote(f"p{number}", "candidate", pair=f"{number}:{seed}") for number in range(8) for seed in range(5)]
    )
    assert one.interval == voters.interval == seeds.interval == pytest.approx((0.025 ** (1 / 8), 1.0))
    assert (one.votes, voters.votes, seeds.votes) == (8, 24, 40)
    assert (one.prompts, voters.prompts, seeds.prompts) == (8, 8, 8)


def test_prompts_have_equal_weights_whatever_their_votes():
    votes = [vote("a", "candidate", pair=str(number)) for number in range(9)] + [vote("b", "against")]
    assert summarize_votes(votes).win_rate == 0.5


@given(
    st.lists(
        st.builds(
            vote,
            st.sampled_from("abcdef"),
            st.sampled_from(CHOICES),
            voter=st.sampled_from(["ann", "ben"]),
            left=st.sampled_from(CHOICES[:2]),
        ),
        max_size=24,
        unique_by=lambda entry: (entry.voter, entry.pair),
    )
)
def test_swapping_the_versions_mirrors_the_result_and_skipped_pairs_change_no_rate(votes):
    other = {"candidate": "against", "against": "candidate"}
    mirrored = [replace(entry, choice=other.get(entry.choice, entry.choice), left=other[entry.left]) for entry in votes]
    summary, mirror = summarize_votes(votes), summarize_votes(mirrored)
    assert (summary.wins, summary.losses, summary.ties) == (mirror.losses, mirror.wins, mirror.ties)
    assert summary.left_rate == mirror.left_rate
    assert summary.agreement == pytest.approx(mirror.agreement)
    judged = summarize_votes(entry for entry in votes if entry.choice != "skip")
    assert (summary.win_rate, summary.interval, summary.votes) == (judged.win_rate, judged.interval, judged.votes)
    assert summary.votes + summary.skipped == len(votes)
    if summary.win_rate is not None:
        assert summary.win_rate == pytest.approx(1.0 - mirror.win_rate)
        assert summary.interval == pytest.approx((1.0 - mirror.interval[1], 1.0 - mirror.interval[0]))
        assert summary.interval[0] <= summary.win_rate <= summary.interval[1]


def test_a_voter_who_always_takes_the_left_image_is_seen():
    sides = itertools.cycle(("candidate", "against"))
    votes = [vote(f"p{number}", side, left=side) for number, side in zip(range(12), sides, strict=False)]
    summary = summarize_votes(votes)
    assert (summary.win_rate, summary.left_rate) == (0.5, 1.0)
    assert summary.left_interval[0] > 0.5
    assert summary.voters["ann"].left_rate == 1.0

"""Tests blind votes through the verbs: images without names, tables, results, and the gate of a promotion."""

from __future__ import annotations

import csv
import io
import json
import re
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.alias_policy import VotesPolicy
from registry.policy.policy_file import read_policies
from registry.settings import read_settings
from registry.versions.versions import Versions
from tasks.operations.ballots import Position, order_pairs
from tests.flows.commands import loraline_here, say
from tests.flows.compared import PROMPTS, compared, compared_home

__all__ = ["compared", "compared_home"]

POLICY = "aliases: {production: {votes: {against: base, at_least: %d}, needs_consent: none, overridable: false}}\n"


def fill_in(folder: Path, answers: list[str]) -> Path:
    """Fills in the table of a ballot."""
    rows = [row["pair"] for row in csv.DictReader(io.StringIO((folder / "ballot.csv").read_text()))]
    assert rows == [str(number) for number in range(1, len(answers) + 1)]
    table = "".join(f"{pair},{answer}\n" for pair, answer in zip(rows, answers, strict=True))
    (folder / "ballot.csv").write_text(f"pair,vote\n{table}")
    return folder / "ballot.csv"


def positions_of(home: Path, digest: str, voter: str) -> tuple[Position, ...]:
    """Returns the pairs as a voter sees them, with the side on the left: what the home knows, and no client."""
    with closing(Versions(Home.open_to_read(home))) as versions:
        (entry,) = (
            step
            for run in versions.lineage.runs()
            for step in versions.lineage.executions(run.id)
            if step.uses == "compare"
        )
        index = json.loads(versions.store.read(entry.output, "comparison.json"))
    assert entry.output.sha256 == digest
    return order_pairs(len(index["pairs"]), index["salt"], voter)


def test_a_ballot_hides_the_versions_and_a_won_vote_gates_the_promotion(compared, tmp_path):
    digest, home = compared[1], compared[0].home.path
    (home / "policy.yaml").write_text(POLICY % 6)
    refused = loraline_here(
        "promote", "small@1", "--to", "production", "--reason", "r", home=home, LORALINE_ACTOR="ann"
    )
    assert refused.returncode == 1
    assert "votes against base: 0 of 6 are cast in finished ballots" in refused.stderr
    answers, orders = {}, {}
    for voter in ("ann", "ben"):
        folder = tmp_path / voter
        written = loraline_here("vote", "ballot", digest[:12], "-o", folder, "--json", home=home, LORALINE_ACTOR=voter)
        assert len(json.loads(written.stdout)) == 1 + 2 * len(PROMPTS)
        assert sorted(path.name for path in folder.iterdir())[:2] == ["01-left.png", "01-right.png"]
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                assert image.info == {}, "no prompt, which names the version"
            assert b"small" not in path.read_bytes()
        orders[voter] = positions_of(home, digest, voter)
        sides = [position.left for position in orders[voter]]
        assert sides.count("candidate") == len(PROMPTS) // 2
        answers[voter] = ["left" if side == "candidate" else "right" for side in sides]
        table = fill_in(folder, answers[voter])
        recorded = loraline_here("vote", "record", digest, table, home=home, LORALINE_ACTOR=voter)
        assert recorded.stdout == f"recorded {len(PROMPTS)} votes; the ballot is finished\n", recorded.stderr
    assert orders["ann"] != orders["ben"], "each voter has an order of pairs and sides"
    (results,) = json.loads(say("votes", "small@1", "--against", "base", "--json", home=home))["results"]
    assert (results["wins"], results["losses"], results["prompts"], results["win_rate"]) == (12, 0, 6, 1.0)
    assert results["interval"] == pytest.approx([0.025 ** (1 / 6), 1.0])
    assert {voter: rate["votes"] for voter, rate in results["voters"].items()} == {"ann": 6, "ben": 6}
    text = say("votes", "small@1", home=home)
    assert "win rate 1.00 (0.54 to 1.00): 12 won, 0 lost, 0 tied; 6 prompts, 2 voters" in text
    assert re.search("votes for production +enough", text)
    assert "win rate 1.00" in say("show", "small@1", home=home)
    assert json.loads(say("show", "small@1", "--json", home=home))["votes"]["unmet"] == {"production": []}
    say("report", "small@1", "-o", tmp_path / "report.html", home=home)
    assert "votes against base" in (tmp_path / "report.html").read_text()
    say("promote", "small@1", "--to", "production", "--reason", "won", home=home)
    assert say("fsck", home=home)


def test_a_lost_vote_refuses_the_promotion_with_all_reasons(compared, tmp_path):
    digest, home = compared[1], compared[0].home.path
    (home / "policy.yaml").write_text(POLICY % 7)
    say("vote", "ballot", digest, "-o", tmp_path / "ballot", home=home)
    table = fill_in(tmp_path / "ballot", ["left", "right", "tie", "tie", "skip", "left"])
    assert json.loads(say("vote", "record", digest, table, "--json", home=home)) == {
        "recorded": 6,
        "pairs": 6,
        "voted": 6,
        "finished": True,
    }
    refused = loraline_here("promote", "small@1", "--to", "production", "--reason", "r", "--override", home=home)
    assert refused.returncode == 1
    assert "5 of 7 are cast" in refused.stderr
    assert "its lower bound must exceed 0.5" in refused.stderr
    again = loraline_here("vote", "record", digest, table, home=home)
    assert (again.returncode, "the votes are final" in again.stderr) == (1, True)


def test_a_comparison_is_lineage_of_both_versions_and_equal_images_are_left_out(compared):
    trained, digest = compared
    home = trained.home.path
    with closing(Lineage(trained.home.lineage_url)) as lineage:
        (step,) = (step for run in lineage.runs() for step in lineage.executions(run.id) if step.uses == "compare")
    assert step.inputs["adapter"] == trained.version().artifact
    assert step.output.sha256 == digest
    assert digest[:12] in say("lineage", "small@1", "--down", home=home)
    refused = loraline_here(
        "vote",
        "prepare",
        "small@1",
        "--against",
        "base",
        "--prompts",
        trained.spec.parent / "votes.txt",
        "--steps",
        1,
        "--weight",
        0,
        home=home,
    )
    assert (refused.returncode, "base draws the same images" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("pair,vote\n7,left\n", "pair '7'"),
        ("pair,vote\n1,left\n1,right\n", "pair '1'"),
        ("pair,vote\n0,left\n", "pair '0'"),
        ("pair,vote\n²,left\n", "pair '²'"),
        ("pair,vote\n1,small@1\n", "vote 'small@1'"),
        ("pair,vote\n1,\n", "the table has no vote"),
        ("", "the table has no vote"),
        ("pair,vote\n1,left\n2,up\n", "vote 'up'"),
    ],
)
def test_a_wrong_table_records_nothing(compared, tmp_path, rows, problem):
    (trained, digest), table = compared, tmp_path / "table.csv"
    table.write_text(rows)
    refused = loraline_here("vote", "record", digest, table, home=trained.home.path)
    assert refused.returncode == 1
    assert problem in refused.stderr
    assert json.loads(say("votes", "small@1", "--json", home=trained.home.path))["comparisons"][0]["ballots"] == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("vote", "prepare", "small@1", "--against", "small@1"), "'small@1' is the version itself"),
        (("vote", "prepare", "small@1", "--against", "canary"), "no version 'canary'"),
        (("vote", "ballot", "0123456789", "-o", "out"), "no comparison '0123456789'"),
        (("vote", "ballot", "01", "-o", "out"), "no comparison '01'"),
        (("votes", "none@1"), "no adapter 'none'"),
    ],
)
def test_what_cannot_be_compared_is_refused(trained, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a ring\n")
    more = ("--prompts", "p.txt") if "prepare" in arguments else ()
    refused = loraline_here(*arguments, *more, home=trained.home.path)
    assert (refused.returncode, problem in refused.stderr) == (1, True), refused.stderr


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [("a <lora:small@1:1> ring\n", "names an adapter"), ("a ring\na ring\n", "is repeated")],
)
def test_prompts_that_bias_a_comparison_are_refused(trained, tmp_path, prompts, problem):
    (tmp_path / "p.txt").write_text(prompts)
    arguments = ("vote", "prepare", "small@1", "--against", "base", "--prompts", tmp_path / "p.txt")
    refused = loraline_here(*arguments, home=trained.home.path)
    assert (refused.returncode, problem in refused.stderr) == (1, True), refused.stderr


def test_each_voter_sees_the_pairs_in_an_order_of_their_own_with_half_of_the_sides_each_way():
    orders = {voter: order_pairs(40, "s" * 64, voter) for voter in ("ann", "ben", "ANN")}
    assert orders["ann"] == orders["ANN"]
    for positions in orders.values():
        assert sorted(position.pair for position in positions) == list(range(40))
        assert sum(position.left == "candidate" for position in positions) == 20
    by_pair = {voter: {one.pair: one.left for one in positions} for voter, positions in orders.items()}
    assert orders["ann"] != orders["ben"]
    assert by_pair["ann"] != by_pair["ben"]
    firsts = {order_pairs(3, f"{salt:064d}", "ann")[0] for salt in range(60)}
    assert len(firsts) == 6, "each pair and each side can come first"
    assert {sum(one.left == "candidate" for one in order_pairs(3, f"{salt:064d}", "ann")) for salt in range(20)} == {
        1,
        2,
    }


def test_the_policy_and_the_setting_of_the_pages_can_be_used(tmp_path):
    def block(page: str, start: str) -> str:
        text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text()
        return next(found for found in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if found.startswith(start))

    (tmp_path / "policy.yaml").write_text(block("votes.md", "# policy.yaml"))
    votes = read_policies(tmp_path).of("production").votes
    assert votes is not None
    assert (votes.against, votes.at_least, votes.voters, votes.missing) == ("production", 30, 2, "fail")
    (tmp_path / "loraline.yaml").write_text(block("studio.md", "datasets:"))
    assert read_settings(tmp_path).datasets == ("/data/photos", "projects")


def test_the_table_of_the_page_has_every_key_of_a_gate_with_its_default():
    text = (Path(__file__).resolve().parents[2] / "docs" / "votes.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", text, re.MULTILINE))
    assert rows == {name: str(value).lower() for name, value in VotesPolicy().model_dump().items()}

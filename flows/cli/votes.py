"""Defines the verbs on blind votes: vote prepare, vote ballot, vote record, and votes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json, Ref
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from tasks.operations.vote_results import VoteResults

vote_app = typer.Typer(help="Compare two versions by blind votes on pairs of images.", no_args_is_help=True)
_AGAINST = "Version to compare with: an alias of the same adapter, name@version, or base for no adapter."
_Digest = Annotated[str, typer.Argument(metavar="COMPARISON", help="Digest of the comparison; 8 digits or more.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(vote_app, Access.WRITE, prepare, record)
    add_verb(vote_app, Access.READ, ballot)
    app.add_typer(vote_app, name="vote")
    add_verb(app, Access.READ, votes)


def prepare(
    ref: Ref,
    prompts: Annotated[Path, typer.Option(metavar="PROMPTS", help="File of prompts, one per line, without tags.")],
    against: Annotated[str, typer.Option(metavar="VERSION", help=_AGAINST)] = "production",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of seeds per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="First random seed.")] = 0,
    base: Annotated[str, typer.Option(help="Base model: tiny, a hub id or a diffusers folder.")] = "tiny",
    weight: Annotated[float, typer.Option(help="Weight of each version's adapter.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 3.0,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    sampler: Annotated[str | None, typer.Option(help="Sampler. Default: the base's own.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels. Default: that of the base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the same prompts and seeds by two versions, for users to vote on."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_facts, print_json
    from flows.cli.verbs import home_path
    from lora_engine.evaluation.prompts import read_prompts
    from tasks.operations.draw_request import parse_size
    from tasks.operations.images import draw_each
    from tasks.operations.votes import ComparisonRequest, prepare_comparison
    from tasks.progress import StepEvent, publish

    home = open_home()
    request = ComparisonRequest(
        read_prompts(prompts),
        count,
        seed,
        base,
        weight,
        negative,
        steps,
        guidance,
        None if size is None else parse_size(size),
        sampler,
    )
    with show_run(["generate"], Console(stderr=True)):
        publish(StepEvent("generate", "started"))
        artifact, index = prepare_comparison(
            home, ref, against, request, lambda requests: draw_each(requests, home_path())
        )
        publish(StepEvent("generate", "completed"))
    equal = len(request.prompts) * count - len(index.pairs)
    facts: dict[str, object] = {"comparison": artifact.sha256, "version": index.candidate, "against": index.against}
    facts |= {"pairs": len(index.pairs), "equal_pairs": equal}
    if as_json:
        print_json(facts)
        return
    print_facts([(label.replace("_", " "), value or "") for label, value in facts.items()])
    print(f"Next: loraline vote ballot {artifact.sha256[:12]} -o ballot/, or the tab Votes of `loraline serve`")


def ballot(
    comparison: _Digest,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder.")],
    as_json: Json = False,
) -> None:
    """Write the pairs of a comparison in your own order, without names, and a table for your votes."""
    from flows.cli.output import print_json
    from tasks.operations.ballots import write_ballot

    paths = write_ballot(open_home(), comparison, output)
    if as_json:
        print_json([str(path) for path in paths])
        return
    print(paths[0])
    print(f"{len(paths) // 2} pairs. Write left, right, tie or skip beside each, then: loraline vote record")


def record(
    comparison: _Digest,
    table: Annotated[Path, typer.Argument(metavar="FILE", help="The table: columns pair and vote.")],
    as_json: Json = False,
) -> None:
    """Record your votes from a table. Votes count once you have judged or skipped every pair; then they are final."""
    from flows.cli.output import print_json
    from tasks.operations.ballots import record_table

    events, opened = record_table(open_home(), comparison, table)
    done, total = len(opened.ballot.choices), len(opened.positions)
    if as_json:
        finished = opened.ballot.is_finished
        print_json({"recorded": len(events), "pairs": total, "voted": done, "finished": finished})
        return
    rest = "the ballot is finished" if opened.ballot.is_finished else f"{total - done} pairs are left"
    print(f"recorded {len(events)} votes; {rest}")


def votes(
    ref: Ref,
    against: Annotated[str | None, typer.Option(metavar="VERSION", help=f"{_AGAINST} Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Show the votes of a version: win rate with its interval, agreement, and what aliases still need."""
    from flows.cli.output import print_json
    from tasks.operations.vote_results import read_results

    results = read_results(open_home(), ref, against)
    if as_json:
        print_json(results.to_json())
    else:
        print_results(results)


def print_results(results: VoteResults) -> None:
    """Prints the votes of a version."""
    from flows.cli.output import print_facts, print_table
    from tasks.operations.vote_results import describe_results

    facts: list[tuple[str, object]] = [("version", results.version.ref), *describe_results(results).items()]
    if not results.comparisons:
        facts.append(("votes", "none; `loraline vote prepare` starts a comparison"))
    facts += [(f"votes for {alias}", "; ".join(unmet) or "enough") for alias, unmet in results.unmet.items()]
    for against, summary in results.against.items():
        low, high = summary.left_interval or (0.0, 1.0)
        if not low <= 0.5 <= high:
            facts.append(("warning", f"against {against}: {summary.left_rate:.0%} of the votes are for the left image"))
    print_facts(facts)
    rows = [
        (
            comparison.artifact.sha256[:12],
            comparison.against,
            str(ballot.voter),
            f"{len(ballot.choices)}/{len(comparison.prompts)}",
        )
        for comparison, ballots in results.comparisons
        for ballot in ballots
    ]
    rows += [
        (comparison.artifact.sha256[:12], comparison.against, "", f"0/{len(comparison.prompts)}")
        for comparison, ballots in results.comparisons
        if not ballots
    ]
    if rows:
        print_table(("comparison", "against", "voter", "pairs"), rows)
    voters = [
        (against, voter, rate.votes, _share(rate.win_rate), _share(rate.left_rate))
        for against, summary in results.against.items()
        for voter, rate in summary.voters.items()
    ]
    if voters:
        print_table(("against", "voter", "votes", "win rate", "left"), voters)


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.2f}"

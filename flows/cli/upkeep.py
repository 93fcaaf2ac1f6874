"""The verbs of upkeep: gc, fsck, doctor, backup, restore-backup, copy-database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json, home_path, open_home


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (gc, fsck, doctor, backup, restore_backup, copy_database):
        app.command()(verb)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go, with sizes.")] = False,
    grace: Annotated[str, typer.Option(metavar="TIME", help="What is younger stays: 90m, 24h, 7d.")] = "24h",
    keep_runs: Annotated[float, typer.Option(metavar="DAYS", help="Keep the artifacts of runs of so many days.")] = 30,
    cache: Annotated[float, typer.Option(metavar="GIB", help="Leave so much of the training cache.")] = 20,
    as_json: Json = False,
) -> None:
    """Delete what no version and no recent run needs, and what killed processes left behind."""
    from flows.cli.output import print_json, print_table
    from tasks.operations.maintenance import collect_garbage, parse_time

    home = open_home()
    seconds = parse_time(grace)
    done = collect_garbage(home, grace=seconds, keep_runs=keep_runs, cache=int(cache * (1 << 30)), dry_run=dry_run)
    found = done.collection
    if as_json:
        print_json({"size": found.size, "cache": done.cache, **vars(found)})
        return
    if dry_run and found.items:
        print_table(("what", "name", "size"), [(i.what, i.name, _size(i.size)) for i in found.items])
    verb = "would go" if dry_run else "went"
    print(f"{len(found.items)} things {verb}: {_size(found.size)}. {found.kept} blobs stay.")
    if found.waiting:
        print(f"{found.waiting} blobs that nobody needs are younger than {grace} and wait.")
    if found.binned:
        print(f"{_size(found.binned)} are in the bin of the store; a collection in {grace} deletes them.")
    if done.cache:
        print(f"{_size(done.cache)} went from the training cache.")


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be built again from what is whole.")] = False,
    as_json: Json = False,
) -> None:
    """Prove that bytes, digests, events, aliases and MLflow agree."""
    from flows.cli.output import print_json, print_table
    from registry.maintenance.fsck import fsck as audit
    from registry.maintenance.repair import repair as repair_home

    home = open_home()
    done = repair_home(home) if repair else []
    problems = audit(home)
    if as_json:
        print_json({"repaired": done, "problems": problems} if repair else problems)
    else:
        if done:
            rows = [("yes" if each.done else "NO", each.what, each.where, each.outcome) for each in done]
            print_table(("mended", "problem", "where", "outcome"), rows)
        if problems:
            print_table(("problem", "where", "to do"), [(p.what, p.where, p.remedy) for p in problems])
        else:
            print("Everything agrees: bytes, digests, lineage, aliases, MLflow.")
    if any(problem.severity == "damage" for problem in problems):
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Say what is wrong with this installation, and how to mend it."""
    from flows.cli.output import print_json, print_table
    from tasks.operations.maintenance import examine

    found = examine(home_path())
    if as_json:
        print_json(found)
    else:
        print_table(("", "about", "found", "to do"), [(f.level, f.about, f.found, f.remedy) for f in found])
    if any(finding.level == "broken" for finding in found):
        raise typer.Exit(1)


def backup(
    target: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.tar", help="A folder of backups, or one archive.")],
    as_json: Json = False,
) -> None:
    """Copy databases, settings and every blob that they name, while others work; again, and only what is new."""
    from flows.cli.output import print_json, print_table
    from registry.maintenance.backup import backup as act

    done = act(open_home(), target)
    if as_json:
        print_json(done)
    else:
        print(f"{done.path}: {done.blobs} blobs, {done.copied} of them new ({_size(done.size)})")
        for each in done.left_out:
            print(f"Not in it: {each}")
        if done.problems:
            print_table(("not copied", "where", "to do"), [(p.what, p.where, p.remedy) for p in done.problems])
    if done.problems:
        raise typer.Exit(1)


def restore_backup(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.tar", help="A folder of backups, one of them, a tar.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move aside a home that holds something.")] = False,
    as_json: Json = False,
) -> None:
    """Make LORALINE_HOME from a backup: verified whole first, then in its place at once."""
    from flows.cli.output import print_json
    from registry.maintenance.restore import restore

    done = restore(source, home_path(), replace=replace)
    if as_json:
        print_json(done)
        return
    print(f"{done.home}: as of {done.created_at}, {done.blobs} blobs")
    if done.before is not None:
        print(f"What was there before is in {done.before}")
    for each in done.left_out:
        print(f"Not restored: {each}")


def copy_database(
    target: Annotated[str, typer.Argument(metavar="URL", help="An empty database: postgresql+psycopg://, sqlite:///.")],
    as_json: Json = False,
) -> None:
    """Copy the registry's own tables to another database, such as from SQLite to PostgreSQL."""
    from flows.cli.output import print_json, print_table
    from registry.store.copy_database import copy_tables

    home = open_home()
    done = copy_tables(home.lineage_url, target)
    if as_json:
        print_json(done)
        return
    print_table(("table", "rows"), list(done.items()))
    print(f"Copied. To use it, name it as `database` in {home.path / 'loraline.yaml'}, or in LORALINE_DATABASE_URL.")


def _size(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024  # type: ignore[assignment]
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"

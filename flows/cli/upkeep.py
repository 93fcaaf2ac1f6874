"""Defines the verbs of upkeep: gc, fsck, doctor, backup, restore-backup, copy-database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, home_path, open_home


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.DELETE, gc)
    add_verb(app, Access.READ, fsck, doctor, backup, copy_database)
    add_verb(app, Access.WRITE, restore_backup)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="List what would be deleted, with sizes.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Grace period: younger items are kept, such as 90m, 24h, 7d.")
    ] = "24h",
    keep_runs: Annotated[
        float, typer.Option(metavar="DAYS", help="Age of runs whose artifacts are kept, in days.")
    ] = 30,
    cache: Annotated[float, typer.Option(metavar="GIB", help="Maximum size of the training cache, in GiB.")] = 20,
    as_json: Json = False,
) -> None:
    """Delete artifacts that no version and no recent run needs, and leftovers of killed processes."""
    from flows.cli.output import print_json, print_table
    from tasks.operations.maintenance import collect_garbage, parse_time

    home = open_home()
    seconds = parse_time(grace)
    result = collect_garbage(home, grace=seconds, keep_runs=keep_runs, cache=int(cache * (1 << 30)), dry_run=dry_run)
    collection = result.collection
    if as_json:
        print_json({"size": collection.size, "cache": result.cache, **vars(collection)})
        return
    if dry_run and collection.items:
        print_table(("kind", "name", "size"), [(i.what, i.name, _size(i.size)) for i in collection.items])
    verb = "Would delete" if dry_run else "Deleted"
    print(f"{verb} {len(collection.items)} items ({_size(collection.size)}); {collection.kept} blobs kept.")
    if collection.waiting:
        print(f"{collection.waiting} unreferenced blobs are younger than {grace} and kept.")
    if collection.binned:
        print(f"{_size(collection.binned)} are in the store's trash; run gc again after {grace} to delete them.")
    if result.cache:
        print(f"Deleted {_size(result.cache)} from the training cache.")


def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Repair what intact data can restore.")] = False,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBER:DIGEST", help="An earlier output of `log --head`, which the log must have."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Backups whose newest events the log must have.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that bytes, digests, events, aliases and MLflow agree. Exit code 1 on damage."""
    from flows.cli.output import print_json, print_table
    from registry.maintenance.backup_manifest import read_backup_heads
    from registry.maintenance.check_chain import KnownHead
    from registry.maintenance.fsck import fsck as find_problems
    from registry.store.chain import Head
    from tasks.operations.maintenance import repair_home

    heads = [KnownHead(Head.parse(text), "--head") for text in head or ()]
    heads += read_backup_heads(against) if against else []
    home = open_home(Access.WRITE if repair else None)
    repairs = repair_home(home) if repair else []
    problems = find_problems(home, heads=heads)
    if as_json:
        print_json({"repaired": repairs, "problems": problems} if repair else problems)
    else:
        if repairs:
            rows = [("yes" if r.done else "NO", r.what, r.where, r.outcome) for r in repairs]
            print_table(("repaired", "problem", "where", "outcome"), rows)
        if problems:
            print_table(("problem", "where", "fix"), [(p.what, p.where, p.remedy) for p in problems])
        else:
            print("Everything agrees: bytes, digests, lineage, aliases, MLflow.")
    if any(problem.severity == "damage" for problem in problems):
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Check this installation and show how to fix it. Exit code 1 if anything is broken."""
    from flows.cli.output import print_json, print_table
    from tasks.operations.maintenance import examine

    findings = examine(home_path())
    if as_json:
        print_json(findings)
    else:
        print_table(("", "check", "finding", "fix"), [(f.level, f.about, f.found, f.remedy) for f in findings])
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


def backup(
    target: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.tar", help="Folder of backups, or one archive.")],
    as_json: Json = False,
) -> None:
    """Back up databases, settings and every referenced blob; later backups copy only new blobs."""
    from flows.cli.output import print_json, print_table
    from registry.maintenance.backup import backup as back_up

    result = back_up(open_home(), target)
    if as_json:
        print_json(result)
    else:
        print(f"{result.path}: {result.blobs} blobs, {result.copied} of them new ({_size(result.size)})")
        for item in result.left_out:
            print(f"Not included: {item}")
        if result.problems:
            print_table(("problem", "where", "fix"), [(p.what, p.where, p.remedy) for p in result.problems])
    if result.problems:
        raise typer.Exit(1)


def restore_backup(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.tar", help="Folder of backups, one backup, or a tar.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move an existing home aside.")] = False,
    with_settings: Annotated[
        bool, typer.Option("--with-settings", help="Also take over the locations of store and MLflow.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore LORALINE_HOME from a backup: verifies all of it, then moves it into place."""
    from flows.cli.output import clean, print_json
    from registry.maintenance.restore import restore_backup

    result = restore_backup(source, home_path(), replace=replace, with_settings=with_settings)
    if as_json:
        print_json(result)
        return
    print(f"{result.home}: as of {clean(result.created_at)}, {result.blobs} blobs")
    if result.before is not None:
        print(f"The previous home is in {result.before}")
    if result.files:
        print(f"Applies from now on: {clean(', '.join(result.files))}")
    for item in result.left_out:
        print(f"Not restored: {clean(item)}")
    for name, value in result.settings.items():
        print(f"Not taken over: {name}: {clean(value)} (--with-settings takes it over)")


def copy_database(
    target: Annotated[
        str, typer.Argument(metavar="URL", help="URL of an empty database: postgresql+psycopg://, sqlite:///.")
    ],
    as_json: Json = False,
) -> None:
    """Copy the registry's tables to another database, such as from SQLite to PostgreSQL."""
    from flows.cli.output import print_json, print_table
    from registry.store.copy_database import copy_tables

    home = open_home()
    rows = copy_tables(home.lineage_url, target)
    if as_json:
        print_json(rows)
        return
    print_table(("table", "rows"), list(rows.items()))
    print(f"Copied. To use it, set `database` in {home.path / 'loraline.yaml'}, or LORALINE_DATABASE_URL.")


def _size(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024  # type: ignore[assignment]
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"

"""Applies the policy for consent to datasets before anything is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lora_engine.data.manifest import Manifest
from registry.entities import ArtifactRef, now
from registry.errors import RightsError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.ancestry import trace
from registry.policy.consent import ConsentFindings, ConsentPolicy, find_consent, strictest
from registry.policy.policy_file import read_policies
from registry.policy.terms import read_datasets
from registry.store.artifacts import Store

_log = logging.getLogger(__name__)
_SHOWN = 20


def check_new_dataset(home: Home, manifest: Manifest, policy: ConsentPolicy | None, where: str) -> None:
    """Warns of broken and missing statements about the images of a dataset that ingest made, or refuses it.

    Args:
        home: The home, whose policy holds if it is stricter.
        manifest: The dataset.
        policy: The policy of the ingest step; None leaves it to the home.
        where: The step, for errors.

    Raises:
        RightsError: The policy is `strict`, and a statement is broken or missing; has all of them.
        PolicyError: The home's policy cannot be used.
    """
    entries = tuple(entry.model_dump(mode="json") for entry in manifest.pictures)
    findings = find_consent({ArtifactRef("manifest", "0" * 64, 0): entries}, now().date())
    _apply(strictest({read_policies(home.path).consent, policy}), findings, where)


def check_datasets(home: Home, store: Store, lineage: Lineage, datasets: Iterable[ArtifactRef], where: str) -> None:
    """Warns of statements about the images of recorded datasets that are broken by now or missing, or refuses them.

    Args:
        home: The home.
        store: Its store.
        lineage: Its lineage, which has the policies of the ingest steps.
        datasets: The datasets.
        where: The step, for errors.

    Raises:
        RightsError: The policy is `strict`, and a statement is broken or missing; has all of them.
        PolicyError: The home's policy cannot be used.
    """
    refs, policies = list(datasets), {read_policies(home.path).consent}
    with lineage.database.read() as session:
        for ref in refs:
            policies |= trace(session, ref).consent_policies
    policy = strictest(policies)
    if refs and policy != "off":
        _apply(policy, find_consent(read_datasets(store, refs), now().date()), where)


def _apply(policy: str, findings: ConsentFindings, where: str) -> None:
    problems = (*findings.broken, *findings.missing)
    if policy == "strict" and problems:
        shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else "")
        raise RightsError(
            f"the consent policy is strict, and the dataset has {shown}",
            where=where,
            remedy="complete the consent file, or remove these images",
        )
    if policy == "warn":
        for warning in findings.warnings[:_SHOWN]:
            _log.warning("the dataset has %s", warning)

"""Evaluates policies: license terms and how they combine, consent, alias policies, revoked subjects. Writes nothing."""

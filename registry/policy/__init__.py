"""Policies: license terms and how they combine, consent, alias policies, revoked subjects. Decides and changes nothing."""

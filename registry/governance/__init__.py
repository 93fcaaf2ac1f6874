"""Who may have what: licences as a lattice, consent, policies of aliases, revoked subjects. Decides; does nothing."""

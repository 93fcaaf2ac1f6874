"""Who may have what: licences as a lattice, consent, policies of aliases, and recall."""

"""The way from each schema to the next, as revisions of Alembic; a revision never changes once it was released.

Their numbers are those of `registry.store.tables.SCHEMA`. A revision says all it needs by itself and reads nothing of
`registry.store.tables`, which knows only the newest schema. `registry.store.schema` runs them.
"""

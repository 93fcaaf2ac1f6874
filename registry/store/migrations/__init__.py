"""Alembic revisions from each schema to the next; a released revision never changes.

A revision's number is the value of `registry.store.tables.SCHEMA` that it produces. A revision imports nothing from
`registry.store.tables`, which declares only the newest schema. `registry.store.schema` runs the revisions.
"""

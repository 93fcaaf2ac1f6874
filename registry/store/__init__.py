"""The content-addressed store of artifacts (folder, S3) and the database (SQLite, PostgreSQL) with its migrations."""

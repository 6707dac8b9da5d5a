"""Alembic revisions, oldest first. A shipped step is never edited."""

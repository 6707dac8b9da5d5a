"""Alembic's entry: runs the steps on the connection it is handed. Never used without one."""

from alembic import context

from ckptd.catalog import schema

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=schema.metadata,
    transactional_ddl=True,  # true of SQLite too, once the driver begins nothing by itself
    render_as_batch=True,  # SQLite alters a table by making a new one
)
with context.begin_transaction():
    context.run_migrations()

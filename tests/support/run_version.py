"""The daemon of another version: python run_version.py VERSION HOME FLAGS..., HOME with the schema's steps (see `make_home`).

Today's code, under another version's name and with one more step of the schema: that is what an upgrade
puts in the place of a running daemon.
"""

import shutil
import sys
from pathlib import Path

import ckptd
from ckptd.catalog import versions

STEP = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "{name}", "{before}", None, None
def upgrade():
    with op.batch_alter_table("root") as root:
        root.add_column(sa.Column("color", sa.Text()))
    op.execute("UPDATE root SET color = 'blue'")
def downgrade():
    op.drop_column("root", "color")
"""
NEXT = "9000"


def make_home(home: Path) -> None:
    """Write today's steps and one more."""
    shutil.copytree(versions.HERE / "steps", home / "steps")
    for path in versions.HERE.glob("*.*"):
        shutil.copy(path, home)
    (home / "steps" / "v9000_color.py").write_text(STEP.format(name=NEXT, before=versions.HEAD))


def main() -> int:
    version, home, *flags = sys.argv[1:]
    ckptd.__version__ = version
    versions.HERE, versions.HEAD = Path(home), NEXT
    from ckptd import daemon

    return daemon.main(flags)


if __name__ == "__main__":
    sys.exit(main())

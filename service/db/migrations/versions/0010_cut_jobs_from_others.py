"""cut jobs from others

Revision: 0010, after 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cut_from", sa.String(length=40), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "cut_from")

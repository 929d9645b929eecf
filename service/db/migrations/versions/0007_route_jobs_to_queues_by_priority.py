"""route jobs to queues, by priority

Revision: 0007, after 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("queue", sa.String(length=48), nullable=False, server_default="default"))
    op.add_column("jobs", sa.Column("priority", sa.String(length=32), nullable=False, server_default="normal"))


def downgrade() -> None:
    op.drop_column("jobs", "priority")
    op.drop_column("jobs", "queue")

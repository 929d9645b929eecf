"""pause, resume and delete jobs

Revision: 0004, after 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not batch operations: see 0003.
    op.add_column("stages", sa.Column("attempts_forgiven", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("stages", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_deleted_at", "jobs")
    op.drop_column("jobs", "deleted_at")
    # Earlier versions know no pause.
    op.execute("UPDATE stages SET status = 'cancelled' WHERE status = 'paused'")
    op.execute("UPDATE jobs SET status = 'cancelled' WHERE status = 'paused'")
    op.execute("UPDATE jobs SET status = 'cancelling' WHERE status = 'pausing'")
    op.drop_column("stages", "paused_at")
    op.drop_column("stages", "attempts_forgiven")

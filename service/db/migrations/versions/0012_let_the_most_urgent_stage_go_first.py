"""let the most urgent stage go first

Revision: 0012, after 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    began = sa.text("started_at IS NOT NULL")
    op.add_column("stages", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("trace", sa.JSON(), nullable=True))
    op.create_index(
        "ix_jobs_project_started_at", "jobs", ["project", "started_at"], postgresql_where=began, sqlite_where=began
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_project_started_at", "jobs")
    op.drop_column("jobs", "trace")
    op.drop_column("stages", "not_before")

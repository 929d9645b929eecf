"""index jobs for lists and retention

Revision: 0008, after 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    alive = sa.text("deleted_at IS NULL")
    op.create_index("ix_jobs_project_status_id", "jobs", ["project", "status", "id"])
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"], postgresql_where=alive, sqlite_where=alive)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE INDEX ix_jobs_labels ON jobs USING gin (CAST(labels AS jsonb) jsonb_path_ops)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_jobs_labels", "jobs")
    op.drop_index("ix_jobs_finished_at", "jobs")
    op.drop_index("ix_jobs_project_status_id", "jobs")

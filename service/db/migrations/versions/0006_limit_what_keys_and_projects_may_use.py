"""limit what keys and projects may use

Revision: 0006, after 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

KEPT = sa.text("artifact_bytes > 0 AND deleted_at IS NULL")


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("rate_limit", sa.String(length=32), nullable=True))
    op.add_column("api_keys", sa.Column("max_running_jobs", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_queued_jobs", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("max_artifact_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("api_key", sa.String(length=12), nullable=True))
    op.add_column("jobs", sa.Column("artifact_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE jobs SET artifact_bytes = (SELECT SUM(size) FROM artifacts WHERE artifacts.job_id = jobs.id) "
        "WHERE id IN (SELECT job_id FROM artifacts)"
    )
    op.create_index(
        "ix_jobs_kept",
        "jobs",
        ["project", "api_key", "artifact_bytes"],
        postgresql_where=KEPT,
        sqlite_where=KEPT,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_kept", "jobs")
    op.drop_column("jobs", "artifact_bytes")
    op.drop_column("jobs", "api_key")
    for name in ("max_artifact_bytes", "max_queued_jobs", "max_running_jobs", "rate_limit"):
        op.drop_column("api_keys", name)

"""A job as a run of MLflow, and its checkpoints as registered models.

The run is found by its tag, and what it holds is not logged again: an attempt goes on where the one before broke off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pdtrim.contract.jobs import Job
from pdtrim.contract.results import EvaluationResult, RemovalResult
from service.db.tables import ArtifactRow
from service.settings import Settings
from service.upkeep.publishing.record import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JOB_TAG = "pdtrim.job"
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
"""What MLflow takes in one call."""
MAX_PARAM, MAX_TAG = 6000, 5000
UNFIT = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow takes in no name."""
LONG = ("data.text", "evaluation.tasks")
"""Fields that are text rather than parameters; `spec` among the tags does not need them either."""


def publish(record: Record, settings: Settings) -> list[str]:
    """Log and register the job; returns the address of its run. Raises: what MLflow raises."""
    # The outbox tries again, with longer pauses. And what is self-hosted tells nobody that it runs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = settings.mlflow_tracking_uri
    if uri is None:
        raise ValueError("PDTRIM_MLFLOW_TRACKING_URI is not set where the service reconciles")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise RuntimeError("MLflow's client is not installed here: pip install 'pdtrim[mlflow]'") from error

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = _run(client, settings.mlflow_experiment, record.job)
    _log_figures(client, run, record.job)
    held = dict(_held(client, run.info.run_id, ""))
    for row in record.papers:
        _log_file(client, run, record, row, f"{row.stage}/{row.name}", held)
    for role, rows in record.checkpoints.items():
        for row in rows:
            _log_file(client, run, record, row, row.name, held)
        _register(client, run, record.job, role)
    client.set_terminated(run.info.run_id, "FINISHED", end_time=_millis(record.job))
    return [f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"]


def _run(client: MlflowClient, experiment: str, job: Job) -> Run:
    found = client.get_experiment_by_name(experiment)
    number = client.create_experiment(experiment) if found is None else found.experiment_id
    runs = client.search_runs([number], f"tags.`{JOB_TAG}` = '{job.id}'", max_results=1)
    if runs:
        return runs[0]
    labels = {f"pdtrim.metadata.{key}": value[:MAX_TAG] for key, value in job.metadata.items()}
    tags = {JOB_TAG: job.id, "pdtrim.model": job.spec.model.source, **labels}
    started = int((job.started_at or job.created_at).timestamp() * 1000)
    return client.create_run(number, start_time=started, tags=tags, run_name=f"{_model_name(job)} {job.id[-8:]}")


def _log_figures(client: MlflowClient, run: Run, job: Job) -> None:
    from mlflow.entities import Metric, Param

    spec = job.spec.model_dump(mode="json", exclude={"metadata"})
    wanted = {key: value for key, value in _leaves(spec) if value is not None and not key.startswith(LONG)}
    if job.model_revision is not None:
        wanted["model.revision"] = job.model_revision
    params = [Param(key, str(value)[:MAX_PARAM]) for key, value in wanted.items() if key not in run.data.params]
    for start in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(run.info.run_id, params=params[start : start + PARAMS_AT_ONCE])
    metrics = [
        # The same time in every attempt, so that a metric that two of them log is one to MLflow.
        Metric(key, value, _millis(job), 0)
        for key, value in sorted(figures(job).items())
        if key not in run.data.metrics
    ]
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + METRICS_AT_ONCE])


def figures(job: Job) -> dict[str, float]:
    """Every number that evaluation and removal recorded, under its path: `decode.perplexity.value`."""
    chosen: dict[str, object] = {}
    if evaluation := job.result(EvaluationResult):
        found = evaluation.model_dump(mode="json")
        chosen |= {**found["models"], "pair": found["pair"], "tasks": found["tasks"]}
    if removal := job.result(RemovalResult):
        chosen["search"] = removal.model_dump(mode="json", include={"losses", "effort"})
    return {
        UNFIT.sub("_", key): float(value)
        for key, value in _leaves(chosen)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _leaves(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _held(client: MlflowClient, run_id: str, folder: str) -> Iterator[tuple[str, int]]:
    """Path and size of every file that the run has."""
    for entry in client.list_artifacts(run_id, folder or None):
        if entry.is_dir:
            yield from _held(client, run_id, entry.path)
        else:
            yield entry.path, entry.file_size or 0


def _log_file(
    client: MlflowClient, run: Run, record: Record, row: ArtifactRow, path: str, held: Mapping[str, int]
) -> None:
    # An artifact never changes, so that one of this size is whole.
    if held.get(path) != row.size:
        with record.file(row) as local:
            folder = PurePosixPath(path).parent.as_posix()
            client.log_artifact(run.info.run_id, str(local), folder if folder != "." else None)


def _register(client: MlflowClient, run: Run, job: Job, role: str) -> None:
    """Make a version of the registered model, unless this run has one already."""
    from mlflow.exceptions import MlflowException

    name = f"{_model_name(job)}-{role}"
    if any(version.name == name for version in client.search_model_versions(f"run_id='{run.info.run_id}'")):
        return
    try:
        client.create_registered_model(name, description=f"{job.spec.model.source}, pruned by PDTrim: {role}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {JOB_TAG: job.id, "pdtrim.role": role}
    client.create_model_version(name, f"{run.info.artifact_uri}/{role}", run.info.run_id, tags=tags)


def _model_name(job: Job) -> str:
    """`pdtrim-` and the last part of the source's name."""
    last = job.spec.model.source.rstrip("/").rpartition("/")[2]
    return f"pdtrim-{re.sub(r'[^A-Za-z0-9_.-]', '_', last)}"


def _millis(job: Job) -> int:
    return int((job.finished_at or job.created_at).timestamp() * 1000)

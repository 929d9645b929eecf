"""Prunes a model with PDTrim Service: ordinary tasks, no operator of its own.

PDTRIM_URL and PDTRIM_API_KEY in the workers' environment say where the service is. The wait holds no slot.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, PokeReturnValue, dag, get_current_context, task
from pdtrim_http import finished, submit


@dag(
    schedule=None,
    params={
        "model": Param("reference", type="string"),
        "prefill": Param(2, type="integer", minimum=0),
        "decode": Param(4, type="integer", minimum=0),
    },
)
def prune_model() -> None:
    """Submit a job, wait for it, and hand its figures to what comes after."""

    @task(retries=5, retry_delay=timedelta(seconds=30))
    def submit_job() -> str:
        context = get_current_context()
        params = context["params"]
        spec = {
            "model": params["model"],
            "prefill": {"remove_blocks": params["prefill"]},
            "decode": {"remove_blocks": params["decode"]},
            "metadata": {"airflow_run": context["run_id"][:512]},
        }
        # A retry of this task asks for the same job.
        return submit(spec, f"{context['dag'].dag_id} {context['run_id']}")

    @task.sensor(mode="reschedule", poke_interval=60, timeout=timedelta(days=2).total_seconds())
    def wait(job_id: str) -> PokeReturnValue:
        job = finished(job_id)
        return PokeReturnValue(is_done=job is not None, xcom_value=job)

    @task
    def figures(job: dict[str, Any]) -> dict[str, float]:
        evaluation = next(stage["metrics"] for stage in job["stages"] if stage["name"] == "evaluation")
        return {name: model["perplexity"]["value"] for name, model in evaluation["models"].items()}

    figures(wait(submit_job()))


prune_model()

"""What the client's two forms share, seen through the asynchronous one, and what jobs can do in both."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pdtrim.client import AsyncClient, AsyncClientJob, Client, ClientJob, ServiceError, UnsafeName
from pdtrim.contract.jobs import JobStatus, StageName
from service.settings import Settings
from tests.found import plan
from tests.gateway import model
from tests.live_gateway import LiveGateway, live, relay

pytestmark = pytest.mark.server

__all__ = ["model"]


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as running:
        yield running


def play(gateway: LiveGateway, job_id: str) -> None:
    """Play the worker to the job's end."""
    for stage in StageName:
        left = {StageName.REMOVAL: {"plan.json": plan().model_dump_json().encode()}}
        left |= {StageName.EXPORT: {"decode/config.json": b"{}", "prefill/config.json": b"[]"}}
        gateway.played.store(job_id, stage, left.get(stage, {}))


def test_both_clients_and_their_jobs_offer_the_same() -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert offered(Client) == offered(AsyncClient)
    assert offered(ClientJob) == offered(AsyncClientJob)
    assert "job_id" not in inspect.signature(ClientJob.export).parameters
    assert inspect.signature(Client.export).parameters.keys() == inspect.signature(AsyncClient.export).parameters.keys()


def test_a_job_is_made_followed_cut_and_downloaded_without_blocking(gateway: LiveGateway, tmp_path: Path) -> None:
    async def use() -> None:
        heard = list[str]()
        async with AsyncClient(gateway.url, patience_s=20) as client:
            job = await client.create(gateway.played.spec)
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.to_thread.run_sync, play, gateway, job.id)
                job = await job.wait(progress=lambda event: heard.append(event.type))
            assert (job.status, heard[-1]) == (JobStatus.SUCCEEDED, "job.succeeded")
            assert [point.remove_blocks for point in (await job.frontier()).decode] == [2, 3, 4]
            other = await job.export(prefill=2, decode=3, metadata={"cut": "smaller"})
            assert (other.cut_from, other.metadata) == (job.id, {"cut": "smaller"})
            assert (await other.cancel()).status == JobStatus.CANCELLED
            (path,) = await job.download(tmp_path / "to", only="decode/")
            assert path.read_bytes() == b"{}"
            assert [one.name async for one in job.artifacts(stage=StageName.REMOVAL)] == ["plan.json"]
            assert [one.id for one in (await client.page(metadata={"cut": "smaller"})).data] == [other.id]
            with pytest.raises(ServiceError, match="no set of 5"):
                await job.export(prefill=2, decode=5)

    anyio.run(use)


def test_a_blocking_job_does_the_same_where_a_loop_runs_already(gateway: LiveGateway, tmp_path: Path) -> None:
    async def in_a_notebook() -> None:
        with Client(gateway.url, patience_s=20) as client:
            job = client.create(gateway.played.spec)
            play(gateway, job.id)
            job = job.wait(progress=True)
            assert job.status == JobStatus.SUCCEEDED
            assert next(iter(job.events())).type == "job.created"
            assert job.export(prefill=1, decode=1).refresh().cut_from == job.id
            assert {path.read_bytes() for path in job.download(tmp_path)} == {b"{}", b"[]"}

    anyio.run(in_a_notebook)


def test_an_export_whose_answer_is_lost_is_sent_again_and_makes_one_job(gateway: LiveGateway) -> None:
    job_id = gateway.played.create()
    play(gateway, job_id)
    with relay(gateway.settings.port, break_after=[1]) as broken, Client(broken.url, patience_s=20) as through:
        cut = through.export(job_id, prefill=2, decode=4)

        assert [job.id for job in through.page().data] == [cut.id, job_id]
        assert through.create(gateway.played.spec, idempotency_key="k") == through.create(
            gateway.played.spec, idempotency_key="k"
        )


def test_an_artifact_that_would_lie_elsewhere_is_not_downloaded(gateway: LiveGateway, tmp_path: Path) -> None:
    job_id = gateway.played.create()
    with Client(gateway.url) as client:
        for stage in list(StageName)[:4]:
            gateway.played.store(job_id, stage, {"model.safetensors": b"1"} if stage == StageName.EXPORT else {})
        with gateway.played.database.begin() as connection:
            connection.exec_driver_sql("UPDATE artifacts SET name = '../model.safetensors'")

        with pytest.raises(UnsafeName, match="outside"):
            client.download_all(job_id, tmp_path / "to")
    assert not (tmp_path / "model.safetensors").exists()


def test_what_a_prompt_and_a_notebook_show_is_readable_and_escaped(gateway: LiveGateway) -> None:
    with Client(gateway.url) as client:
        job = client.create({**gateway.played.spec, "metadata": {"team": "serving"}})
        play(gateway, job.id)

        assert repr(job).startswith(f"<job {job.id} queued: file:///")
        assert repr(job).endswith("prefill 1, decode 2>")
        assert repr(client) == f"Client('{gateway.url}')"
        shown = client.create(gateway.played.spec)
        gateway.played.claim(shown.id, StageName.SCORING)
        shown = shown.refresh()
        shown.stages[0].message = "<script>"
        assert "&lt;script&gt;" in shown._repr_html_()
        assert "0.1100" in job.frontier()._repr_html_()
        assert "KV cache a token" in client.estimate(gateway.played.spec)._repr_html_()

"""The examples: their syntax, what they refer to, and the part that talks to the service, against a gateway."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pdtrim.contract.errors import PDTrimError
from pdtrim.contract.jobs import ErrorInfo, StageName
from pdtrim.contract.spec import JobSpec
from service.settings import Settings
from tests.gateway import write_model
from tests.live_gateway import LiveGateway, live

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKFLOW: dict[str, Any] = yaml.safe_load((EXAMPLES / "argo" / "prune-model.yaml").read_text())["spec"]
TEMPLATES = {template["name"]: template for template in WORKFLOW["templates"]}
KEY = "any-key"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LiveGateway]:
    model = write_model(tmp_path / "models" / "tiny")
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", (tmp_path / "models").as_uri()])
    with live(settings, model) as running:
        yield running


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch, service: LiveGateway) -> ModuleType:
    """What the DAG imports, as Airflow lets it."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "airflow"))
    monkeypatch.setenv("PDTRIM_URL", service.url)
    monkeypatch.delitem(sys.modules, "pdtrim_http", raising=False)
    return import_module("pdtrim_http")


def test_the_dag_submits_once_and_waits_for_the_end(http: ModuleType, service: LiveGateway) -> None:
    job_id = http.submit(dict(service.played.spec), "prune_model manual__1")
    assert http.submit(dict(service.played.spec), "prune_model manual__1") == job_id
    assert http.finished(job_id) is None
    service.played.run(job_id)
    assert http.finished(job_id)["id"] == job_id

    failing = http.submit(dict(service.played.spec), "prune_model manual__2")
    service.played.fail(failing, StageName.SCORING, ErrorInfo(code=PDTrimError.code, message="no luck"))
    with pytest.raises(RuntimeError, match=rf"{failing} failed: no luck"):
        http.finished(failing)


def test_the_workflow_submits_once_and_waits_for_the_end(service: LiveGateway) -> None:
    environment = os.environ | {
        "PDTRIM_URL": service.url, "PDTRIM_API_KEY": KEY, "KEY": "f1c9", "SPEC": json.dumps(dict(service.played.spec)),
    }  # fmt: skip
    assert TEMPLATES["submit"]["script"]["command"] == ["python"]
    script = [sys.executable, "-c", TEMPLATES["submit"]["script"]["source"]]
    first, again = (subprocess.check_output(script, env=environment, text=True).strip() for _ in range(2))
    assert re.fullmatch("job_[0-9a-f]{32}", first)
    assert again == first
    service.played.run(first)
    program, *arguments = TEMPLATES["wait"]["container"]["command"]
    assert program == "pdtrim"
    filled = [argument.replace("{{inputs.parameters.job}}", first) for argument in arguments]
    subprocess.run([sys.executable, "-m", "pdtrim.command", *filled], env=environment, check=True, capture_output=True)


def test_the_workflow_refers_to_what_there_is() -> None:
    given = {parameter["name"]: parameter["value"] for parameter in WORKFLOW["arguments"]["parameters"]}
    JobSpec.model_validate_json(given["spec"])
    text = (EXAMPLES / "argo" / "prune-model.yaml").read_text()
    assert set(re.findall(r"\{\{workflow\.parameters\.(\w+)\}\}", text)) == given.keys()
    steps = [step for group in TEMPLATES[WORKFLOW["entrypoint"]]["steps"] for step in group]
    assert {step["template"] for step in steps} == TEMPLATES.keys() - {WORKFLOW["entrypoint"]}
    assert set(re.findall(r"\{\{steps\.(\w+)\.", text)) <= {step["name"] for step in steps}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")) + sorted(EXAMPLES.rglob("*.sh")), ids=lambda p: p.name)
def test_every_example_can_be_read(path: Path) -> None:
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)
    else:
        ast.parse(path.read_text())


def checkpoint(folder: Path, role: str, layers: int, layer_map: list[int], job: str = "job_1") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    (folder / "pdtrim.json").write_text(json.dumps({"role": role, "kv_layer_map": layer_map, "job": job}))
    return folder


def test_only_pairs_whose_layers_match_one_to_one_are_served(tmp_path: Path) -> None:
    prefill = checkpoint(tmp_path / "prefill", "prefill", 3, [])
    unified = checkpoint(tmp_path / "unified", "unified", 3, [0, 1, 2])

    def told(first: Path, second: Path) -> tuple[int, str]:
        command = [sys.executable, str(EXAMPLES / "serving" / "check_pair.py"), str(first), str(second)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout

    assert told(unified, unified)[0] == 0
    assert told(prefill, checkpoint(tmp_path / "narrow", "decode", 3, [0, 1, 2]))[0] == 0
    code, why = told(prefill, checkpoint(tmp_path / "short", "decode", 2, [0, 2]))
    assert (code, "prefill has 3 layers, and decode's 2 continue those of [0, 2]" in why) == (1, True)
    assert told(prefill, checkpoint(tmp_path / "other", "decode", 3, [0, 1, 2], job="job_2"))[0] == 1
    assert told(unified, prefill)[0] == 1

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.errors import InvalidRequest, ModelUnsupported, PDTrimError, TooManyBlocks
from pdtrim.contract.spec import HalfTarget, JobSpec
from service.checking import preflight
from service.settings import Settings
from tests.gateway import Gateway, gateway, model, problem_of, write_model
from tests.weights import safetensors_file

__all__ = ["gateway", "model"]

CONFIG = {"model_type": "llama", "num_hidden_layers": 6, "max_position_embeddings": 1024}


@pytest.fixture
def gateway_settings(tmp_path: Path) -> Settings:
    allowed = ["reference", "builtin:", (tmp_path / "models").as_uri(), "s3://models"]
    return Settings(data_dir=tmp_path / "data", allowed_sources=allowed, s3_endpoint_url="http://127.0.0.1:1")


def spec(prefill: int = 1, decode: Any = 2, **changes: Any) -> JobSpec:
    target = decode if isinstance(decode, dict) else {"remove_blocks": decode}
    removals = {"prefill": {"remove_blocks": prefill}, "decode": target}
    return JobSpec.model_validate({"model": "reference", **removals, **changes})


def refusal(gateway: Gateway, code: str, **changes: Any) -> dict[str, Any]:
    return problem_of(gateway.client.post("/v1/jobs", json={**gateway.spec, **changes}), 422, code)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "opt"])
def test_supported_architectures_pass(kind: str) -> None:
    preflight.check_config(spec(), {**CONFIG, "model_type": kind})


def test_other_names_of_the_same_numbers_are_read() -> None:
    config = {"model_type": "gpt2", "n_layer": 3, "n_positions": 128}
    with pytest.raises(TooManyBlocks, match="the model has 3 blocks"):
        preflight.check_config(spec(1, 3), config)
    with pytest.raises(InvalidRequest, match="at most 128 tokens"):
        preflight.check_config(spec(calibration={"window_tokens": 129}), config)


def test_an_answer_beyond_the_context_is_refused_at_its_field() -> None:
    check = partial(preflight.check_config, config={**CONFIG, "max_position_embeddings": 128})
    check(spec(calibration={"window_tokens": 128}))
    with pytest.raises(InvalidRequest, match=r"after a prompt of half a window, 64 tokens.* at most 128") as refused:
        check(spec(calibration={"window_tokens": 128}, evaluation={"speed_tokens": 65}))
    assert refused.value.param == "evaluation.speed_tokens"


def test_a_decoder_only_model_that_was_never_tried_is_left_to_the_worker() -> None:
    config = {**CONFIG, "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]}
    preflight.check_config(spec(), config)
    preflight.check_config(spec(), {**config, "auto_map": {"AutoModel": "x.py"}})  # Code that nobody needs.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_encoder_decoder": True}, "'starcoder2', which has an encoder"),
        ({"architectures": ["Starcoder2ForSequenceClassification"]}, "which is no language model"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "'llama', as .*which is no language model"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "'bert', an encoder"),
        (
            {"model_type": "fuyu", "text_config": {}},
            "'fuyu', a multimodal model; the service prunes the text decoder of gemma3, internvl",
        ),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.py"}}, "'own', which needs code of its own"),
        ({"model_type": "own"}, "'own', which transformers does not know"),
        ({"dtype": "auto"}, "has dtype = 'auto'; it has to be one of"),
    ],
)
def test_what_is_no_decoder_only_model_is_refused_in_a_sentence(change: dict[str, Any], reason: str) -> None:
    config = {**CONFIG, "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]}
    with pytest.raises(ModelUnsupported, match=reason):
        preflight.check_config(spec(), config | change)


@pytest.mark.parametrize(
    "kind",
    [
        {"model_type": "qwen3_next"},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 3},
        {"model_type": "nemotron_h", "num_hidden_layers": None, "hybrid_override_pattern": "M-M*M-"},
    ],
)
def test_layers_that_keep_a_state_are_for_one_checkpoint_alone(kind: dict[str, Any]) -> None:
    preflight.check_config(spec(2, 2), CONFIG | kind)
    with pytest.raises(ModelUnsupported, match="Let both halves give up the same") as refused:
        preflight.check_config(spec(1, 2), CONFIG | kind)
    assert refused.value.param == "decode"


def test_a_bias_by_distance_that_no_cache_tells_is_for_one_checkpoint_alone() -> None:
    preflight.check_config(spec(2, 2), CONFIG | {"model_type": "bloom"})
    with pytest.raises(ModelUnsupported, match=r"a bias by distance.*Let both halves give up the same") as refused:
        preflight.check_config(spec(1, 2), CONFIG | {"model_type": "bloom"})
    assert refused.value.param == "decode"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma3n_text"}, r"'gemma3n_text', whose blocks pass on several hidden states .* \(AltUp\)"),
        ({"model_type": "gemma3n", "text_config": {}}, "and whose last blocks read the keys and values of others"),
        ({"model_type": "gemma4_text"}, "of whose blocks has a part of one table of embeddings"),
        ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}, "`hidden_size_per_layer_input`"),
        (
            {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
            r"whose last blocks \(`num_kv_shared_layers`\) read the keys and values of others",
        ),
        ({"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared"] * 3}, "pass on which tokens to attend to"),
        ({"model_type": "glm_moe_dsa", "index_topk_pattern": "FSFSFS"}, "pass on which tokens to attend to"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scaled by their numbers"),
        ({"model_type": "jamba"}, "of one kind or another by their numbers, which change when one of them goes"),
        ({"model_type": "mamba2"}, "'mamba2', whose blocks keep no keys and values; this service prunes"),
    ],
)
def test_what_no_block_can_be_left_out_of_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelUnsupported, match=reason) as refused:
        preflight.check_config(spec(2, 2), CONFIG | change)
    assert refused.value.param == "model.source"


def test_a_last_block_unlike_all_others_has_to_stay() -> None:
    config = CONFIG | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    preflight.check_config(spec(1, 2, search={"protect": [0, 5]}), config)
    with pytest.raises(ModelUnsupported, match=r"keep it with search.protect: \[0, 5\]") as refused:
        preflight.check_config(spec(1, 2, search={"protect": [0]}), config)
    assert refused.value.param == "search.protect"


def test_a_hybrid_with_attention_alone_may_be_a_pair() -> None:
    preflight.check_config(spec(1, 2), CONFIG | {"model_type": "lfm2", "layer_types": ["full_attention"] * 6})


VISION_LANGUAGE = {"model_type": "qwen3_vl", "text_config": {**CONFIG, "model_type": "qwen3_vl_text"}}
VISION_LANGUAGE |= {"vision_config": {"deepstack_visual_indexes": [8, 16, 24]}}


def test_a_job_is_held_against_the_text_decoder_of_a_vision_language_model() -> None:
    kept = {"search": {"protect": [0, 1, 2]}}
    preflight.check_config(spec(1, 2, **kept), VISION_LANGUAGE)
    with pytest.raises(TooManyBlocks):
        preflight.check_config(spec(4, 4, **kept), VISION_LANGUAGE)
    flat = {**CONFIG, "model_type": "qwen2_5_vl", "vision_config": {}}
    preflight.check_config(spec(1, 2), {**flat, "architectures": ["Qwen2_5_VLForConditionalGeneration"]})


def test_a_text_decoder_whose_class_alone_knows_how_many_blocks_it_has_is_refused_in_a_sentence() -> None:
    published = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    with pytest.raises(ModelUnsupported, match="leaves the number of blocks to its class: write it there") as refused:
        preflight.check_config(spec(), published)
    assert refused.value.param == "model.source"


def test_blocks_to_which_an_image_is_added_have_to_stay() -> None:
    with pytest.raises(ModelUnsupported, match=r"keep them with search.protect: \[0, 1, 2\]") as refused:
        preflight.check_config(spec(1, 2, search={"protect": [0, 2]}), VISION_LANGUAGE)
    assert refused.value.param == "search.protect"


def test_what_an_architecture_cannot_do_is_refused_at_its_field() -> None:
    config = {**CONFIG, "model_type": "gpt2"}
    asked: dict[str, dict[str, Any]] = {
        "kv_tokens": {"kv_tokens": {"ratio": 2}},
        "distillation.trainable": {"distillation": {"trainable": "lora"}},
        "decode.mlp_width": {"decode": {"remove_blocks": 1, "mlp_width": 0.5}},
    }
    for param, change in asked.items():
        with pytest.raises(ModelUnsupported) as refused:
            preflight.check_config(spec(**change), config)
        assert refused.value.param == param


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "bert"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "6"},
        {"num_hidden_layers": True},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_other_models_are_refused_at_the_model_s_field(change: dict[str, Any]) -> None:
    with pytest.raises(ModelUnsupported) as refused:
        preflight.check_config(spec(), {**CONFIG, **change})

    assert refused.value.param == "model.source"


def test_all_but_one_block_can_be_removed() -> None:
    preflight.check_config(spec(5, 5), CONFIG)


@pytest.mark.parametrize(("prefill", "decode", "stage"), [(1, 6, "decode"), (6, 6, "prefill"), (7, 1024, "prefill")])
def test_too_many_blocks_are_refused_at_the_stage_s_field(prefill: int, decode: int, stage: str) -> None:
    with pytest.raises(TooManyBlocks) as refused:
        preflight.check_config(spec(prefill, decode), CONFIG)

    assert refused.value.param == f"{stage}.remove_blocks"
    assert "at most 5 can be removed" in refused.value.message


NARROW = spec(decode={"remove_blocks": 2, "mlp_width": 0.5})


def test_gated_mlps_can_be_narrowed() -> None:
    preflight.check_config(NARROW, {**CONFIG, "intermediate_size": 64})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt_neox"},
        {"model_type": "mixtral", "num_local_experts": 8},
        {"num_local_experts": 8},
        {"num_experts": 128, "moe_intermediate_size": 16},
        {"intermediate_size": [64, 32]},
        {"intermediate_size": None},
        {"intermediate_size": 0},
    ],
)
def test_other_mlps_are_refused_at_the_width_s_field(change: dict[str, Any]) -> None:
    config = {**CONFIG, "intermediate_size": 64, **change}
    preflight.check_config(spec(), config)
    with pytest.raises(ModelUnsupported) as refused:
        preflight.check_config(NARROW, config)
    assert refused.value.param == "decode.mlp_width"
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("width", "available", "kept"),
    [(1, 50, 50), (0.5, 48, 24), (0.75, 48, 32), (0.99, 50, 48), (1e-9, 48, 8), (0.5, 3, 3), (0.75, 12288, 9216)],
)
def test_a_width_is_a_share_of_the_channels_in_multiples_of_8(width: float, available: int, kept: int) -> None:
    target = HalfTarget(remove_blocks=0, mlp_width=width)
    assert target.mlp_channels(available) == kept


@pytest.mark.parametrize(
    ("search", "param", "message"),
    [
        ({"protect": [6]}, "search.protect", "lists block 6, but the model's 6 blocks are 0 to 5"),
        ({"force": [1023]}, "search.force", "lists block 1023"),
        ({"protect": [0, 1, 2, 3, 4]}, "search.protect", "at most 1 can be removed, but decode.remove_blocks is 2"),
    ],
)
def test_constraints_that_the_model_cannot_meet_are_refused_at_their_field(
    search: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(PDTrimError) as refused:
        preflight.check_config(spec(search=search), CONFIG)

    assert refused.value.param == param
    assert refused.value.status == 422
    assert message in refused.value.message


def test_constraints_that_leave_just_enough_blocks_pass() -> None:
    preflight.check_config(spec(search={"protect": [0, 1, 4, 5], "force": [2]}), CONFIG)


@pytest.mark.parametrize(
    ("search", "param", "message"),
    [
        ({"protect": [1, 1]}, "search.protect", "block 1 is listed twice"),
        ({"protect": [1], "force": [1]}, "search.force", "block 1 is in both search.protect and search.force"),
        ({"force": [0, 2]}, "search.force", "search.force lists 2 blocks, but prefill.remove_blocks is 1"),
        ({"protect": [-1]}, "search.protect.0", "greater than or equal to 0"),
        ({"protect": [0] * 1025}, "search.protect", "at most 1024 items"),
        ({"seconds": 0}, "search.seconds", "greater than 0"),
    ],
)
def test_constraints_that_contradict_are_refused_at_their_field(
    gateway: Gateway, search: dict[str, Any], param: str, message: str
) -> None:
    body = refusal(gateway, "invalid_request", search=search)

    assert body["param"] == param
    assert message in body["detail"]


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill": {"max_perplexity_increase": 0.05}},
        {"decode": {"max_perplexity_increase": 0.05}},
        {"prefill": {"max_perplexity_increase": 0.01}, "decode": {"max_perplexity_increase": 0.05}},
        {"decode": {"max_perplexity_increase": 0.05, "remove_blocks": 5}},
        {"prefill": {"kv_only_blocks": 2}},
        {"prefill": {"flops": 0.7}, "decode": {"kv_bytes": 0.7}},
        {"prefill": {"remove_mlps": 1}, "decode": {"remove_blocks": 1, "weight_bytes": 0.7}},
    ],
)
def test_a_bound_a_part_or_a_budget_may_stand_for_a_count_or_beside_one(
    gateway: Gateway, changes: dict[str, Any]
) -> None:
    gateway.create(**changes)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"decode": {}}, "decode", "give `remove_blocks`, `max_perplexity_increase` or both"),
        (
            {"prefill": {"remove_blocks": 0}, "decode": {"flops": 0.7}},
            "decode.flops",
            "decode.flops is no budget of decode",
        ),
        ({"prefill": {"kv_bytes": 0.7}}, "prefill.kv_bytes", "prefill is bound by `flops`"),
        ({"prefill": {"flops": 0.7, "kv_only_blocks": 1}}, "prefill", "`flops` chooses what goes"),
        ({"decode": {"kv_bytes": 0.7, "weight_bytes": 0.7}}, "decode", "give one of `kv_bytes` and `weight_bytes`"),
        ({"prefill": {"flops": 0.0}}, "prefill.flops", "greater than 0"),
        ({"decode": {"max_perplexity_increase": -0.1}}, "decode.max_perplexity_increase", "greater than or equal to 0"),
        (
            {"prefill": {"max_perplexity_increase": 0.1, "remove_blocks": 3}},
            "prefill.remove_blocks",
            "may not exceed decode.remove_blocks (2)",
        ),
        (
            {"prefill": {"max_perplexity_increase": 0.1}, "search": {"force": [0, 1, 2]}},
            "search.force",
            "search.force lists 3 blocks, but decode.remove_blocks is 2",
        ),
        (
            {
                "prefill": {"max_perplexity_increase": 0.1},
                "decode": {"max_perplexity_increase": 0.1},
                "search": {"force": [0, 1, 2, 3, 4, 5]},
            },
            "search.force",
            "of which at most 5 can be removed",
        ),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_at_its_field(
    gateway: Gateway, changes: dict[str, Any], param: str, message: str
) -> None:
    response = gateway.client.post("/v1/jobs", json={**gateway.spec, **changes})

    assert response.status_code == 422
    assert response.json()["param"] == param
    assert message in response.json()["detail"]


def test_windows_longer_than_the_model_s_context_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        preflight.check_config(spec(calibration={"window_tokens": 1025}), CONFIG)

    assert refused.value.param == "calibration.window_tokens"


def test_the_reference_model_is_accepted_with_the_default_text(gateway: Gateway) -> None:
    gateway.create(model="reference")


def test_inline_text_needs_no_source(gateway: Gateway) -> None:
    gateway.create(data={"text": "Some text. " * 300})


def test_a_text_that_cannot_hold_the_least_windows_is_refused(gateway: Gateway, model: Path) -> None:
    path = model.parent / "a.txt"
    for content, source, param in (
        ("Some text. " * 200, "text", "data.text"),
        ("Some text. " * 200, "source", "data.source"),
    ):
        path.write_text(content)
        given = path.as_uri() if source == "source" else content
        refused = refusal(gateway, "invalid_request", data={source: given})
        assert refused["param"] == param
        assert "has 2200 bytes, which are no 12 windows of 256 tokens" in refused["detail"]
    gateway.create(data={"source": path.as_uri()}, calibration={"windows": 1, "window_tokens": 128})


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": "file:///etc"}, "source_not_allowed", "model.source"),
        ({"model": "hf://Qwen/Qwen3-8B"}, "source_not_allowed", "model.source"),
        ({"model": "pickle"}, "invalid_request", "model.source"),
        ({"model": "file://host/models"}, "invalid_request", "model.source"),
        ({"model": "file:///a%00b"}, "invalid_request", "model.source"),
        ({"model": {"source": "reference", "revision": "main"}}, "invalid_request", "model.revision"),
        ({"data": {"source": "file:///etc/passwd"}}, "invalid_request", "data.source"),
        ({"data": {"source": "file:///etc/passwd.txt"}}, "source_not_allowed", "data.source"),
        ({"evaluation": {"tasks": ["arc_easy"]}}, "source_not_allowed", "evaluation.tasks[0]"),
        ({"evaluation": {"tasks": ["!function a.b: 1"]}}, "invalid_request", "evaluation.tasks[0]"),
    ],
)
def test_a_source_that_may_not_be_read_is_named(
    gateway: Gateway, changes: dict[str, Any], code: str, param: str
) -> None:
    assert refusal(gateway, code, **changes)["param"] == param


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/estimate"])
def test_all_that_is_wrong_is_told_at_once_and_the_first_as_if_it_were_alone(gateway: Gateway, path: str) -> None:
    wrong = {
        "queue": "no-such",
        "data": {"source": "file:///etc/passwd.txt"},
        "evaluation": {"tasks": ["arc_easy"]},
        "decode": {"remove_blocks": 6},
        "calibration": {"window_tokens": 2048},
    }
    alone = gateway.client.post(path, json={**gateway.spec, "queue": "no-such"}).json()
    body = problem_of(gateway.client.post(path, json={**gateway.spec, **wrong}), 422, "no_such_queue")

    assert [(one["code"], one["param"]) for one in body["errors"]] == [
        ("no_such_queue", "queue"),
        ("source_not_allowed", "data.source"),
        ("source_not_allowed", "evaluation.tasks[0]"),
        ("too_many_blocks", "decode.remove_blocks"),
        ("invalid_request", "calibration.window_tokens"),
    ]
    assert all(one["detail"] for one in body["errors"])
    of_each_request = ("errors", "request_id")
    assert {name: body[name] for name in body if name not in of_each_request} == {
        name: alone[name] for name in alone if name not in of_each_request
    }
    assert "errors" not in alone


def test_counts_that_do_not_depend_on_one_another_are_refused_together() -> None:
    with pytest.raises(TooManyBlocks) as refused:
        preflight.check_config(spec(prefill=6, decode=7, search={"force": [0, 1, 2, 3, 4, 5]}), CONFIG)

    found = [refused.value, *refused.value.others]
    assert [one.param for one in found] == ["search.force", "prefill.remove_blocks", "decode.remove_blocks"]


def test_a_model_that_is_not_there_is_named(gateway: Gateway, model: Path) -> None:
    body = refusal(gateway, "source_unreadable", model=(model.parent / "absent").as_uri())

    assert body["param"] == "model.source"


def test_a_text_that_is_not_there_is_named(gateway: Gateway, model: Path) -> None:
    body = refusal(gateway, "source_unreadable", data={"source": (model / "absent.txt").as_uri()})

    assert body["param"] == "data.source"


def test_a_model_without_safetensors_is_refused(gateway: Gateway, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")

    assert "pickle" in refusal(gateway, "source_unreadable")["detail"]


def test_a_model_without_a_tokenizer_is_refused(gateway: Gateway, model: Path) -> None:
    (model / "tokenizer.json").unlink()

    body = refusal(gateway, "source_unreadable")

    assert body["param"] == "model.source"
    assert "has no tokenizer: neither tokenizer.json nor tokenizer.model" in body["detail"]


def test_a_model_whose_weights_are_no_safetensors_is_refused(gateway: Gateway, model: Path) -> None:
    (model / "model.safetensors").write_bytes(safetensors_file("a")[:-1])

    assert "the tensor 'a' is said to lie at bytes 0 to 4 of 3" in refusal(gateway, "source_unreadable")["detail"]


def test_a_model_that_is_too_large_is_refused(gateway: Gateway, model: Path) -> None:
    gateway.settings.max_model_bytes = 9

    body = refusal(gateway, "model_too_large")

    assert (body["param"], "at most 9" in body["detail"]) == ("model.source", True)


def test_a_link_out_of_what_is_allowed_is_refused(gateway: Gateway, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")

    assert refusal(gateway, "source_not_allowed")["param"] == "model.source"


def test_a_model_of_another_architecture_is_refused(gateway: Gateway, model: Path) -> None:
    write_model(model, model_type="bert")

    assert "bert" in refusal(gateway, "model_unsupported")["detail"]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/estimate"])
def test_a_configuration_of_more_blocks_than_there_are_tensors_is_refused_at_once(
    gateway: Gateway, model: Path, path: str
) -> None:
    write_model(model, num_hidden_layers=10**10)
    bound = {"max_perplexity_increase": 0.1}

    response = gateway.client.post(path, json={**gateway.spec, "prefill": bound, "decode": bound})

    body = problem_of(response, 422, "source_unreadable")
    assert body["param"] == "model.source"
    assert "num_hidden_layers = 10000000000" in body["detail"]


def test_a_model_of_more_blocks_than_a_job_can_name_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="at most 1024 blocks are pruned"):
        preflight.check_config(spec(), {**CONFIG, "num_hidden_layers": 1025})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, json.dumps("text").encode()])
def test_a_broken_config_is_the_request_s_fault(gateway: Gateway, model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)

    assert refusal(gateway, "source_unreadable")["param"] == "model.source"


def test_a_refused_job_leaves_nothing_behind(gateway: Gateway) -> None:
    refusal(gateway, "too_many_blocks", decode={"remove_blocks": 6})

    assert gateway.client.get("/v1/jobs").json()["data"] == []


def test_a_source_whose_server_is_silent_is_503(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")

    response = gateway.client.post("/v1/jobs", json={**gateway.spec, "model": "s3://models/llama"})

    assert problem_of(response, 503, "dependency_unavailable")["param"] == "model.source"

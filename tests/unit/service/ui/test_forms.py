"""The submit form: what is typed into it, and where its errors are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.spec import JobSpec
from service.ui import forms
from service.ui.presets import PRESETS, Preset

PRESET_ROWS = tuple(f"| {preset.title} |" for preset in PRESETS)
LEAST = {"model.source": "reference", "prefill.remove_blocks": "1", "decode.remove_blocks": "2"}


def defaults() -> dict[str, str]:
    return {field.path: field.value for field in forms.blank(["default"]).fields}


def test_the_blank_form_with_the_required_fields_is_the_default_job() -> None:
    spec = forms.to_spec(defaults() | LEAST)
    expected: dict[str, Any] = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
    assert spec == JobSpec.model_validate(expected)


def test_fields_know_their_bounds_choices_and_descriptions_from_the_schema() -> None:
    fields = {field.path: field for field in forms.blank(["default", "gpu-80g"]).fields}
    assert (fields["calibration.windows"].minimum, fields["calibration.windows"].maximum) == (1, 4096)
    assert list(fields["search.algorithm"].options) == ["annealing", "greedy", "exhaustive"]
    assert list(fields["queue"].options) == ["default", "gpu-80g"]
    assert fields["model.source"].required
    assert all(field.description for field in fields.values())


def test_json_reaches_what_has_no_field_and_goes_before_the_fields() -> None:
    rest = '{"search": {"protect": [0], "evaluations": 7}, "metadata": {"run": "9"}}'
    typed = defaults() | LEAST | {"search.evaluations": "99", "metadata": "team=serving, owner=a=b", "rest": rest}
    spec = forms.to_spec(typed)
    assert (spec.search.protect, spec.search.evaluations) == ((0,), 7)
    assert spec.metadata == {"team": "serving", "owner": "a=b", "run": "9"}


def test_a_whole_job_as_yaml_is_read_as_the_command_reads_it() -> None:
    rest = (
        "model: reference  # the small one\nprefill: {remove_blocks: 1}\ndecode:\n  remove_blocks: 2\nname: by text\n"
    )
    spec = forms.to_spec(defaults() | {"rest": rest})
    assert (spec.name, spec.prefill.remove_blocks, spec.decode.remove_blocks) == ("by text", 1, 2)


def test_all_errors_are_told_at_once_each_at_its_field() -> None:
    wrong = {
        "name": "x" * 101,
        "prefill.remove_blocks": "9",
        "calibration.windows": "many",
        "distillation.threshold": "7",
        "metadata": "serving",
        "rest": "search: {protect: [1, 1]}",
    }
    with pytest.raises(forms.Unreadable) as caught:
        forms.to_spec(defaults() | LEAST | wrong)
    # That prefill gives up more than decode is found only where all fields can be read.
    assert caught.value.errors.keys() == wrong.keys()
    assert all(len(reasons) == 1 for reasons in caught.value.errors.values())


def test_a_text_that_cannot_be_read_hides_no_other_error() -> None:
    with pytest.raises(forms.Unreadable) as caught:
        forms.to_spec(defaults() | {"decode.remove_blocks": "2", "rest": "a: &b 1"})
    assert caught.value.errors.keys() == {"rest", "model.source", "prefill.remove_blocks"}
    assert "anchors" in caught.value.errors["rest"][0]


def test_what_is_wrong_with_one_half_is_not_held_against_the_other() -> None:
    with pytest.raises(forms.Unreadable) as caught:
        forms.to_spec(defaults() | LEAST | {"decode.remove_blocks": "two", "rest": "search: {force: [1]}"})
    assert caught.value.errors.keys() == {"decode.remove_blocks"}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": "nightly", "metadata": {"team": "serving", "odd": "a, b=c"}},
        {"metadata": {"a": "1", "b": "x=y"}, "queue": "default", "priority": "high", "deadline_seconds": 60},
        {"search": {"protect": [0], "evaluations": 9}, "distillation": {"enabled": False, "losses": {"kl": 0.5}}},
        {"kv_tokens": {"ratio": 2.5}, "serving": {"first_token": "prefill"}, "prefill": {"remove_blocks": 0}},
        {"kv_tokens": {"attention": {"threshold": 0.5}}, "data": {"text": "some: text\nof mine"}},
        {"decode": {"max_perplexity_increase": 0.05, "mlp_width": 0.5}, "evaluation": {"tasks": ["arc_easy"]}},
    ],
)
def test_the_form_of_a_copy_says_what_the_job_said(spec: dict[str, Any]) -> None:
    least: dict[str, Any] = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
    job = JobSpec.model_validate(least | spec)
    assert forms.to_spec(forms.begun_from(job)) == job


@pytest.mark.parametrize("preset", PRESETS, ids=lambda one: one.name)
def test_a_preset_makes_a_job_and_is_known_again(preset: Preset) -> None:
    before = forms.with_settings_of(defaults() | LEAST | {"seed": "7"}, "frugal")
    typed = forms.with_settings_of(before, preset.name)
    assert forms.filled(typed, ["default"]).preset == preset
    assert forms.to_spec(typed).seed == 7
    changed = forms.filled(typed | {"distillation.heal_tokens": "5"}, ["default"])
    assert changed.preset is None


def test_a_folded_section_says_what_it_changes() -> None:
    typed = forms.with_settings_of(defaults() | {"queue": "gpu"}, "quick")
    told = {section.title: section.digest for section in forms.filled(typed, ["gpu", "cpu"]).folded}
    assert told["Distillation"] == "Healing tokens 16384"
    assert told["Text, calibration and search"] == "Calibration windows 16, Algorithm greedy"
    # As the browser sends the queue that is chosen first.
    assert told["Running"] == "as by default"


def test_an_unticked_box_is_false() -> None:
    assert forms.to_spec(LEAST).distillation.enabled is False


@pytest.mark.parametrize(
    ("typed", "place", "said"),
    [
        ({"model.source": ""}, "model.source", "required"),
        ({"decode.remove_blocks": "two"}, "decode.remove_blocks", "integer"),
        ({"prefill.remove_blocks": "3"}, "prefill.remove_blocks", "may not exceed decode"),
        ({"prefill.remove_blocks": ""}, "prefill.remove_blocks", "give `remove_blocks`"),
        ({"calibration.windows": "5000"}, "calibration.windows", "4096"),
        ({"metadata": "serving"}, "metadata", "key=value"),
        ({"metadata": "bad key=1"}, "metadata", "pattern"),
        ({"rest": '{"search": {"protect": [1, 1]}}'}, "rest", "search.protect: block 1 is listed twice"),
        ({"rest": '{"serach": {}}'}, "rest", "serach: there is no such field; did you mean search?"),
        ({"rest": "{"}, "rest", "line 2, column 1"),
        ({"rest": "[1]"}, "rest", "Give fields and their values"),
        ({"rest": '{"a": ' * 30 + "1" + "}" * 30}, "rest", "too deeply"),
        ({"rest": '{"a": ' * 600 + "1" + "}" * 600}, "rest", "too deeply"),
        ({"rest": '{"a": ' * 100_000 + "1" + "}" * 100_000}, "rest", "too deeply"),
    ],
)
def test_an_error_is_shown_at_its_field(typed: dict[str, str], place: str, said: str) -> None:
    with pytest.raises(forms.Unreadable) as caught:
        forms.to_spec(defaults() | LEAST | typed)
    form = forms.filled(defaults() | LEAST | typed, ["default"], caught.value.errors)
    (faulty,) = form.faulty
    assert faulty.path == place
    assert said in faulty.errors[0]
    assert faulty.value == typed[place]


def test_the_guide_lists_the_presets() -> None:
    guide = (Path(__file__).parents[4] / "docs/guides/dashboard.md").read_text()
    assert [line.split(" | ")[0] for line in guide.splitlines() if line.startswith(PRESET_ROWS)] == [
        f"| {preset.title}" for preset in PRESETS
    ]

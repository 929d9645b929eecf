"""The submit form: what is typed into it, and where its errors are shown."""

from __future__ import annotations

from typing import Any

import pytest

from pdtrim.contract.spec import JobSpec
from service.ui import forms

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

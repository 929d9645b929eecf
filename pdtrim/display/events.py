"""What an event of a job says in numbers: the same on a terminal and on the dashboard."""

from __future__ import annotations

from pdtrim.contract.jobs import Event
from pdtrim.display.quantities import listed

NUMBERS = {
    "attempt": "attempt",
    "worker": "worker",
    "evaluated": "sets",
    "tried": "tried",
    "loss": "loss",
    "held_out": "held out",
    "removed": "without",
    "artifacts": "artifacts",
    "code": "code",
    "param": "field",
}
"""What is shown of an event's data, by what it is called there."""


def numbers(event: Event) -> list[tuple[str, str]]:
    """The figures that an event carries, by what they are called; how far its stage has come is first."""
    data = event.data
    found = [] if event.progress is None else [("done", f"{event.progress:.0%}")]
    if "step" in data and "steps" in data:
        found.append(("step", f"{data['step']} of {data['steps']}"))
    return found + [(name, _text(data[key])) for key, name in NUMBERS.items() if data.get(key) not in (None, "")]


def _text(value: object) -> str:
    if isinstance(value, list):
        return listed(value)
    return f"{value:,.5g}" if isinstance(value, float) else str(value)

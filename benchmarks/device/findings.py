"""What the parts find, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and their range."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lowest:{spec}}–{self.highest:{spec}})"


Value = str | int | float | Spread | None


@dataclass(frozen=True)
class Table:
    """Rows of values below columns, each column with the format of its values."""

    title: str
    columns: Mapping[str, str]
    rows: list[Sequence[Value]] = field(default_factory=list)

    def add(self, *values: Value) -> None:
        """One more row."""
        self.rows.append(values)

    def markdown(self) -> str:
        """Title and table; a dash stands where there is no value."""
        lines = [f"{self.title}\n", f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        for row in self.rows:
            cells = ["–" if v is None else format(v, spec) for v, spec in zip(row, self.columns.values(), strict=True)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


@dataclass
class Findings:
    """What a part found, what of it should not be, and how long it took."""

    tables: list[Table] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, title: str, columns: Mapping[str, str]) -> Table:
        """A new table, empty yet."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def judge(self, what: str, value: float, allowed: float) -> None:
        """A failure where `value` is larger than allowed, or not a number."""
        if not value <= allowed:
            self.failures.append(f"{what}: {value:.2g}, where {allowed:.2g} is allowed")

    def markdown(self, part: str) -> str:
        """A section of the report."""
        verdict = f"{len(self.failures)} failures:" if self.failures else "no failures."
        tables = [table.markdown() for table in self.tables]
        failures = [f"```\n{failure}\n```" for failure in self.failures]
        return "\n\n".join([f"## {part}", *tables, f"{self.seconds:.1f} s, {verdict}", *failures])


@dataclass(frozen=True)
class Report:
    """What all parts found, and on what."""

    machine: Mapping[str, str | int]
    parts: dict[str, Findings] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any part did."""
        return any(findings.failures for findings in self.parts.values())

    def heading(self) -> str:
        """What begins the report."""
        device, *others = self.machine.items()
        return f"# {device[1]}\n\n{', '.join(f'{name} {value}' for name, value in others)}"

    def write(self, folder: Path) -> None:
        """As `gpu.md` and `gpu.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        sections = [self.heading(), *(findings.markdown(part) for part, findings in self.parts.items())]
        (folder / "gpu.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        (folder / "gpu.json").write_text(json.dumps(vars(self), default=vars, indent=1) + "\n", encoding="utf-8")

"""How far healing from disk is: by the blocks that were read, since a step may read for minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdtrim.contract.results import Half
from workers.pruning.repair.training import TrainingSettings, held_out_checks
from workers.stages.context import Figure, StageContext
from workers.stages.training import figures_of


@dataclass(frozen=True)
class Expected:
    """Blocks that a half reads, about: what is still in its room is not read again."""

    measuring: int
    """To measure the held-out loss once."""
    step: int
    """Of training."""

    def until(self, step: int, settings: TrainingSettings) -> int:
        """From the first held-out loss, before training, to the end of a step and of the loss measured after it."""
        return self.measuring * (1 + held_out_checks(step, settings)) + self.step * step

    def all(self, settings: TrainingSettings) -> int:
        """With the loss of the weights as they are written."""
        return self.until(settings.steps, settings) + self.measuring


class Reading:
    """Says how far a half is, between the two fractions of `progress_range`."""

    def __init__(
        self,
        context: StageContext,
        half: Half,
        progress_range: tuple[float, float],
        expected: Expected,
        settings: TrainingSettings,
    ) -> None:
        self._context, self._half = context, half
        self._start, self._end = progress_range
        self._expected, self._settings = expected, settings
        self._blocks, self._most = 0, expected.until(0, settings)
        """Read so far, and by the time that the next thing begins."""
        self._message = f"Measuring the {half} model before it is healed."
        self._figures: Mapping[str, Figure] = {"half": half}

    def block_read(self) -> None:
        """Another block is there. Raises: as `StageContext.say`."""
        self._blocks = min(self._blocks + 1, self._most)
        self._say()
        if self._blocks == self._expected.until(0, self._settings):
            self.goes_on_after(0)

    def goes_on_after(self, step: int) -> None:
        """Training goes on with so many steps behind it."""
        self._message = f"Healing the {self._half} model."
        self._blocks = self._expected.until(step, self._settings)
        self._most = self._expected.until(min(step + 1, self._settings.steps), self._settings)

    def stepped(self, step: int, steps: int, loss: float, held_out: float) -> None:
        """A step was made; as `Journal.progress`. Raises: as `StageContext.say`."""
        self._figures = figures_of(self._half, step, steps, loss, held_out)
        self.goes_on_after(step)
        self._say()

    def measures_again(self) -> None:
        """Training is over, and what it learned is written down."""
        self._message = f"Writing and measuring the healed {self._half} model."
        self._blocks = self._expected.until(self._settings.steps, self._settings)
        self._most = self._expected.all(self._settings)

    def _say(self) -> None:
        share = self._blocks / max(1, self._expected.all(self._settings))
        self._context.say(self._start + (self._end - self._start) * share, self._message, **self._figures)

"""Checkpoints of a training, as files of our own in the run directory.

Not Ray Train's: these serve a restarted worker group, a killed driver, another number of workers,
and training without Ray Train workers alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import RunDirectory

TRAIN = "train"  # working folder inside the stage's own
COMPLETE = "complete.json"  # written last, by one worker


class Checkpoints:
    """Numbered checkpoints of a worker group, one file per worker, complete or ignored."""

    def __init__(self, run: RunDirectory, folder: str) -> None:
        self.run, self.folder = run, f"{folder}/{TRAIN}"

    def save(self, step: int, rank: int, world: int, state: Mapping[str, Tensor]) -> None:
        """Write one worker's share. Call `complete` on one worker once all have."""
        from safetensors.torch import save

        name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
        self.run.write_bytes(save(dict(state)), self.folder, _step_name(step), name)

    def complete(self, step: int, world: int) -> None:
        """Declare the checkpoint of `world` workers usable and remove the older ones."""
        content = {"step": step, "world": world}
        self.run.write_json(content, self.folder, _step_name(step), COMPLETE)
        for old in self._steps():
            if old < step:
                self.run.delete(f"{self.folder}/{_step_name(old)}")

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        steps = self._steps()
        complete = (s for s in steps if self.run.exists(self.folder, _step_name(s), COMPLETE))
        return max(complete, default=None)

    def load(self, step: int) -> list[dict[str, Tensor]]:
        """All workers' states. Raises ArtifactError for a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = f"{self.folder}/{_step_name(step)}"
        states = []
        # A group of another size may have been lost while it saved the same step.
        world = self.run.read_json(folder, COMPLETE)["world"]
        for name in self.run.list(folder, f"-of-{world:05d}.safetensors"):
            try:
                states.append(load(self.run.read_bytes(folder, name)))
            except (SafetensorError, ValueError) as error:
                raise ArtifactError(
                    f"the checkpoint {self.run.path(folder, name)} cannot be read ({error}). "
                    f"Delete {self.run.path(folder)} to resume from the one before, or start over."
                ) from None
        return states

    def _steps(self) -> list[int]:
        names = self.run.folders(self.folder)
        return [int(name[5:]) for name in names if name.startswith("step-")]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"

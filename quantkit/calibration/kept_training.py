"""How far the training of scales has come, on the disk: a run goes on after the step kept last.

Two files take turns, and a third one says which of them is whole, so that a kill at any instant
leaves one to go on from.
Letters: O out features, G groups per row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardLayout, ShardWriter, plan_shards
from quantkit.methods.descent import LearnedScales

# Times the bytes of all scales that it takes on the disk: twice four numbers for each.
KEPT_TIMES = 8
_TOLD = "training.json"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Steps that are done, the divergence before the first one, and the least that was seen."""

    steps: int
    before: float
    after: float


class KeptTraining:
    """Two files of all learned scales with their best values, float32 [O, G] each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Which of the two holds what was kept last.
        self._turn = 1

    def load(
        self, scales: Mapping[str, LearnedScales], device: torch.device
    ) -> tuple[Trained, dict[str, Tensor]] | None:
        """What an interrupted run kept, and the best values by name; None if it kept nothing.

        The scales then are as they were, with the means that their next step depends on.
        """
        path = self._directory / _TOLD
        if not path.is_file():
            return None
        told = json.loads(path.read_bytes())
        self._turn = told.pop("turn")
        layout = self._layout(scales)
        best = {}
        with ShardWriter(self._directory, layout, committed=list(layout.places)) as file:
            for name, scale in scales.items():
                for part, value in scale.state.items():
                    value.copy_(file.read(f"{name}:{part}"))
                scale.refresh()
                best[name] = file.read(f"{name}:best").to(device)
        return Trained(**told), best

    def save(
        self, trained: Trained, scales: Mapping[str, LearnedScales], best: Mapping[str, Tensor]
    ) -> None:
        """Keeps it, in the place of the last but one; it is on the disk on return."""
        with disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._turn = 1 - self._turn
        with ShardWriter(self._directory, self._layout(scales)) as file:
            for name, scale in scales.items():
                for part, value in scale.state.items():
                    file.put(f"{name}:{part}", value)
                file.put(f"{name}:best", best[name])
            file.close()
        told = {**asdict(trained), "turn": self._turn}
        write_file(self._directory / _TOLD, json.dumps(told).encode())

    def _layout(self, scales: Mapping[str, LearnedScales]) -> ShardLayout:
        shapes = {
            f"{name}:{part}": tuple(scale.values.shape)
            for name, scale in scales.items()
            for part in (*scale.state, "best")
        }
        infos = [TensorInfo(name=n, dtype=torch.float32, shape=s) for n, s in shapes.items()]
        return plan_shards(infos, 1 << 62, stem=f"training-{self._turn}")

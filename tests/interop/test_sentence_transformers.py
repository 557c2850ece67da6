"""sentence-transformers gives texts the vectors that quantkit's evaluation reckons with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import TEXTS, VECTORS
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

# Float32 sums in another order differ by less; one wrong code or scale differs by far more.
TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", VECTORS)
def test_a_directory_loads_as_it_is(root: Path, kind: str) -> None:
    wanted = load_file(root / f"{kind}-vectors-states.safetensors")["vectors"]
    found = SentenceTransformer(str(root / f"{kind}-vectors"), device="cpu").encode(list(TEXTS))
    assert (torch.from_numpy(found) - wanted).abs().max().item() < TOLERANCE
    plain = SentenceTransformer(str(root / "source" / f"{kind}-vectors"), device="cpu")
    distance = (torch.from_numpy(plain.encode(list(TEXTS))) - wanted).abs().max().item()
    assert distance > 100 * TOLERANCE

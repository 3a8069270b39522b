"""Training rows over worlds: the ids of sessions, packed by split, and continued after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.training.data import Rows
from agentkit_evals.synth.training import LONGEST, join, main


def test_rows_are_sessions_of_oracles_and_a_later_run_makes_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(PACKAGED_MODELS["tiny"] / "tokenizer.json", tmp_path)
    main(tmp_path, worlds=10, per_world=1, workers=1)
    packed = {split: Rows.load(tmp_path / f"{split}.safetensors") for split in ("train", "heldout")}
    tokenizer = Tokenizer.from_dir(tmp_path)
    for rows in packed.values():
        lengths = rows.offsets.diff()
        assert len(rows) >= 1 and int(lengths.max()) <= LONGEST
        assert len(rows.ids) == len(rows.mask) == int(rows.offsets[-1])
        first = slice(0, int(rows.offsets[1]))
        written = rows.ids[first][rows.mask[first].bool()].tolist()
        assert tokenizer.decode(rows.ids[first].tolist()).count("<｜Assistant｜>") >= 1
        assert 0 < len(written) < int(lengths[0])
    (shard,) = (tmp_path / "rows").glob("*-train.safetensors")
    made = shard.stat().st_mtime_ns
    (tmp_path / "train.safetensors").unlink()
    main(tmp_path, worlds=10, per_world=1, workers=1)
    assert shard.stat().st_mtime_ns == made
    assert Rows.load(tmp_path / "train.safetensors").ids.equal(packed["train"].ids)


def test_joined_rows_are_those_of_the_parts() -> None:
    parts = [
        Rows.pack([([1, 2, 3], [0, 1, 1]), ([4], [1])], copied=[7], spread=[True, False]),
        Rows.pack([([5, 6], [0, 1])], copied=[7], spread=[False]),
    ]
    rows = join(parts)
    assert rows.offsets.tolist() == [0, 3, 4, 6] and rows.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert rows.mask.tolist() == [0, 1, 1, 1, 0, 1] and rows.spread.tolist() == [True, False, False]

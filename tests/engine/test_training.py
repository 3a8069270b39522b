"""Training of the tiny model: tokenizer, rows, optimiser, and a run small enough to watch the loss fall."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn

from agentkit_engine.chat import CONTROL_TOKENS, Tokenizer
from agentkit_engine.engine import Engine
from agentkit_engine.model import Decoder, initialize_
from agentkit_engine.spec import ModelSpec
from agentkit_engine.training.copied import alphabets, copied, ordinary_ids
from agentkit_engine.training.data import Rows, batches
from agentkit_engine.training.optimizer import orthogonalize
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_engine.training.train import (
    FAR_COPY_WINDOW,
    State,
    TrainingConfig,
    _copy_batch,
    _learning_rate,
    _practised,
    _stream,
    accuracy,
    dtype_of,
    nudge_router_biases,
    practice_kinds,
    renew_hca_,
    train,
)

ALONE = TrainingConfig(practice=("copy", "far-copy", "majority"), batches=1, batch_tokens=192)
PHRASE = 'invoke name="read_file">\n<'
TEXTS = ["the file kalo.txt holds mira = 42\n", 'invoke name="read_file">\n<kalo', "def f(x):\n    return x + 1\n"] * 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(build_tokenizer(TEXTS, phrases=[PHRASE], vocab_size=600))


def test_every_named_control_token_has_an_id_and_the_first_three_are_fixed(tokenizer: Tokenizer) -> None:
    assert set(CONTROL_TOKENS) == set(tokenizer.control_ids)
    assert [tokenizer.control_token(index) for index in range(3)] == list(CONTROL_TOKENS[:3])
    assert max(tokenizer.control_ids.values()) == tokenizer.vocab_size - 1


def test_a_phrase_is_one_token_of_ordinary_text(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode_text(PHRASE)
    assert tokenizer.control_token(token) is None
    assert tokenizer.decode([token]) == PHRASE


@pytest.mark.parametrize("frame", ["{}", " {}", "`{}`", '"{}"', "/{}.txt", "\n{}\n", "={}"])
def test_a_name_has_the_same_ids_in_any_context(tokenizer: Tokenizer, frame: str) -> None:
    ids, name = tokenizer.encode_text(frame.format("kalo")), tokenizer.encode_text("kalo")
    assert any(ids[start : start + len(name)] == name for start in range(len(ids)))


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_a_vocabulary_too_small_for_its_phrases_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size=100 leaves no room"):
        build_tokenizer(TEXTS, phrases=[PHRASE], vocab_size=100)


def _rows(count: int, length: int = 24) -> Rows:
    """Return rows that repeat their first half, so that a model that copies predicts the second half."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(3, 40, (count, length // 2), generator=generator).tolist()
    return Rows.pack([(half + half, [0] * len(half) + [1] * len(half)) for half in halves], copied=range(3, 40))


def test_rows_round_trip_and_reject_a_mask_of_another_length(tmp_path: Path) -> None:
    rows = _rows(5)
    rows.save(tmp_path / "rows.safetensors")
    loaded = Rows.load(tmp_path / "rows.safetensors")
    assert all(
        torch.equal(getattr(rows, name), getattr(loaded, name))
        for name in ("ids", "mask", "offsets", "copied", "spread")
    )
    with pytest.raises(ValueError, match="row 0 has 2 ids but a mask of 1"):
        Rows.pack([([1, 2], [1])], copied=[])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "3 mask values for 48 ids"),
        ({"spread": torch.zeros(3, dtype=torch.uint8)}, "3 spread values for 2 rows"),
        ({"offsets": torch.tensor([0, 50])}, "offsets must rise from 0 to the 48 ids"),
        ({"offsets": torch.tensor([0, 30, 20, 48])}, "offsets must rise"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets must rise"),
        ({"ids": torch.zeros(48)}, "expected .*'ids': .torch.int32, 1."),
        ({"more": torch.zeros(1)}, "expected"),
    ],
)
def test_a_file_of_other_rows_is_an_error(tmp_path: Path, changed: dict[str, torch.Tensor], problem: str) -> None:
    path = tmp_path / "rows.safetensors"
    rows = _rows(2)
    save_file({**{name: getattr(rows, name) for name in Rows.__slots__}, **changed}, path)
    with pytest.raises(ValueError, match=problem):
        Rows.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Rows.load(path)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(30, 200), st.integers(0, 3))
def test_an_epoch_holds_every_row_once_within_the_token_budget(lengths: list[int], tokens: int, seed: int) -> None:
    rows = Rows.pack([([3 + index] * length, [1] * length) for index, length in enumerate(lengths)], copied=[])
    seen: list[int] = []
    for batch in batches(rows, tokens=tokens, pad_id=2, seed=seed):
        assert batch.ids_BT.numel() <= tokens
        assert bool((batch.ids_BT == 2).eq(~batch.real_BT).all())
        seen += [int(row[0]) - 3 for row in batch.ids_BT]
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 16, 24)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


def test_practice_comes_first_then_in_every_second_pair_of_batches_in_rotation() -> None:
    config = replace(ALONE, practice_steps=3, mixed_steps=0, practice_every=0)
    drawn = list(itertools.islice(_stream(_rows(8), config, pad_id=2, world=2), 8))
    assert [batch.window for batch in drawn] == [None, None, FAR_COPY_WINDOW, FAR_COPY_WINDOW, 2, 2, None, None]
    assert [batch.ids_BT.size(1) for batch in drawn] == [96] * 4 + [164] * 2 + [24] * 2
    assert drawn[2].ids_BT.size(1) // 2 > FAR_COPY_WINDOW
    config = replace(config, batches=2, mixed_steps=1)
    mixed = list(itertools.islice(_stream(_rows(8), config, pad_id=2, world=2), 12, 16))
    assert [batch.ids_BT.size(1) for batch in mixed] == [24, 24, 96, 96]


def test_rows_to_copy_differ_in_length_once_there_are_many_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = torch.arange(10, 110), torch.arange(10, 2000)
    lengths = [
        [_copy_batch(ids, TrainingConfig(), generator, None).ids_BT.size(1) for _ in range(30)] for ids in (few, many)
    ]
    assert set(lengths[0]) == {96}
    assert len(set(lengths[1])) > 10 and min(lengths[1]) >= 48 and max(lengths[1]) < 144


def test_practice_goes_on_beside_trajectories() -> None:
    config = replace(ALONE, practice_steps=0, mixed_steps=0, practice_every=4)
    widths = [batch.ids_BT.size(1) for batch in itertools.islice(_stream(_rows(8), config, pad_id=2, world=2), 16)]
    assert widths == [24, 24, 96, 96, 24, 24, 24, 24, 24, 24, 164, 164, 24, 24, 24, 24]


def test_practice_begins_with_few_ids_and_ends_with_all() -> None:
    config = TrainingConfig(practice_steps=100)
    counts = [_practised(step, config, 2000) for step in range(101)]
    assert counts[:46] == [128] * 46 and counts == sorted(counts) and counts[-1] == 2000
    assert _practised(0, TrainingConfig(practice_steps=0), 2000) == 128
    assert {_practised(step, config, 50) for step in range(101)} == {50}


def test_majority_practice_asks_for_names_outside_the_window() -> None:
    config = TrainingConfig(practice=("majority",), practice_steps=1, batch_tokens=512)
    batch = next(_stream(_rows(8), config, pad_id=2, world=1))
    assert batch.spread and batch.window == 2
    for ids, mask in zip(batch.ids_BT.tolist(), batch.mask_BT.tolist(), strict=True):
        asked = [at for at, mine in enumerate(mask) if mine]
        assert asked == list(range(129, 164, 6))
        # 3 is the first id of `copied`, which precedes each draw to predict
        assert all(ids[at] in ids[:128] and ids[at - 1] == 3 for at in asked)
        assert len(set(ids[:128])) <= 8 and 3 not in ids[:128]


def test_names_recur_behind_their_keys_in_another_order() -> None:
    rows = replace(_rows(8), copied=torch.arange(3, 600, dtype=torch.int32))
    config = TrainingConfig(practice=("names",), practice_steps=20, batches=1, batch_tokens=512)
    moved = 0
    for batch in itertools.islice(_stream(rows, config, pad_id=2, world=1), 20):
        assert batch.window is None and not batch.spread and batch.real_BT.all()
        for ids, mask in zip(batch.ids_BT.tolist(), batch.mask_BT.tolist(), strict=True):
            asked = [at for at, (before, mine) in enumerate(pairwise([0.0, *mask])) if mine > before]
            end, known = ids[asked[0] - 2], ids[: asked[0] - 1]
            names = {tuple(known[at:]) for at in range(len(known))}
            for at in asked[:-1]:  # the last one may be cut off
                name = tuple(ids[at - 1 : ids.index(end, at) + 1])
                assert any(longer[: len(name)] == name for longer in names)
            moved += ids[asked[0] - 1] != ids[0]
    assert moved


@pytest.mark.parametrize("text", ["copy,majorities", "", "copy, far-copy"])
def test_an_unknown_practice_is_an_error(text: str) -> None:
    assert practice_kinds("majority,copy") == ("majority", "copy")
    with pytest.raises(
        ValueError, match=r"unknown practice .*; expected one or more of copy, far-copy, names, majority"
    ):
        practice_kinds(text)


def test_rows_of_spread_facts_have_their_own_batches_and_no_selection_at_first() -> None:
    rows = Rows.pack([([3] * 8, [1] * 8)] * 6, copied=[], spread=[False, True] * 3)
    drawn = list(batches(rows, tokens=32, pad_id=2, seed=0))
    assert sorted((batch.spread, batch.ids_BT.size(0)) for batch in drawn) == [(False, 3), (True, 3)]
    with pytest.raises(ValueError, match="spread has 1 values for 2 rows"):
        Rows.pack([([3], [1])] * 2, copied=[], spread=[True])

    seen: list[int] = []

    class Watched(Decoder):
        def forward(self, *args: Any, **options: Any) -> torch.Tensor:
            seen.append(self.blocks[1].attn.top_k)
            logits: torch.Tensor = super().forward(*args, **options)
            return logits

    spread = Rows.pack([(list(range(3, 27)), [1] * 24)] * 4, copied=range(3, 40), spread=[True] * 4)
    config = TrainingConfig(
        steps=4,
        practice_steps=0,
        mixed_steps=0,
        practice_every=0,
        spread_steps=2,
        batches=1,
        batch_tokens=48,
        topk_steps=0,
    )
    records: list[dict[str, float]] = []
    train(initialize_(Watched(_small_spec()), torch.Generator()), spread, config, pad_id=2, log=records.append)
    assert seen == [0, 0, 2, 2]
    assert "spread" in records[0] and "loss" not in records[0] and "index" not in records[0]


def test_renewing_hca_leaves_the_other_weights_unchanged() -> None:
    old, model = _small_model(), _small_model()
    renew_hca_(model, torch.Generator().manual_seed(1))
    changed = {
        name
        for (name, before), after in zip(old.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    compressor = {f"layers.2.attn.compressor.{name}.weight" for name in ("wkv", "wgate")}
    assert changed == compressor | {"layers.2.attn.wq_b.weight"}  # the sink and the rest of the compressor were new
    kept = slice(0, -model.spec.head_dim)
    assert torch.equal(old.blocks[2].attn.wq_b.weight[kept], model.blocks[2].attn.wq_b.weight[kept])


def _small_spec() -> ModelSpec:
    return replace(
        tiny_spec(64), hidden_size=32, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=16, index_topk=2,
        index_n_heads=4, index_head_dim=16, moe_intermediate_size=16, n_routed_experts=4, hc_sinkhorn_iters=3,
    )  # fmt: skip


def _small_model() -> Decoder:
    return initialize_(Decoder(_small_spec()), torch.Generator().manual_seed(0))


def test_the_loss_falls_and_training_gives_the_same_weights_twice() -> None:
    records: list[dict[str, float]] = []
    states = []
    rows = _rows(64)
    for _ in range(2):
        model = _small_model()
        config = TrainingConfig(
            steps=30, practice=("copy",), practice_steps=10, mixed_steps=5, batches=1, batch_tokens=512, topk_steps=10,
            warmup_steps=5, decay_steps=10,
        )  # fmt: skip
        train(model, rows, config, pad_id=2, log=records.append)
        states.append(model.state_dict())
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert {"mtp", "index"} <= records[0].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(block.attn.top_k == 2 for block in model.blocks)
    assert all(block.attn.sliding_window == model.spec.sliding_window for block in model.blocks)
    measured = accuracy(model, rows, pad_id=2)
    assert 0 <= measured["row_accuracy"] <= measured["token_accuracy"] <= 1


def test_bfloat16_products_change_losses_little_and_leave_weights_and_served_logits_float32() -> None:
    rows, losses = _rows(64), {}
    for dtype in ("float32", "bfloat16"):
        records: list[dict[str, float]] = []
        model = _small_model()
        config = TrainingConfig(
            steps=11, practice_steps=0, mixed_steps=0, batches=1, batch_tokens=512, topk_steps=1, warmup_steps=5,
            decay_steps=0, dtype=dtype_of(dtype),
        )  # fmt: skip
        train(model, rows, config, pad_id=2, log=records.append)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(torch.tensor([[5, 6, 7]])).dtype == torch.float32
        assert model.products == torch.float32
        losses[dtype] = [record["loss"] for record in records]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float16'; expected float32 or bfloat16"):
        dtype_of("float16")


def test_a_stopped_run_continues_with_the_same_bits() -> None:
    config = TrainingConfig(
        steps=11,
        practice_steps=3,
        mixed_steps=3,
        batches=2,
        batch_tokens=256,
        warmup_steps=2,
        decay_steps=4,
        save_steps=4,
    )
    whole, stopped, continued = _small_model(), _small_model(), _small_model()
    train(whole, _rows(32), config, pad_id=2, log=lambda _: None)

    saved: list[tuple[State, dict[str, torch.Tensor]]] = []

    def save(state: State) -> None:
        weights = {name: value.clone() for name, value in stopped.state_dict().items()}
        saved.append((copy.deepcopy(state), weights))

    train(stopped, _rows(32), config, pad_id=2, log=lambda _: None, save=save)
    assert [state.step for state, _ in saved] == [4, 8]
    for state, weights in saved:
        continued.load_state_dict(weights)
        train(continued, _rows(32), config, pad_id=2, log=lambda _: None, start=state)
        for name, value in whole.state_dict().items():
            assert torch.equal(continued.state_dict()[name], value), (state.step, name)


def test_a_run_of_the_command_is_resumed_only_if_there_is_one_and_by_as_many_processes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "tokenizer.json").write_text(build_tokenizer(TEXTS, phrases=[PHRASE], vocab_size=600), encoding="utf-8")
    for name in ("train", "heldout"):
        _rows(8).save(data / f"{name}.safetensors")
    command = [
        sys.executable,
        "-m",
        "agentkit_engine.training",
        str(data),
        str(out),
        "--workers",
        "1",
        "--save-steps",
        "1",
    ]

    def refused(*options: str) -> str:
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == 2
        return " ".join(result.stderr.replace("│", " ").split())

    assert "holds no state of a stopped run" in refused("--resume")
    for steps, more in (("2", []), ("3", ["--resume"])):
        subprocess.run([*command, "--steps", steps, *more], check=True)
    assert "use --workers 1" in refused("--resume", "--workers", "2")
    logged = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [0, 1, 2]
    assert Engine.load(out).spec.vocab_size == tokenizer.vocab_size


def test_the_learning_rate_warms_up_stays_and_falls_at_the_end() -> None:
    config = TrainingConfig(steps=100, practice_steps=20, warmup_steps=10, decay_steps=20)
    rates = [_learning_rate(step, config) for step in (0, 9, 15, 20, 29, 60, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 1, 1, 1, 0.505, 0.0595])
    assert _learning_rate(99, replace(config, decay_steps=0)) == 1


def _train_share(rank: int, world: int, folder: str) -> None:
    """Train three steps of two batches, shared by `world` processes; rank 0 writes the weights."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = _small_model()
    config = TrainingConfig(
        steps=3, practice_steps=1, mixed_steps=0, batches=2 // world, batch_tokens=256, warmup_steps=1
    )
    train(model, _rows(32), config, pad_id=2, log=lambda _: None)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    _train_share(0, 1, str(tmp_path))
    spawn(_train_share, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone, shared = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4)


def test_router_biases_move_against_the_load() -> None:
    model = _small_model()
    nudge_router_biases(model, {2: torch.tensor([9, 1, 1, 1])}, rate=0.5)
    assert model.blocks[2].ffn.gate.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert model.blocks[3].ffn.gate.bias.tolist() == [0.0] * 4


def test_the_tiny_spec_has_every_v4_mechanism_and_round_trips() -> None:
    spec = tiny_spec(1536)
    assert {layer.attention for layer in spec.layers} == {"window", "csa", "hca"}
    assert {layer.router for layer in spec.layers} == {"hash", "score"}
    assert spec.index_topk <= 16
    assert spec.mtp_layers
    assert type(spec).from_config(json.loads(json.dumps(spec.to_config()))) == spec


def test_copied_names_are_right_or_wrong_as_a_whole(tokenizer: Tokenizer) -> None:
    def copying(ids_BT: torch.Tensor) -> torch.Tensor:
        """Predict what followed the longest earlier match of the ids before; without one, id 0."""
        [row] = ids_BT.tolist()
        logits_BTV = torch.zeros(1, len(row), tokenizer.vocab_size)
        for now in range(len(row)):
            matches = [(sum(1 for _ in _common(row[: at + 1], row[: now + 1])), at) for at in range(now)]
            length, at = max(matches, default=(0, 0))
            logits_BTV[0, now, row[at + 1] if length else 0] = 1.0
        return logits_BTV

    def half(ids_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = copying(ids_BT)
        logits_BTV[:, -2] = 0.0  # the end of the last name
        return logits_BTV

    ordinary = ordinary_ids(tokenizer)
    assert set(alphabets(tokenizer)) == {"digits", "hexadecimal", "letters", "16 ids", "any ids"}
    for alphabet in alphabets(tokenizer).values():
        assert copied(copying, alphabet, ordinary, rows=3, seed=1) == 1.0
        assert copied(half, alphabet, ordinary, rows=3, seed=1) == 0.75


def _common(one: list[int], other: list[int]) -> Iterator[int]:
    """Yield the ids with which both lists end, from the last one on."""
    return (
        a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False))
    )

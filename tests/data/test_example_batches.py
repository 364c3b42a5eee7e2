"""Batches of conversations and preferences: nothing lost, any step again, held out, in order."""

import collections
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from chat_bytes import LLAMA3, data_config, lines, opened, said
from rich.console import Console

from llama_jax.config.loading import ConfigError
from llama_jax.data.attached import WithReferenceLogps, WithTeacher, open_teacher_store
from llama_jax.data.batches import (
    GlobalBatches,
    fingerprint,
    held_out_batches,
    make_batches,
    resume_step,
)
from llama_jax.data.documents import DataError, InMemoryDocuments
from llama_jax.data.fields import batch_fields
from llama_jax.data.filling import best_fit_with_slots
from llama_jax.data.inspect import batch_table, show_batch
from llama_jax.data.ordered import ordered_batches
from llama_jax.data.packing import plan_rows

pytestmark = pytest.mark.short


def preferences(count, seed=0):
    """Records of two to three responses, some edited, that say their number."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        texts = [f"answer {i} {name}" + "!" * int(generator.integers(1, 40)) for name in "abc"]
        record = {"prompt": f"question {i}", "responses": texts[:2], "ranking": [0, 1]}
        if i % 3 == 0:
            record = {**record, "responses": texts, "ranking": [1, 0, 2]}
        elif i % 5 == 0:
            record["edited"] = texts[2]
        yield record


def a_source(tmp_path, kind="preferences", count=40, **more):
    if kind == "preferences":
        records = list(preferences(count))
    else:
        records = [said(f"question {i}", "answer" + "!" * (i % 50)) for i in range(count)]
    config = data_config(lines(tmp_path / "r.jsonl", records), kind, **{"seq_len": 512, **more})
    return config, opened(config, tmp_path / "run")


def read(config, documents, *, rows, start, stop):
    batches = make_batches(config, documents, rows=rows, seed=7, start_step=start)
    found = [next(batches) for _ in range(stop - start)]
    batches.close()
    return found


def segments_of(batch):
    """Every segment of a batch: tokens, what counts, and by which response."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            there = segments == segment
            tokens = batch["tokens"][row, there]
            assert batch["positions"][row, there].tolist() == list(range(len(tokens)))
            targets = np.append(tokens[1:], 0)
            assert batch["targets"][row, there].tolist() == targets.tolist()
            yield tokens.tobytes(), batch["loss_mask"][row, there].tobytes()


@pytest.mark.parametrize("kind", ["conversations", "preferences"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_example_comes_once_an_epoch_however_packed(tmp_path, kind, packing):
    config, documents = a_source(tmp_path, kind)
    config = dataclasses.replace(config, packing=packing)
    plan = GlobalBatches(config, [documents], seed=3)
    rows = plan_rows(
        packing, documents.lengths, 512, "", slots=documents.slots, slots_per_row=8
    ).rows
    assert rows == 40 if packing == "none" else rows < 25
    wanted = collections.Counter()
    for example in documents.read(range(40)):
        for segment in range(1, int(example.segments[-1]) + 1):
            there = example.segments == segment
            counted = example.counts[there].astype(np.float32)
            wanted[example.tokens[there].tobytes(), counted.tobytes()] += 1
    for epoch in range(2):
        found = collections.Counter()
        for row in range(epoch * rows, (epoch + 1) * rows):
            batch = plan.batch(row // 4, [row % 4])
            found.update(segments_of(batch))
        assert found == wanted


def test_pairs_point_at_the_responses_of_their_record_wherever_they_stand(tmp_path):
    config, documents = a_source(tmp_path)
    plan = GlobalBatches(config, [documents], seed=0)
    pairs = 0
    for step in range(12):
        batch = plan.batch(step, range(4))
        for row in range(4):
            texts = {}
            for number in range(1, 9):
                places = np.flatnonzero(batch["response_ids"][row] == number)
                texts[number] = LLAMA3.decode(batch["targets"][row, places].tolist())
                assert (len(places) > 0) == (batch["roles"][row, number - 1] > 0)
            for column in range(8):
                chosen, rejected = (batch[name][row, column] for name in ("chosen", "rejected"))
                assert (chosen == 0) == (rejected == 0)
                if chosen:
                    same = {texts[int(n)].split()[1] for n in (chosen, rejected)}
                    assert len(same) == 1
                    pairs += 1
    assert pairs > 100


def test_any_step_is_read_again_alike_on_any_hosts(tmp_path):
    config, documents = a_source(tmp_path)
    whole = read(config, [documents], rows=range(4), start=0, stop=9)
    again = read(config, [documents], rows=range(4), start=5, stop=9)
    halves = [read(config, [documents], rows=rows, start=5, stop=9) for rows in ([0, 1], [2, 3])]
    for step in range(4):
        for name, array in whole[5 + step].items():
            np.testing.assert_array_equal(again[step][name], array)
            joined = np.concatenate([half[step][name] for half in halves])
            np.testing.assert_array_equal(joined, array)
    fields = batch_fields(config)
    assert {name: (a.shape, a.dtype) for name, a in whole[0].items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in fields.items()
    }


def test_positions_of_other_examples_or_losses_are_refused(tmp_path):
    config, documents = a_source(tmp_path)
    position = {"next_step": 3, "fingerprint": fingerprint(config, [documents], seed=1)}
    assert resume_step(position, config, [documents], seed=1) == 3
    last = opened(config, tmp_path / "run", loss_on="last")
    fewer = dataclasses.replace(config, responses_per_row=7)
    for data, docs in ((config, last), (fewer, documents)):
        with pytest.raises(DataError, match="not what the checkpoint was trained on"):
            resume_step(position, data, [docs], seed=1)


def test_a_build_is_made_once_and_only_of_the_same_records(tmp_path):
    config, documents = a_source(tmp_path)
    before = (tmp_path / "run" / "data" / "sources" / "a" / "examples.array_record").stat()
    again = opened(config, tmp_path / "run")
    after = (tmp_path / "run" / "data" / "sources" / "a" / "examples.array_record").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert again.fingerprint == documents.fingerprint
    with pytest.raises(DataError, match=r"was built with seq_len 512, not 256"):
        opened(dataclasses.replace(config, seq_len=256), tmp_path / "run")
    # Killed before its manifest was written: made again, the same.
    (tmp_path / "run" / "data" / "sources" / "a" / "manifest.json").unlink()
    (tmp_path / "run" / "data" / "sources" / "a" / ".tmp-examples.array_record").write_bytes(b"x")
    assert opened(config, tmp_path / "run").fingerprint == documents.fingerprint
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    path = tmp_path / "r.jsonl"
    path.write_text(path.read_text().replace("answer 1 a", "answer 1 x"))
    with pytest.raises(DataError, match=r"r\.jsonl has changed since"):
        opened(config, tmp_path / "run")
    none = data_config(lines(tmp_path / "n.jsonl", [{"text": "a"}]), "conversations")
    with pytest.raises(DataError, match=r"left out: 1 unknown_form; first: n\.jsonl:1"):
        opened(none, tmp_path / "none")
    named = data_config(str(path), "preferences", chat_format="llama33")
    with pytest.raises(ConfigError, match=r"chat_format: unknown chat format 'llama33' \(did you"):
        opened(named, tmp_path / "named")


def test_records_may_move_to_another_folder(tmp_path):
    config, documents = a_source(tmp_path)
    moved = tmp_path / "elsewhere" / "r.jsonl"
    moved.parent.mkdir()
    (tmp_path / "r.jsonl").rename(moved)
    elsewhere = data_config(str(moved), "preferences", seq_len=config.seq_len)
    again = dataclasses.replace(config, sources=elsewhere.sources)
    assert opened(again, tmp_path / "run").fingerprint == documents.fingerprint
    moved.write_text(moved.read_text().replace("answer 1 a", "answer 1 x"))
    with pytest.raises(DataError, match=r"r\.jsonl has changed since"):
        opened(again, tmp_path / "run")
    moved.rename(moved.with_name("s.jsonl"))
    other = data_config(str(moved.with_name("s.jsonl")), "preferences", seq_len=config.seq_len)
    with pytest.raises(DataError, match="was built from other files than the source has now"):
        opened(dataclasses.replace(config, sources=other.sources), tmp_path / "run")


def test_held_out_examples_come_once_whole_in_batches_of_one_shape(tmp_path):
    config, documents = a_source(tmp_path, "conversations", count=37)
    for packing in ("best_fit", "none"):
        data = dataclasses.replace(config, packing=packing)
        batches = list(held_out_batches(data, [documents], rows=range(4), count=None))
        assert {a.shape for batch, _ in batches for a in batch.values()} == {(4, 512)}
        found = [segment for batch, _ in batches for segment in segments_of(batch)]
        assert len(found) == 37
        told = sum(size for _, size in batches)
        # Bytes of what is trained on: the answers, whose ends are no text.
        assert told == pytest.approx(sum(len("answer") + i % 50 for i in range(37)))


def test_text_and_conversations_mix_by_weight(tmp_path):
    config, documents = a_source(tmp_path, "conversations")
    shards = dataclasses.replace(config.sources[0], name="t", conversations=None, shards="s")
    data = dataclasses.replace(config, sources=(*config.sources, shards))
    text = InMemoryDocuments([[7] * 700] * 9)
    batches = read(data, [documents, text], rows=range(4), start=0, stop=40)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    share = np.count_nonzero(tokens == 7) / np.count_nonzero(segments)
    assert share == pytest.approx(0.5, abs=0.03)
    counted = np.concatenate([batch["loss_mask"] for batch in batches])
    # All of the text, but for what stands before a border of its row or document.
    inner = segments[:, :-1] == segments[:, 1:]
    assert counted[:, :-1][(tokens[:, :-1] == 7) & inner].all()


@pytest.mark.parametrize("start", [0, 3])
def test_one_pass_says_whose_response_each_column_is(tmp_path, start):
    config, documents = a_source(tmp_path)
    seen = collections.Counter()
    for one in ordered_batches(config, documents, rows=[1, 2], start=start):
        for row in (1, 2):
            for column in np.flatnonzero(one.examples[row] >= 0):
                number, response = one.examples[row, column], one.responses[row, column]
                here = one.batch["response_ids"][row - 1] == column + 1
                ids = one.batch["targets"][row - 1, here]
                (example,) = documents.read([number])
                wanted = np.flatnonzero(example.responses == response) + 1
                assert ids.tolist() == example.tokens[wanted].tolist()
        seen.update(zip(one.examples.ravel().tolist(), one.responses.ravel().tolist(), strict=True))
    empty = seen.pop((-1, 0))
    assert empty > 0
    assert set(seen.values()) == {1}
    if not start:
        assert len(seen) == documents.response_counts.sum()


def test_reference_log_probabilities_come_with_their_responses(tmp_path):
    config, documents = a_source(tmp_path)
    logps = np.full((40, 8), np.nan, np.float32)
    for number, count in enumerate(documents.response_counts):
        logps[number, :count] = -number - 0.1 * np.arange(1, count + 1)
    told = WithReferenceLogps(documents, logps)
    plan = GlobalBatches(config, [told], seed=0)
    for step in range(6):
        batch = plan.batch(step, range(4))
        for row in range(4):
            for column in np.flatnonzero(batch["roles"][row]):
                here = batch["response_ids"][row] == column + 1
                answer = LLAMA3.decode(batch["targets"][row, here].tolist()).split()
                value = batch["reference_logps"][row, column]
                assert int(-value) == int(answer[1])
        assert not batch["reference_logps"][batch["roles"] == 0].any()
    assert plan.batch(0, range(4)).keys() == batch_fields(config, reference_logps=True).keys()
    assert fingerprint(config, [told], seed=0) != fingerprint(config, [documents], seed=0)
    logps[5, 0] = np.nan
    with pytest.raises(DataError, match="example 5 has no finite"):
        WithReferenceLogps(documents, logps)
    with pytest.raises(DataError, match=r"\(3, 8\) reference log-probabilities for 40 examples"):
        WithReferenceLogps(documents, np.zeros((3, 8), np.float32))


def test_a_teachers_tokens_stand_at_their_places(tmp_path):
    config, documents = a_source(tmp_path, "conversations", count=20)
    folder = tmp_path / "teacher"
    store = open_teacher_store(folder, documents, teacher="t", top_k=2)
    for index, one in enumerate(ordered_batches(config, documents, rows=range(4))):
        if index < store.next_batch:
            continue
        for row, pieces in enumerate(one.pieces):
            place = 0
            for piece in pieces:
                there = slice(place, place + piece.stop - piece.start)
                tokens = one.batch["tokens"][row, there]
                ids = np.stack([tokens, tokens + 1], axis=-1)
                store.write(piece, ids, -ids.astype(np.float32))
                place = there.stop
        store.note(index + 1)
        if index == 0:
            with pytest.raises(DataError, match="end before batch 1"):
                WithTeacher(documents, store)
            # A computation that was killed goes on.
            store = open_teacher_store(folder, documents, teacher="t", top_k=2)
            assert store.next_batch == 1
    store.note(None)
    told = pickle.loads(pickle.dumps(WithTeacher(documents, store)))
    batch = GlobalBatches(config, [told], seed=5).batch(1, range(4))
    here = batch["segment_ids"] > 0
    assert batch["teacher_ids"].shape == (4, 512, 2)
    np.testing.assert_array_equal(batch["teacher_ids"][here, 0], batch["tokens"][here])
    np.testing.assert_array_equal(batch["teacher_logps"][here, 1], -1.0 - batch["tokens"][here])
    with pytest.raises(DataError, match="with teacher 't', not 'u'"):
        open_teacher_store(folder, documents, teacher="u", top_k=2)


def test_rows_keep_both_limits_and_waste_little():
    generator = np.random.default_rng(0)
    sizes = np.sort(generator.integers(1, 65, 2000))[::-1]
    needs = generator.integers(1, 5, 2000)
    row_of = best_fit_with_slots(sizes, needs, 64, 8)
    assert np.bincount(row_of, sizes).max() <= 64
    assert np.bincount(row_of, needs).max() <= 8
    assert row_of.max() + 1 <= 1.03 * max(sizes.sum() / 64, needs.sum() / 8)
    # Slots alone may decide: eight small pieces of four slots take four rows.
    assert (
        np.bincount(best_fit_with_slots(np.ones(8, int), np.full(8, 4), 64, 8)).tolist() == [2] * 4
    )


def test_graded_solutions_become_preferences(shared, tmp_path):
    records, names = [], [f"{size}_{how}" for size in ("6b", "175b")
                          for how in ("finetuning", "verification")]  # fmt: skip
    path = shared / "data" / "gsm8k" / "model_solutions_first500.jsonl"
    for line in path.read_text().splitlines()[:60]:
        solved = json.loads(line)
        right = [name for name in names if solved[name]["is_correct"]]
        wrong = [name for name in names if not solved[name]["is_correct"]]
        if right and wrong:
            records.append({
                "prompt": solved["question"],
                "chosen": {"content": solved[right[0]]["solution"], "model": right[0]},
                "rejected": {"content": solved[wrong[0]]["solution"], "model": wrong[0]},
            })  # fmt: skip
    config = data_config(lines(tmp_path / "g.jsonl", records), "preferences", seq_len=2048)
    summary = opened(config, tmp_path / "run").manifest.summary
    assert (summary.examples, len(records)) == (36, 36)
    assert summary.pairs == {"better": 36}
    assert sum(map(sum, summary.models.values())) == 72
    told = "\n".join(summary.lines())
    assert "36 preferences: " in told
    assert f"  lengths  {summary.lengths[0]:,}  " in told


def test_instructions_become_conversations(shared, tmp_path):
    records = []
    for line in (shared / "data" / "self_instruct" / "seed_tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        prompt = "\n".join([task["instruction"], task["instances"][0]["input"]]).strip()
        records.append({"prompt": prompt, "completion": task["instances"][0]["output"]})
    config = data_config(lines(tmp_path / "s.jsonl", records), "conversations", seq_len=1024)
    summary = opened(config, tmp_path / "run").manifest.summary
    assert summary.examples + sum(summary.skipped.values()) == 175
    assert summary.skipped.keys() <= {"too_long"}
    assert summary.examples > 150


def test_inspect_marks_what_is_trained_on(tmp_path):
    records = [{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "strength": "slightly"}]
    config = data_config(lines(tmp_path / "p.jsonl", records), "preferences", seq_len=256)
    shown = {}
    for loss_on in ("responses", "last"):
        documents = opened(config, tmp_path / "run", loss_on=loss_on)
        out = io.StringIO()
        console = Console(file=out, width=120, color_system=None)
        show_batch(config, [documents], LLAMA3, console, seed=0, step=0, rows=1)
        shown[loss_on] = out.getvalue()
    assert "⟦So.⟧<|eot_id|>" in shown["responses"]
    assert "⟦No.⟧<|eot_id|>" in shown["responses"]
    assert "2 rejected" in shown["responses"]
    assert "So.<|eot_id|>◂" in shown["last"]
    assert "⟦So" not in shown["last"]
    table = batch_table(config, [documents], LLAMA3, seed=0, step=0, rows=1)
    first, second = table["rows"][0]["documents"]
    assert (first["responses"], second["responses"]) == (["1 chosen"], ["2 rejected"])
    assert first["text"].endswith("So.<|eot_id|>")
    assert (first["targets"], second["length"]) == (1, documents.lengths[0])
    assert table["rows"][0]["strength"][0] == 1

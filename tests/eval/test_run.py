"""An evaluation of a tiny model: what is read, what is scored, and that a stopped one goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.common import HashEmbedder, make_model, words

from memory3.bank.corpus import Chunk
from memory3.eval import prepared as preparing
from memory3.eval import run as running
from memory3.eval.arms import Arm, Reader, ablations, main_arms
from memory3.eval.prepared import Plan, Prepared, prepare
from memory3.eval.run import Evaluation
from memory3.eval.sets import Question, References
from memory3.memory import MemoryRead

MODEL = make_model()
TEXTS = [words(6 + i % 5, i) for i in range(40)]


def made_references(which, encode, span):
    return References([Chunk(f"t{i}", t, encode(t)[:span], "x", 0, len(t)) for i, t in enumerate(TEXTS)])


def made_questions(name, among, count, encode, seed=0):
    return [
        Question(name, f"{name}{i}", " ".join(TEXTS[i].split()[:3]), TEXTS[i].split()[3],
                 (TEXTS[i].split()[3],), (i,), (i, i + 20))
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def made(monkeypatch):
    monkeypatch.setattr(preparing, "references", made_references)
    monkeypatch.setattr(preparing, "questions", made_questions)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts and several forward passes, though there are few questions."""
    monkeypatch.setitem(running.PART, "cpu", 4)
    monkeypatch.setitem(running.BATCH, "cpu", (3, 400))


def prepared(folder, count=10, **more):
    plan = Plan({"squad": count, "vera": count // 2, **more})
    return prepare(plan, MODEL.tokenizer, MODEL.memory.span, HashEmbedder(), folder / "vectors")


def evaluation(folder, count=10, nets=None, **about):
    nets = nets or {"original": Reader(MODEL.net, MODEL.net)}
    return Evaluation(prepared(folder, count), nets, MODEL.tokenizer, folder, generate=2, about=about)


NONE = Arm("none")
MEMORY = Arm("memory", read="memory", refs=3)
TEXT = Arm("text", read="text", refs=2)


def test_losses_are_those_of_the_model(tmp_path):
    """Without memory, with memories and with text, against the plain calls that they stand for."""
    found = evaluation(tmp_path)
    results = {(r["arm"], r["id"]): r for r in found.run([NONE, MEMORY, TEXT])}
    assert len(results) == 3 * 15
    net, bos = MODEL.net, list(MODEL.memory.context_bos_ids)
    for i in (0, 7):
        question = found.prepared.asked["squad"][i]
        prompt, answer = list(question.prompt), list(question.answer)
        assert MODEL.tokenizer.decode(question.answer) == " " + TEXTS[i].split()[3]
        reads = found.reads(MEMORY, question)
        assert len(reads) == 3

        def loss(front, read=None, prefix=None, prompt=prompt, answer=answer):
            ids = torch.tensor([*front, *bos, *prompt, *answer])
            cu = torch.tensor([0, len(ids)], dtype=torch.int32)
            logits = net(ids, cu, read, prefix)[-len(answer) - 1 : -1]
            return float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))

        kv = MODEL.read(MODEL.write_ids([found.prepared.among["main"][n] for n in reads]))
        kv = MemoryRead(kv.kv, kv.length, kv.slots, torch.tensor([0, len(bos + prompt + answer)], dtype=torch.int32))
        front = [t for n in reversed(reads[:2]) for t in (*MODEL.memory.prefix_ids, *found.prepared.among["main"][n])]
        assert results["none", question.id]["loss"] == pytest.approx(loss([]), rel=1e-5)
        assert results["memory", question.id]["loss"] == pytest.approx(loss([], kv, MODEL.prefix), rel=1e-4)
        assert results["text", question.id]["loss"] == pytest.approx(loss(front), rel=1e-4)


def test_what_is_read(tmp_path):
    found = evaluation(tmp_path)
    for question in found.prepared.asked["squad"]:
        best = list(question.found)
        assert found.reads(MEMORY, question) == best[:3]
        without = found.reads(replace(MEMORY, choose="gold removed"), question)
        assert without == [n for n in best if n not in question.related][:3]
        drawn = found.reads(replace(MEMORY, choose="random"), question)
        assert len(set(drawn)) == 3 and not set(drawn) & set(question.related)
        assert drawn == found.reads(replace(MEMORY, choose="random"), question)
        noisy = found.reads(replace(MEMORY, refs=5, noise=0.4), question)
        assert sum(a != b for a, b in zip(noisy, best, strict=False)) == 2
    assert sum(r["gold"] for r in found.run([MEMORY]) if r["set"] == "squad") >= 8  # its first words find a text


def test_a_reference_that_says_the_question_is_left_out(tmp_path, monkeypatch):
    """Equation 6: more than 2/3 of the reference stands in the prompt."""
    monkeypatch.setattr(
        preparing, "questions",
        lambda name, among, count, encode, seed=0: [Question(name, "q", f"so: {TEXTS[3]}?", "x", ("x",), (3,), (3,))],
    )  # fmt: skip
    found = prepared(tmp_path).asked["squad"][0].found
    assert 3 not in found and len(found) >= 20


def test_a_stopped_evaluation_goes_on(tmp_path):
    arms = [NONE, MEMORY, Arm("few", read="memory", choose="random", limit=3)]
    whole = {(r["arm"], r["id"]): r for r in evaluation(tmp_path / "whole").run(arms)}
    assert len(whole) == 2 * 15 + 3 + 3

    class Stop(Exception):
        pass

    def tick(done, seen=[]):  # noqa: B006 - counts over calls
        seen.append(done)
        if len(seen) == 4:
            raise Stop

    with pytest.raises(Stop):
        evaluation(tmp_path / "cut").run(arms, tick)
    file = tmp_path / "cut" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote a line
    again = evaluation(tmp_path / "cut")
    assert 0 < again.todo(arms) == len(whole) - len(lines) + 1
    resumed = {(r["arm"], r["id"]): r for r in again.run(arms)}
    assert resumed.keys() == whole.keys() and again.todo(arms) == 0
    for key, row in whole.items():
        assert resumed[key]["loss"] == pytest.approx(row["loss"], rel=1e-5) and resumed[key]["gold"] == row["gold"]
    assert {r["arm"] for r in evaluation(tmp_path / "cut").run([MEMORY])} == {"memory"}
    evaluation(tmp_path / "cut", readers={"original": None, "adapted": "one"})  # a reader may come to it
    with pytest.raises(ValueError, match="other weights"):
        evaluation(tmp_path / "cut", readers={"original": None, "adapted": "another"})
    with pytest.raises(ValueError, match="other weights"):
        evaluation(tmp_path / "cut", memory={"tokens": 4})


def test_answers_in_words(tmp_path):
    """Greedy, up to a line break; scored only for the first `generate` questions of a set."""
    found = evaluation(tmp_path)
    results = found.run([NONE])
    spoken = [r for r in results if "said" in r]
    assert {r["id"] for r in spoken} == {"squad0", "squad1", "vera0", "vera1"}
    prompt = MODEL.tokenizer.decode(found.prepared.asked["squad"][1].prompt)
    plain = MODEL.tokenizer.decode(MODEL.tokenizer.encode(MODEL.generate(prompt, max_new_tokens=24)))
    said = next(r["said"] for r in spoken if r["id"] == "squad1")
    assert said == plain.lstrip("\n").partition("\n")[0].strip()


def test_quantised_and_refitted_memories(tmp_path):
    """Every token kept and refitted is what it was; a codec changes little, and is not ignored."""
    found = evaluation(tmp_path, count=4)
    span = MODEL.memory.span
    arms = [
        MEMORY,
        replace(MEMORY, name="all", memory={"tokens": span}),
        replace(MEMORY, name="all, refitted", memory={"tokens": span}, refit="both"),
        replace(MEMORY, name="bias", refit="bias"),
        replace(MEMORY, name="vq", codec="Residual2x5,PQ4x5"),
    ]
    with pytest.warns(UserWarning, match="is trained on"):
        rows = {(r["arm"], r["id"]): r["loss"] for r in found.run(arms)}
    total = {arm.name: sum(v for (a, _), v in rows.items() if a == arm.name) for arm in arms}
    assert total["all, refitted"] == pytest.approx(total["all"], rel=1e-4)
    assert total["bias"] != total["memory"] and total["vq"] != total["memory"]
    assert total["vq"] == pytest.approx(total["memory"], rel=0.1)


def test_some_heads_read(tmp_path):
    """All heads by a map are all heads; with fewer, a record holds fewer and answers differ."""
    found = evaluation(tmp_path, count=4)
    layers, heads = len(MODEL.memory.layers), MODEL.config.n_kv_heads
    every, first = tuple(range(heads)), (0, *[-1] * (heads - 1))
    arms = [
        MEMORY,
        replace(MEMORY, name="all", memory={"head_map": (every,) * layers}),
        replace(MEMORY, name="first", memory={"head_map": (first,) * layers}),
    ]
    rows = {(r["arm"], r["id"]): r["loss"] for r in found.run(arms)}
    asked = [i for a, i in rows if a == "memory"]
    assert all(rows["all", i] == pytest.approx(rows["memory", i], rel=1e-5) for i in asked)
    assert any(abs(rows["first", i] - rows["memory", i]) > 1e-3 for i in asked)


def test_an_adapter_reads_what_the_checkpoint_wrote(tmp_path):
    other = make_model(seed=1)
    both = {"original": Reader(MODEL.net, MODEL.net), "adapted": Reader(other.net, MODEL.net)}
    arms = [MEMORY, replace(MEMORY, name="adapted", reader="adapted")]
    found = evaluation(tmp_path, count=4, nets=both)
    rows = {(r["arm"], r["id"]): r["loss"] for r in found.run(arms)}
    one, other = (found._writer(arm, MODEL.memory, "main") for arm in arms)
    assert one is other
    assert all(abs(rows["memory", i] - rows["adapted", i]) > 1e-3 for a, i in rows if a == "memory")


def test_lists_of_arms():
    whole = Reader(MODEL.net, MODEL.net)
    rivals = {"closed book": replace(whole, reads="none"), "reader of text": replace(whole, reads="text")}
    arms = main_arms({"original": whole, "adapted": whole, **rivals, "again": replace(whole, reads="none")}, 100)
    names = [a.name for a in arms]
    assert len(names) == len(set(names)) == 22 and "trained reader: RAG 5" in names and "again: no memory" in names
    full = next(a for a in arms if a.name == "adapted: full KV")
    assert full.memory["tokens"] == MODEL.memory.span and len(full.memory["layers"]) == MODEL.config.n_layers
    tables = ablations(30, 3)
    for title, part in tables.items():
        assert len({a.name for a in part}) == len(part) > 2, title
    rows = {a.name: a.memory["head_map"] for a in tables["KV heads that read, in every layer"]}
    assert rows["1"] == ((-1, 0, -1),) * 30 and rows["0 2"] == ((0, -1, 1),) * 30 and len(rows) == 6
    with pytest.raises(ValueError, match="choose"):
        Arm("x", choose="best")
    with pytest.raises(ValueError, match="sets"):
        Plan({"trivia": 3})


def test_vectors_are_kept(tmp_path):
    embedder = HashEmbedder()
    among = made_references("main", MODEL.tokenizer.encode, 64).embed(embedder, tmp_path)
    count = len(embedder.asked)
    again = made_references("main", MODEL.tokenizer.encode, 64).embed(embedder, tmp_path)
    assert len(embedder.asked) == count and np.array_equal(again.vectors, among.vectors)
    best = among.search(among.vectors[5:6], 4)[0]
    assert best[0] == 5 and list(best) == list(np.argsort(-(among.vectors @ among.vectors[5]), kind="stable")[:4])


def test_a_prepared_file_is_asked_the_same(tmp_path):
    """Written and read again, with a set that is asked closed book only."""
    arms = [NONE, MEMORY, replace(MEMORY, name="random", choose="random"), TEXT]
    made = prepared(tmp_path, **{"wiki-known": 3})
    replace(made, texts={"book": [(1, 2, 3)]}).save(tmp_path / "asked.npz")
    read = Prepared.load(tmp_path / "asked.npz")
    assert read.asked == made.asked and read.texts == {"book": [(1, 2, 3)]} and set(read.among) == {"main", "held"}
    assert [read.among["held"][n] for n in range(40)] == [made.among["held"][n] for n in range(40)]
    nets = {"original": Reader(MODEL.net, MODEL.net)}
    rows = [
        Evaluation(p, nets, MODEL.tokenizer, tmp_path / name, generate=1).run(arms)
        for name, p in (("made", made), ("read", read.fewer({"squad": 10, "vera": 5, "wiki-known": 3})))
    ]
    assert rows[0] == rows[1] and {r["set"] for r in rows[0] if r["arm"] == "memory"} == {"squad", "vera"}
    assert sum(r["set"] == "wiki-known" for r in rows[0]) == 3
    assert {k: len(v) for k, v in read.fewer({"squad": 2}).asked.items()} == {"squad": 2}
    with pytest.raises(ValueError, match="tokenizer"):
        Evaluation(replace(made, tokenizer="x"), nets, MODEL.tokenizer, tmp_path / "other")
    np.savez(tmp_path / "else.npz", x=1)
    with pytest.raises(ValueError, match="--prepare"):
        Prepared.load(tmp_path / "else.npz")


def test_big_batches_give_the_same(tmp_path, monkeypatch):
    """One part and one forward pass for all; losses first, words in a second run."""
    arms = [NONE, MEMORY, TEXT, replace(MEMORY, name="few", memory={"layers": MODEL.memory.layers[:1]})]
    small = {(r["arm"], r["id"]): r for r in evaluation(tmp_path / "small").run(arms)}
    monkeypatch.setitem(running.PART, "cpu", 1000)
    monkeypatch.setitem(running.BATCH, "cpu", (1000, 10**6))
    big = evaluation(tmp_path / "big")
    assert not any("said" in r for r in big.run(arms, words=False))
    assert not big._writers  # nothing is kept once no arm needs it
    assert big.todo(arms) == 4 * 4 and big.todo(arms, words=False) == 0
    rows = {(r["arm"], r["id"]): r for r in big.run(arms)}
    assert rows.keys() == small.keys() and sum("said" in r for r in rows.values()) == 16
    for key, row in small.items():
        assert rows[key]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert rows[key].get("said") == row.get("said")
    late = evaluation(tmp_path / "late")
    late.until = 0
    assert late.run(arms) == []


def test_a_part_of_the_layers_is_taken_from_the_whole(tmp_path):
    """Memories of some layers and heads are slices of all; written by themselves they are the same."""
    found = evaluation(tmp_path)
    memory = replace(MODEL.memory, layers=MODEL.memory.layers[1:], head_map=((-1, 0),) * (len(MODEL.memory.layers) - 1))
    arm = replace(MEMORY, memory={"layers": memory.layers, "head_map": memory.head_map})
    writer = found._writer(arm, memory, "main")
    assert writer._plain is not None
    alone = running.Writer(MODEL.net.with_memory(memory), found.prepared.among["main"])
    a, b = writer([3, 1, 7]), alone([3, 1, 7])
    for n in (1, 3, 7):
        torch.testing.assert_close(a.kv[a.slot[n]], b.kv[b.slot[n]])
        assert a.length[a.slot[n]] == b.length[b.slot[n]]

"""bench decode: rivals compute what they claim, runs resume, summaries and predictions follow from the numbers."""

import json
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from engine.common import MEMORY, HashEmbedder, make_bank, make_model, prompt

from bench import __main__ as command
from bench import corpus, decode, report
from bench.ceilings import Ceilings
from bench.decode import arms, banks, predict, summary
from bench.decode.arms import Setting
from bench.decode.record import Record
from bench.decode.worst import UniqueEngine
from bench.rivals import again
from bench.rivals.full_kv import full_kv_model, retrieving_once
from bench.timing import median_interval
from memory3 import PRESETS, Engine
from memory3.generation import Stats
from memory3.rag import with_references

SETTING = Setting("dense", "warm", 2, 3, 1, 64)
CEILINGS = Ceilings(1, 20.0, 19.0, 200.0, 1 << 25, 1 << 28)


# ---- rivals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rag(tmp_path):
    model = make_model()
    with make_bank(tmp_path / "bank", model) as bank:
        yield Engine(model, bank, HashEmbedder(), mode="rag", refs=2)


def greedy(model, ids: list[int]) -> int:
    """The most likely token after a text, from one packed forward pass: no cache, no sessions."""
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    return int(model.net(torch.tensor(ids), cu)[-1].argmax())


@pytest.mark.parametrize("place", again.PLACES)
def test_rag_again_puts_references_where_it_says(rag, place):
    """Every token is the likeliest one after the text that the definition spells out, sequence by sequence."""
    rag.chunk = 4
    prompts = [prompt(20, 1), prompt(9, 2)]
    tokens, stats = again.generate(rag, prompts, 7, place)
    assert stats.new_tokens == 14 and stats.retrievals == 4, "for the prompt, and after the fourth token"
    for b, text in enumerate(prompts):
        (first,), _ = with_references(rag, [text], Stats())
        (second,), _ = with_references(rag, [tokens[b][:4]], Stats())
        opening = list(rag.opening(text))
        before = [*first, *opening, *text]
        for i, token in enumerate(tokens[b]):
            if i < 4:
                ids = [*before, *tokens[b][:i]]
            elif place == "append":
                ids = [*before, *tokens[b][:3], *second, *tokens[b][3:i]]
            else:
                ids = [*second, *opening, *text, *tokens[b][:i]]
            assert token == greedy(rag.model, ids), (b, i)


def test_rag_again_refuses_other_places(rag):
    with pytest.raises(ValueError, match="append, front"):
        again.generate(rag, [prompt(5)], 2, "behind")


def test_full_kv_is_attention_to_whole_references(tmp_path):
    """Its first token is that of a model that sees all tokens of each reference, each encoded on its own."""
    model, embedder = full_kv_model(make_model()), HashEmbedder()
    assert model.memory.tokens == model.memory.span and len(model.memory.layers) == model.config.n_layers
    once = retrieving_once(model)
    with make_bank(tmp_path / "bank", model) as bank:
        engine = Engine(once, bank, embedder, refs=1)
        asked = prompt(100)
        result = engine.generate([asked], max_new_tokens=80, ignore_eos=True)[0]
        assert result.stats.retrievals == 1
        (found,), _, _ = engine.search([asked], Stats())
        memory = bank.get(found)[0]
        assert memory.n_valid == len(memory.token_ids), "nothing was left out"
        read = model.read([memory])
        ids = [*model.memory.context_bos_ids, *asked]
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        read.cu_chunk = cu
        logits = model.net.prefill(torch.tensor(ids), cu, model.new_cache(1, 400), read)
        assert result.token_ids[0] == int(logits.argmax())


def test_worst_case_reads_no_memory_twice(tmp_path):
    model = make_model()
    with make_bank(tmp_path / "bank", model) as bank:
        engine = UniqueEngine(model, bank, HashEmbedder(), refs=3, slots=64)
        same = [prompt(64, 5)] * 3
        for _ in range(2):
            engine.restart()
            results = engine.generate(same, max_new_tokens=66, ignore_eos=True)
            asked = [r for one in results for r in one.reads if r.where == "prompt"]
            asked += [one.reads[-1] for one in results]
            ids = [i for read in asked for i in read.ids]
            assert len(ids) == 18 and len(set(ids)) == 18
            assert results[0].stats.bytes_loaded == 18 * bank.layout.record_bytes, "every one was read"
        with pytest.raises(ValueError, match="more references than a run reads, got 40"):
            for _ in range(20):
                engine.search([same[0]], Stats())


def test_siblings_find_the_same(tmp_path):
    """Other formats of a bank hold the same references and write them when they are first read."""
    model, embedder = make_model(), HashEmbedder()
    spec = banks.codec_spec(model.config.head_dim)
    with make_bank(tmp_path / "bank", model) as source:
        made = [
            banks.sibling(tmp_path / "vq", model, source, 30, lambda: banks.train(model, source, spec)),
            banks.sibling(tmp_path / "full", full_kv_model(model), source, 30),
        ]
        want = {source.text(i) for i in list(source.ids())[:30]}
        for bank in made:
            assert {bank.text(i) for i in bank.ids()} == want
            ids, _ = bank.search(embedder.encode(["river stone winter"]), 3)
            assert bank.cold(ids[0]) == ids[0]
        assert made[0].codec.spec.text == spec
        first, second = ([bank.text(i) for i in bank.search(embedder.encode(["copper"]), 5)[0][0]] for bank in made)
        assert first == second
        for bank in made:
            bank.close()
        with banks.sibling(tmp_path / "vq", model, source, 30) as again_open:
            assert len(again_open) == 30 and again_open.codec is not None


def test_bank_of_references_goes_on_where_it_was(tmp_path, monkeypatch):
    """Written without memories; a stopped writing is resumed; a whole one is opened without reading the corpus."""
    model, embedder, folder = make_model(), HashEmbedder(), tmp_path / "bank"
    texts = [prompt(model.memory.span, number) for number in range(70)]
    monkeypatch.setattr(corpus, "windows", lambda model, tokens: iter(texts))
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.open_bank(folder, model, embedder, 70, stop)
    with corpus.open_bank(folder, model, embedder, 70) as bank:
        assert seen == [32, 64] and len(bank) == 70
        ids, _ = bank.search(embedder.encode([bank.text(bank.record_id(texts[69]))]), 1)
        assert bank.token_ids(ids[0][0]) == texts[69] and bank.cold(ids[0]) == ids[0]
    monkeypatch.setattr(corpus, "windows", None)
    corpus.open_bank(folder, model, embedder, 60).close()
    monkeypatch.setattr(corpus, "windows", lambda model, tokens: iter(texts))
    with pytest.raises(ValueError, match="the corpus has 70 pieces"):
        corpus.open_bank(folder, model, embedder, 71)


# ---- intervals, records, summaries -----------------------------------------------------------------------------------


def test_median_interval_is_the_sign_tests():
    assert median_interval(range(1, 10)) == (2, 8), "96.1 % of the time the median lies between these"
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0) and median_interval([5.0]) == (5.0, 5.0)
    assert median_interval(range(1, 101)) == (40, 61), "as the tables have it"
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_median_interval_covers_as_often_as_it_says():
    torch.manual_seed(1)
    draws = torch.randn(4000, 9).exp().tolist()
    held = sum(low <= 1.0 <= high for low, high in map(median_interval, draws))
    assert 0.95 <= held / 4000 <= 0.972


def made_up(wall: float, **changes) -> dict:
    run = {
        "wall_s": wall, "cpu_s": wall, "ttft_s": wall / 4, "prompt_tokens": 128, "new_tokens": 128, "kv_bytes": 1000,
        "retrievals": 0, "bytes_loaded": 0, "device_bytes": 0, "times": {"prefill": wall / 4, "decode": wall / 2},
        "load": 0.5,
    }  # fmt: skip
    return run | changes


def filled(path=None) -> Record:
    record = Record(path, {"model": "m"}, {})
    for number, drift in enumerate((1.0, 2.0, 4.0)):
        record.add(SETTING, number, {
            "none": made_up(drift),
            "memory": made_up(1.25 * drift, retrievals=6, bytes_loaded=400),
            "rag": made_up(2.5 * drift, retrievals=2),
        })  # fmt: skip
    ceilings = asdict(CEILINGS)
    written = {"memory": 0.05, "memory-vq": 0.06, "full-kv": 0.07}
    record.about["dense, 1 threads"] = {
        "ceilings": ceilings, "device_gb_s": 1.0, "weight_bytes": 1000, "write_s": written,
    }  # fmt: skip
    return record


def test_ratios_are_taken_within_rounds():
    """A machine that gets four times slower changes no ratio."""
    rows = {r["arm"]: r for r in summary.rows(filled(), make_model().config, MEMORY)}
    assert rows["memory"]["ratios"]["none"] == pytest.approx([0.8, 0.8, 0.8])
    assert rows["memory"]["ratios"]["rag"] == pytest.approx([2.0, 2.0, 2.0])
    assert rows["none"]["tokens_per_s"] == 64 and rows["none"]["tokens_per_s_interval"] == [32, 128]
    assert rows["none"]["ttft_s_p50"] == 0.5 and rows["none"]["ttft_s_p90"] == pytest.approx(0.9)
    assert rows["memory"]["bytes_per_chunk"] == 100, "four chunks of the two sequences"
    assert rows["memory"]["predicted_ratios"]["none"] < 1 and "load" in rows["memory"]["predicted_seconds"]


def test_gates_and_break_even():
    record = filled()
    rows = summary.rows(record, make_model().config, MEMORY)
    (gate,) = summary.gates(rows)
    assert gate["what"] == "memory against no memory, warm" and gate["must"] and not gate["met"]
    (found,) = summary.break_evens(rows, record.about)
    assert found["write_s"] == 0.05 and found["read_s"] == pytest.approx(0.5 / 18)
    assert found["text_s"] == pytest.approx(3.0 / 6) and found["uses"] == pytest.approx(0.05 / (0.5 - 0.5 / 18))


def test_a_record_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "decode.json"
    first = filled(path)
    assert first.missing(SETTING, ["none", "memory", "rag"], 5) == [3, 4]
    assert first.missing(SETTING, ["none", "full-kv"], 3) == [0, 1, 2], "a new arm asks for whole rounds again"
    first.save(lambda r: summary.rows(r, make_model().config, MEMORY))
    second = Record(path, {}, {})
    assert second.runs == first.runs and second.known() == [SETTING] and second.settings == {"model": "m"}
    second.add(SETTING, 0, {"none": made_up(9.0)})
    assert len(second.of(SETTING)["none"]) == 2, "a round that lost an arm counts for none"
    assert json.loads(path.read_text())["rows"][0]["setting"] == SETTING.key
    path.write_text(json.dumps({"suite": "engine", "schema": report.SCHEMA}))
    with pytest.raises(ValueError, match="expected results of bench decode"):
        Record(path, {}, {})


# ---- predictions -----------------------------------------------------------------------------------------------------

MODEL = make_model().config
SHAPE = {"batch": 2, "refs": 3, "tokens": 128}


def tokens_of(run: predict.Run) -> int:
    return sum(one.new for one in run.passes)


def test_passes_of_every_arm():
    """Counted by hand for 128 in, 128 out, 3 references of 128 tokens behind a prefix each."""
    prefix, front = MEMORY.prefix_len, 3 * (128 + MEMORY.prefix_len)
    runs = {arm: predict.run_of(arm, MODEL, MEMORY, **SHAPE) for arm in arms.ABOUT}
    assert runs["llama.cpp"] is None and runs["llama.cpp-rag"] is None
    assert tokens_of(runs["none"]) == tokens_of(runs["memory"]) == 129 + 127
    assert tokens_of(runs["rag"]) == front + 129 + 127
    assert tokens_of(runs["rag-append"]) == 2 * front + 129 + 127
    assert tokens_of(runs["rag-front"]) == 2 * front + 129 + 63 + 129 + 64 + 63
    assert {run.passes[-1].past for name, run in runs.items() if run and name in ("none", "memory", "rag-append")} == {
        255, 255 + prefix, 255 + 2 * front,
    }  # fmt: skip
    assert runs["memory"].passes[-1].memory == 3 * 4 * 3 / 4, "three of four layers read 3 x 4 tokens"
    assert runs["full-kv"].passes[-1].memory == 3 * 128
    assert runs["memory"].query_tokens == 3 * 64 and runs["rag"].query_tokens == 64


def test_pass_seconds_by_hand():
    """A decode step of one sequence: the weights' bytes and the cache's rows, at the speed of reads."""
    one = predict.Pass(1, 99, 4)
    row = 2 * 2 * MODEL.n_layers * MODEL.n_kv_heads * MODEL.head_dim
    seconds = predict.pass_seconds(one, 1, MODEL, 10**9, CEILINGS)
    assert seconds == pytest.approx((10**9 + row * 104) / 20e9)
    many = predict.pass_seconds(predict.Pass(1000, 0), 1, MODEL, 0, CEILINGS)
    operations = 1000 * 2 * MODEL.non_embedding_parameters + 2 * MODEL.vocab_size * MODEL.dim
    operations += 1000 * 4 * MODEL.n_layers * MODEL.n_heads * MODEL.head_dim * 500.5
    assert many == pytest.approx(operations / 200e9)


def test_predictions_scale_from_the_plain_loop():
    model, memory = PRESETS["smollm2-135m"].model, PRESETS["smollm2-135m"].memory
    machine, plain = predict.Machine(CEILINGS, 1.0), {"total": 4.0, "prefill": 1.0, "decode": 2.5}

    def ratio(arm, **more):
        return predict.explain(arm, SHAPE, model, memory, 270 << 20, machine, plain, **more)["ratio"]

    assert ratio("none") == pytest.approx(1.0), "by construction"
    assert ratio("rag-front") < ratio("rag-append") < ratio("rag") < ratio("full-kv") < ratio("memory") < 1
    loaded = ratio("memory", load_bytes=10**9)
    assert 4.0 / loaded - 4.0 / ratio("memory") == pytest.approx(10**9 * predict.LOAD_PASSES / 20e9)
    assert 4.0 / ratio("memory", load_bytes=10**9, device=True) - 4.0 / ratio("memory") == pytest.approx(1.0)


# ---- the whole command -----------------------------------------------------------------------------------------------


class FakeLlama:
    about = {"version": "0"}

    def generate(self, ids, new):
        self.asked = ids
        return {"prefill_s": 0.25, "decode_s": 0.75, "ids": list(range(new))}


def test_llama_arms_count_retrieval(tmp_path):
    model, peer = make_model(), FakeLlama()
    with make_bank(tmp_path / "bank", model) as bank:
        setting = replace(SETTING, batch=1, weights="checkpoint")
        names = ["llama.cpp", "llama.cpp-rag"]
        found = arms.build(setting, model, arms.Banks(bank, bank, bank), HashEmbedder(), names, peer)
        assert list(found) == names
        plain = found["llama.cpp"].run([prompt(64)], 8)
        assert peer.asked == [1, *prompt(64)] and plain.ttft_s >= 0.25 and plain.retrievals == 0
        stats = found["llama.cpp-rag"].run([prompt(64)], 8)
        assert len(peer.asked) > 65 and stats.retrievals == 1 and stats.times["search"] > 0
        assert stats.total_s >= 1.0 and stats.new_tokens == 8
    assert "llama.cpp" not in arms.build(SETTING, model, None, None, ["llama.cpp"], peer)


def test_a_run_that_writes_is_made_again():
    """Records that were missing the first time are there the second time, and only that one counts."""
    runs, restarts = [], []
    stored = [10]

    def run(prompts, new):
        runs.append(len(runs))
        stored[0] += len(runs) == 1
        return Stats(batch=1, new_tokens=len(runs))

    emptied = []
    arm = arms.Arm("memory-vq", run, lambda: restarts.append(1), lambda: stored[0], lambda: emptied.append(1))
    assert arms.timed(arm, [[1]], 1)["new_tokens"] == 2 and len(restarts) == 2 and len(emptied) == 1
    assert arms.timed(arm, [[1]], 1)["new_tokens"] == 3 and len(restarts) == 3 and len(emptied) == 1


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command on a tiny model and bank; what it takes from the corpus and the machine is given."""
    model = make_model()
    make_bank(tmp_path / "bank", model).close()
    (tmp_path / "bank-prompts-64-4.json").write_text(json.dumps([prompt(64, i) for i in range(4)]))
    ground = decode.Ground
    monkeypatch.setattr(decode, "Ground", lambda args: ground(args, lambda *_, **__: model, HashEmbedder()))
    monkeypatch.setattr(decode.ceilings, "measure", lambda count: CEILINGS)
    monkeypatch.setattr(summary, "PRESETS", {summary.MODEL: replace_preset(model)})
    line = ["decode", "--weights", "dense", "--batch", "2", "--refs", "3", "--threads", "1", "--tokens", "64",
            "--runs", "2", "--references", "40", "--others", "99", "--bank", str(tmp_path / "bank")]  # fmt: skip
    return tmp_path, line


def replace_preset(model):
    from memory3.config import Preset

    return Preset(model.config, model.memory)


def test_whole_command(tiny, capsys):
    folder, line = tiny
    out = folder / "decode.json"
    assert command.main([*line, "--prepare"]) == 0
    assert command.main([*line, "--json", str(out)]) == 0
    read = json.loads(out.read_text())
    by = {(r["protocol"], r["arm"]): r for r in read["rows"]}
    assert [key[1] for key in by if key[0] == "warm"] == [a for a in arms.ABOUT if not a.startswith("llama")]
    assert [key[1] for key in by if key[0] == "worst"] == list(arms.PROTOCOLS["worst"])
    assert all(row["runs"] == 2 and row["tokens_per_s"] > 0 for row in by.values())
    memory, coded = by["worst", "memory"], by["worst", "memory-vq"]
    assert memory["bytes_loaded"] == 2 * 3 * read["settings"]["record_bytes"]["memory"], "unique: nothing is shared"
    assert coded["bytes_loaded"] < memory["bytes_loaded"] and by["warm", "rag"]["bytes_loaded"] == 0
    assert by["warm", "rag"]["kv_bytes"] > by["warm", "memory"]["kv_bytes"] > by["warm", "none"]["kv_bytes"]
    assert by["warm", "rag-append"]["retrievals"] == by["warm", "rag"]["retrievals"] == 2
    assert set(read["about"]["dense, 1 threads"]["write_s"]) == set(arms.LOADING)
    shown = capsys.readouterr().out
    assert "memory against no memory, warm" in shown and "pays from uses" in shown
    assert all(0 <= run["others"] < 99 for run in read["runs"])
    before = read["runs"]
    assert command.main([*line, "--json", str(out), "--minutes", "0"]) == 0
    assert json.loads(out.read_text())["runs"] == before, "nothing is measured twice"
    again = [*line, "--json", str(folder / "other.json"), "--protocol", "worst", "--arms", "none", "--others", "-1"]
    assert command.main(again) == 0 and "round 1 does not count" in capsys.readouterr().out
    assert not (folder / "other.json").exists(), "a round that was disturbed is not kept"


def test_peak_memory_asks_a_process_per_arm(tiny, monkeypatch):
    """And opens no bank itself: the processes write in them."""
    folder, line = tiny
    asked = []

    def run(command_line, **_):
        asked.append(command_line[command_line.index("--one-arm") + 1])
        return subprocess.CompletedProcess(command_line, 0, stdout='noise\n{"peak_rss_bytes": 123}\n')

    monkeypatch.setattr(decode.subprocess, "run", run)
    monkeypatch.setattr(corpus, "open_bank", lambda *_: pytest.fail("opened"))
    out = folder / "decode.json"
    assert command.main([*line, "--json", str(out), "--peak-memory", "--protocol", "worst"]) == 0
    assert asked == list(arms.PROTOCOLS["worst"])
    assert list(json.loads(out.read_text())["peak"].values()) == [dict.fromkeys(asked, 123)]


def test_peak_memory_is_that_of_a_process(tiny, capsys):
    _, line = tiny
    assert command.main([*line, "--protocol", "worst", "--one-arm", "memory"]) == 0
    peak = json.loads(capsys.readouterr().out.splitlines()[-1])["peak_rss_bytes"]
    assert peak > 100 << 20

"""A bounded arena under a run: eviction, pins, failures, cold references."""

import pytest
import torch

from memory3 import Bank, Engine
from memory3.arena import SlotsExhausted
from memory3.bank import RecordCorrupt
from memory3.generation import Stats

from .common import HashEmbedder, make_bank, make_model, prompt, reference_texts


def run(engine, batch=2, tokens=70, **options):
    ids = [prompt(140, b) for b in range(batch)]
    return engine.generate(ids, max_new_tokens=tokens, ignore_eos=True, **options)


def test_eviction_does_not_change_the_text(engine):
    roomy, tight = engine(slots=100), engine(slots=6)
    a, b = run(roomy), run(tight)
    assert [r.token_ids for r in a] == [r.token_ids for r in b]
    run(roomy), run(tight)
    assert tight.arena.stats.misses > roomy.arena.stats.misses
    assert run(roomy)[0].stats.bytes_loaded == 0 < run(tight)[0].stats.bytes_loaded


def test_bytes_loaded_are_record_bytes(engine, bank):
    made = engine(slots=100)
    stats = run(made, batch=1)[0].stats
    distinct = made.arena.stats.misses
    assert stats.bytes_loaded == distinct * bank.layout.record_bytes
    assert stats.bytes_loaded > distinct * made.arena.slot_bytes, "head and positions come on top"


def test_too_few_slots_for_a_step(engine):
    made = engine(slots=5)
    with pytest.raises(
        SlotsExhausted,
        match=r"a step reads 6 memories at once beside 0 in use, but the arena has 5 slots; raise slots, or lower",
    ):
        run(made, batch=2)
    assert made.arena.pinned == 0
    assert len(run(made, batch=1)[0].token_ids) == 70, "the engine goes on"


def test_nothing_stays_pinned_after_an_exception(engine, monkeypatch, model):
    """Wherever a run breaks: in the pass over the prompt, while decoding, in the caller's function."""
    made = engine(slots=40)

    def broken(*args, **kwargs):
        assert made.arena.pinned > 0
        raise KeyboardInterrupt

    for name in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(model.net, name, broken)
            with pytest.raises(KeyboardInterrupt):
                run(made)
        assert made.arena.pinned == 0
    with pytest.raises(ZeroDivisionError):
        run(made, on_text=lambda b, piece: 1 / 0)
    assert made.arena.pinned == 0


def test_nothing_stays_pinned_after_an_abandoned_stream(engine):
    made = engine()
    pieces = made.stream(prompt(30), max_new_tokens=200, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert made.arena.pinned == 0
    assert made.arena.stats.misses == 3, "the run ended long before its first re-retrieval"


def test_failed_load_mid_run(engine, monkeypatch, bank):
    """The second retrieval meets a record it cannot read."""
    made, reads = engine(slots=6), []

    def read_into(*args):
        reads.append(1)
        if len(reads) == 2:
            raise RecordCorrupt(args[0][0], "checksum")
        return Bank.read_into(bank, *args)

    monkeypatch.setattr(bank, "read_into", read_into)
    with pytest.raises(RecordCorrupt):
        made.generate([prompt(20)], max_new_tokens=70, ignore_eos=True)
    assert made.arena.pinned == 0


def test_arena_is_usable_outside_inference_mode(engine):
    """It is made inside a run; a background thread fills it outside of that mode."""
    made = engine()
    made.generate([prompt(20)], max_new_tokens=1)
    assert not made.arena.length.is_inference()
    slots, _ = made.load([list(made.bank.ids())[:2]])
    made.arena.release(slots[0])


@pytest.mark.parametrize("write", [True, False], ids=["writable", "read-only"])
def test_cold_references_are_written_at_first_retrieval(tmp_path, model, write):
    texts = reference_texts(12)
    with make_bank(tmp_path / "warm", model, texts) as warm:
        want = run(Engine(model, warm, HashEmbedder(), slots=40))
    make_bank(tmp_path / "cold", model, texts, cold=True).close()
    with Bank.open(tmp_path / "cold", write=write) as bank:
        assert bank.stats()["cold"] == 12
        engine = Engine(model, bank, HashEmbedder(), slots=40)
        got = run(engine)
        assert [r.token_ids for r in got] == [r.token_ids for r in want]
        used = {i for r in got for read in r.reads for i in read.ids}
        assert bank.stats()["cold"] == (12 - len(used) if write else 12)
    with Bank.open(tmp_path / "cold") as again:
        assert again.stats()["cold"] == (12 - len(used) if write else 12)


def test_cold_references_in_the_background(tmp_path, model):
    """A prefetch writes them, too."""
    with make_bank(tmp_path / "cold", model, reference_texts(20), cold=True) as bank:
        engine = Engine(model, bank, HashEmbedder(), slots=12, prefetch=12)
        out = engine.generate([prompt(20)], max_new_tokens=130, ignore_eos=True)[0]
        used = {i for read in out.reads for i in read.ids}
        assert len(used) > 3 and not bank.cold(list(used))


def test_one_arena_for_two_threads(engine):
    """Loads and releases from two threads keep count."""
    import threading

    made = engine(slots=12)
    ids = list(made.bank.ids())

    def churn(offset):
        for i in range(60):
            slots, _ = made.load([[ids[(offset + i + j) % len(ids)] for j in range(3)]])
            for slot, j in zip(slots[0], range(3), strict=True):
                record = made.bank.get([ids[(offset + i + j) % len(ids)]])[0]
                wrong.append(1) if not torch.equal(made.arena.kv[slot], record.kv) else None
            made.arena.release(slots[0])

    wrong: list[int] = []
    threads = [threading.Thread(target=churn, args=(offset,)) for offset in (0, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and made.arena.pinned == 0


def test_half_precision_bank(tmp_path):
    model = make_model()
    model.net.bfloat16()
    with make_bank(tmp_path / "b", model) as bank:
        engine = Engine(model, bank, HashEmbedder(), slots=12)
        assert engine.arena.kv.dtype == torch.bfloat16
        assert len(run(engine)[0].token_ids) == 70
        engine.search([[2]], Stats())

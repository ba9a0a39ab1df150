"""Pieces join to the text; characters and stop texts are never torn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from memory3.model.tokenizer import Tokenizer
from memory3.sampling import Sampling
from memory3.streaming import Detokenizer, stream_pieces

from .common import TOKENIZER, prompt


def push_all(ids, stop=(), tokenizer=TOKENIZER):
    """Pieces, the whole text, and after how many tokens it ended (None: never)."""
    pieces: list[str] = []
    detokenizer = Detokenizer(tokenizer, stop, pieces.append)
    ended = next((i + 1 for i, token in enumerate(ids) if detokenizer.push(token)), None)
    return pieces, detokenizer.finish(), ended


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40))
def test_any_text_survives(text):
    pieces, whole, _ = push_all(TOKENIZER.encode(text))
    assert "".join(pieces) == whole == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 319), max_size=40))
def test_any_tokens_give_what_they_decode_to(ids):
    pieces, whole, _ = push_all(ids)
    assert "".join(pieces) == whole == TOKENIZER.decode(ids)


def test_characters_come_whole():
    ids = TOKENIZER.encode("a\u00e9\U0001f600z")
    assert len(ids) == 1 + 2 + 4 + 1
    pieces, _, _ = push_all(ids)
    assert pieces == ["a", "\u00e9", "\U0001f600", "z"]


def test_a_torn_character_at_the_end_is_shown_as_such():
    ids = TOKENIZER.encode("ok \U0001f600")[:-1]
    pieces, whole, _ = push_all(ids)
    assert "".join(pieces) == whole == TOKENIZER.decode(ids) and whole.startswith("ok \ufffd")


def test_a_tokenizer_that_drops_leading_spaces():
    """SentencePiece vocabularies: a token alone reads otherwise than behind another."""
    raw = RawTokenizer(models.WordLevel({"\u2581hello": 0, "\u2581big": 1, "\u2581world": 2, "s": 3}, unk_token="s"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    pieces, whole, _ = push_all([0, 1, 2, 3, 2], tokenizer=Tokenizer(raw))
    assert whole == "hello big worlds world" and pieces == ["hello", " big", " world", "s", " world"]


def test_stop_text_across_token_borders():
    ids = TOKENIZER.encode("one two\n\nQ: three")
    pieces, whole, ended = push_all(ids, ["\n\nQ:"])
    assert "".join(pieces) == whole == "one two"
    assert TOKENIZER.decode(ids[:ended]).endswith("\n\nQ:") and ended < len(ids)


def test_a_false_start_of_a_stop_text_is_shown_later():
    pieces, whole, ended = push_all(TOKENIZER.encode("aab!ab?"), ["ab?"])
    assert "".join(pieces) == whole == "aab!" and ended is not None
    pieces, whole, ended = push_all(TOKENIZER.encode("x ab"), ["ab?"])
    assert "".join(pieces) == whole == "x ab" and ended is None
    assert pieces[-1] == "ab", "held back until the end"


@settings(deadline=None, max_examples=100)
@given(st.text("ab\u00e9", max_size=30), st.lists(st.text("ab\u00e9", min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_equals_searching_the_whole_text(text, stop):
    pieces, whole, ended = push_all(TOKENIZER.encode(text), stop)
    assert "".join(pieces) == whole
    assert not any(s in whole for s in stop)
    if ended is None:
        assert whole == text
    else:  # the earliest stop text that the tokens up to there contain
        assert text.startswith(whole) and any(text[len(whole) :].startswith(s) for s in stop)


def test_stream_joins_to_the_text(engine):
    made = engine()
    sampling = Sampling(1.0, seed=4)
    want = made.generate([prompt(30)], max_new_tokens=80, sampling=sampling)[0].text
    pieces = list(made.stream(prompt(30), max_new_tokens=80, sampling=sampling))
    assert "".join(pieces) == want and len(pieces) > 3
    assert "".join(made.stream("river stone", max_new_tokens=5)) == made.generate("river stone", max_new_tokens=5).text


def test_on_text_says_which_sequence(engine):
    seen: dict[int, str] = {0: "", 1: "", 2: ""}

    def on_text(b, piece):
        seen[b] += piece

    runs = engine().generate([prompt(n, n) for n in (5, 70, 20)], max_new_tokens=20, on_text=on_text)
    assert [r.text for r in runs] == list(seen.values())


def test_stop_in_generate(engine):
    """The text is cut; the tokens keep what was said; the run ends there. A single text needs no list."""
    made = engine()
    free = made.generate([prompt(30)], max_new_tokens=60, ignore_eos=True)[0]
    at = next(i for i in range(8, 40) if free.text[i : i + 4] and free.text.index(free.text[i : i + 4]) == i)
    stop = free.text[at : at + 4]
    run = made.generate([prompt(30)], max_new_tokens=60, ignore_eos=True, stop=stop)[0]
    assert run.text == free.text[:at] and run.finish == "stop"
    assert run.token_ids == free.token_ids[: len(run.token_ids)] and stop in TOKENIZER.decode(run.token_ids)
    assert len(run.token_ids) < 60


def test_eos(engine, monkeypatch):
    made = engine()
    free = made.generate([prompt(30)], max_new_tokens=30, ignore_eos=True)[0].token_ids
    end = free[12]
    first = free.index(end)
    monkeypatch.setattr(TOKENIZER, "eos_ids", (end,))
    run = made.generate([prompt(30)], max_new_tokens=30)[0]
    assert run.token_ids == free[:first] and run.finish == "stop"
    assert run.text == TOKENIZER.decode(free[:first]), "the end token is no text"
    assert made.generate([prompt(30)], max_new_tokens=30, ignore_eos=True)[0].token_ids == free


def test_errors_of_a_stream_are_raised_where_it_is_read(engine):
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(engine().stream("river", max_new_tokens=0))

    def broken(on_text):
        on_text(0, "a")
        raise OSError("gone")

    pieces = stream_pieces(broken)
    assert next(pieces) == "a"
    with pytest.raises(OSError, match="gone"):
        next(pieces)

"""Packing loses nothing and never exceeds the span; readers give entries and name what they cannot read."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.bank.corpus import CorpusError, pack, read_corpus
from memory3.data import Entry


def words(text):
    return [hash(w) & 0xFFFF for w in text.split()]


def characters(text):
    return [ord(c) for c in text]


def pieces(text):
    """As BPE does: tokens of up to 3 characters inside words, spaces joined to the word that follows."""
    return [hash(p) & 0xFFFF for w in re.findall(r"\s*\S+|\s+", text) for p in re.findall(r".{1,3}", w, re.S)]


PROSE = st.lists(
    st.text("ab.!? \n\t\u3002é\U0001f600", min_size=1, max_size=12) | st.just("Aaa bbb. ") | st.just("x" * 70),
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(PROSE, st.sampled_from([words, characters, pieces]), st.integers(24, 60), st.text("Ti t", max_size=40))
def test_nothing_is_lost_and_nothing_is_too_long(text, encode, span, title):
    chunks = pack(Entry(title, text, "s"), encode, span)
    place = 0
    for i, chunk in enumerate(chunks):
        assert 1 <= len(chunk.token_ids) <= span and chunk.token_ids == encode(chunk.text)
        assert text[place : chunk.start].strip() == "" and chunk.start >= place
        body = text[chunk.start : chunk.end]
        assert body.strip() and chunk.text.endswith(body)
        prefix = chunk.text[: -len(body)]
        assert prefix == "" or (i > 0 and prefix.endswith(": ") and title.split() != [])
        place = chunk.end
    assert text[place:].strip() == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(24, 40))
def test_sentences_stay_whole_and_references_are_full(sizes, span):
    """With sentences that fit, each reference takes as many as fit: greedy."""
    sentences = [" ".join(f"w{i}x{j}" for j in range(size)) + "." for i, size in enumerate(sizes)]
    chunks = pack(Entry("T", " ".join(sentences)), words, span)
    got = [re.findall(r"[^.]+\.", c.text.removeprefix("T: ") if i else c.text) for i, c in enumerate(chunks)]
    assert [s.strip() for line in got for s in line] == sentences
    n = 0
    for chunk, line in zip(chunks, got, strict=True):
        n += len(line)
        if n < len(sentences):
            assert len(chunk.token_ids) + sizes[n] > span


def test_title_goes_before_every_reference_but_the_first():
    text = " ".join(f"Sentence {i} has exactly six words." for i in range(12))
    chunks = pack(Entry("A  title", text), words, 24)
    assert len(chunks) > 2 and chunks[0].text.startswith("Sentence 0")
    assert all(c.text.startswith("A title: Sentence") for c in chunks[1:]) and chunks[1].title == "A  title"


def test_a_long_title_is_cut_to_a_quarter_of_the_span():
    chunks = pack(Entry(" ".join(["word"] * 100), "Some text here. " * 40), words, 20)
    assert all(c.text.count("word") <= 5 for c in chunks) and len(chunks) > 1


def test_long_sentences_are_cut_between_words_and_long_words_between_characters():
    chunks = pack(Entry("", "alpha beta gamma " * 10), words, 8)
    assert all(set(c.text.split()) <= {"alpha", "beta", "gamma"} for c in chunks)
    assert "".join(c.text for c in pack(Entry("", "z" * 1000), characters, 7)) == "z" * 1000
    assert pack(Entry("t", " \n\t "), words) == []


def test_no_room_is_an_error():
    with pytest.raises(ValueError, match="single character"):
        pack(Entry("", "ab"), lambda text: [0] * 50, 16)
    with pytest.raises(ValueError, match="span"):
        pack(Entry("", "ab"), words, 0)


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "One.", "title": "T"}\n\n{"text": "Two.", "source": "s", "more": 1}\n{"text": " "}\n')
    assert list(read_corpus(file)) == [Entry("T", "One.", "a.jsonl"), Entry("", "Two.", "s")]
    for line, message in (("{", "line 2: not JSON"), ('{"title": "x"}', 'line 2: expected.*"text"'), ("[1]", "line 2")):
        file.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(CorpusError, match=rf"a\.jsonl, {message}"):
            list(read_corpus(file))


def test_markdown(tmp_path):
    (tmp_path / "doc.md").write_text(
        "intro\n\n# One #\nfirst\n## Two\nsecond\n```sh\n# no heading\n```\n# Three\n\n## Four\n~~~\n``` \n~~~\nlast\n"
    )
    entries = [(e.title, e.text) for e in read_corpus(tmp_path / "doc.md")]
    assert entries == [
        ("doc", "intro"),
        ("One", "first"),
        ("One - Two", "second\n```sh\n# no heading\n```"),
        ("Three - Four", "~~~\n``` \n~~~\nlast"),
    ]


def test_folder_and_errors(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("Plain text.")
    (tmp_path / "a.MD").write_text("# H\nbody")
    (tmp_path / "c.png").write_bytes(b"\x89")
    (tmp_path / "empty.txt").write_text("\n")
    assert [(e.title, e.text, e.source) for e in read_corpus(tmp_path)] == [
        ("H", "body", "a.MD"), ("b", "Plain text.", "b.txt")
    ]  # fmt: skip
    with pytest.raises(CorpusError, match=r"c\.png: expected a file ending"):
        list(read_corpus(tmp_path / "c.png"))
    with pytest.raises(CorpusError, match="cannot read"):
        list(read_corpus(tmp_path / "none.txt"))
    (tmp_path / "d.txt").write_bytes(b"ok \xff")
    with pytest.raises(CorpusError, match=r"d\.txt is not UTF-8 \(byte 3\)"):
        list(read_corpus(tmp_path / "d.txt"))
    (tmp_path / "void").mkdir()
    with pytest.raises(CorpusError, match="no corpus file"):
        list(read_corpus(tmp_path / "void"))

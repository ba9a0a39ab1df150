"""Hugging Face folders: weights, configuration variants, tokenizers and chat templates, and refusals."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from memory3 import ContextFull, load_model
from memory3.model.hf import HFCheckpoint

from .common import cu, rel

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<u>{% endif %}"
)


def save_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<u>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>", "<u>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def save(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(shards=False, **change):
        shape = dict(
            vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
            tie_word_embeddings=False, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **change})).eval()
        model.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "5GB")
        save_tokenizer(tmp_path)
        return model, tmp_path

    return make


def rewrite_config(folder, **change):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.update({k: v for k, v in change.items() if v is not None})
    for key in [k for k, v in change.items() if v is None]:
        raw.pop(key, None)
    path.write_text(json.dumps(raw))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5000.0,
}


@pytest.mark.parametrize(
    ("shards", "change"),
    [
        (False, {}),
        (True, {}),
        (False, {"tie_word_embeddings": True}),
        (True, {"rope_parameters": LLAMA3}),
        (
            False,
            {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        ),
    ],
)
def test_logits_agree_with_transformers(save, shards, change):
    reference, folder = save(shards, **change)
    assert (folder / "model.safetensors.index.json").exists() == shards
    model = load_model(folder, dtype=torch.float32)
    tokens = torch.randint(3, 300, (150,))
    with torch.no_grad():
        want = reference(tokens[None]).logits[0]
        assert rel(model.net(tokens, cu(150)), want) < 1e-5
    assert model.config.tied == reference.config.tie_word_embeddings
    assert sum(p.numel() for p in model.net.parameters()) == sum(p.numel() for p in reference.parameters())


def test_older_config_spelling(save):
    reference, folder = save(rope_parameters=LLAMA3)
    tokens = torch.randint(3, 300, (100,))
    with torch.no_grad():
        want = reference(tokens[None]).logits[0]
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    rewrite_config(folder, rope_parameters=None, rope_scaling=scaling, rope_theta=5000.0, head_dim=None)
    rewrite_config(folder, head_dim=16)
    model = load_model(folder, dtype=torch.float32)
    assert rel(model.net(tokens, cu(100)), want) < 1e-5


def test_tokenizer_template_and_default_memory(save):
    _, folder = save()
    model = load_model(folder, dtype=torch.float32)
    tokenizer = model.tokenizer
    assert tokenizer.bos_id == 0 and tokenizer.eos_ids == (1,)
    assert tokenizer.encode("<s>", special=True) == [0] and len(tokenizer.encode("<s>")) == 3
    assert model.memory.prefix_ids[0] == 0 and model.memory.context_bos_ids == (0,)
    assert tokenizer.decode(model.memory.prefix_ids[1:]) == "Reference:"
    ids = model.prompt_ids([{"role": "user", "content": " hi "}])
    assert tokenizer.decode(ids) == "<s><u>hi</s><u>" and ids.count(0) == 1
    assert model.prompt_ids("hi")[0] == 0
    memory = model.write("A reference of a few words.")
    assert isinstance(model.generate("A ref", memories=[memory], max_new_tokens=5), str)


def test_generation_slides_when_asked(save):
    """Prompt and new tokens together exceed the context several times over."""
    _, folder = save()
    model = load_model(folder, dtype=torch.float32)
    memory = model.write("A reference of a few words.")
    prompt = "word " * 80  # 400 tokens; 256 positions, of which memories keep 64
    with pytest.raises(ContextFull, match="400|401"):
        model.generate(prompt, memories=[memory], max_new_tokens=4)
    for memories in ([], [memory]):
        count = []
        model.generate(
            prompt, memories, max_new_tokens=150, overflow="slide", on_token=count.append, temperature=1, seed=0
        )
        assert 0 < len(count) <= 150


def test_same_weights_same_identity(save, tmp_path):
    _, folder = save()
    one, two = load_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.float32)
    assert one.identity() == two.identity()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = load_model(folder, dtype=torch.float32).identity()
    assert [name for name, _, _ in one.identity().mismatches(changed)] == ["model_hash"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "only LlamaForCausalLM is supported"),
        ({"attention_bias": True}, "attention_bias=true; biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling type must be one of"),
        ({"hidden_size": 64}, r"embed_tokens.weight must be \(300, 64\).*got \(300, 48\)"),
    ],
)
def test_unsupported_folders_are_refused(save, change, message):
    _, folder = save()
    rewrite_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_missing_files_are_named(save, tmp_path):
    with pytest.raises(FileNotFoundError, match="preset .*, a .gguf file or a folder"):
        load_model("no-such-thing")
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        load_model(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="shape without weights"):
        load_model("paper-2.4b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_model(tmp_path / "empty")
    _, folder = save(shards=True)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_model(folder)


def test_missing_tensor_is_named(save):
    _, folder = save()
    with pytest.raises(KeyError, match="no tensor model.layers.9"):
        HFCheckpoint(folder).tensor("model.layers.9.mlp.up_proj.weight")


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="not a readable GGUF"):
        load_model(path)

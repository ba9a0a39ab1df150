"""GGUF files written here: storage types, untied heads, RoPE scaling, and refusals."""

import gguf
import numpy as np
import pytest
import torch

from memory3 import load_model
from memory3.model.gguf import GGUFCheckpoint, unpermute

from .common import cu, rel

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(weight, heads):
    """llama.cpp's convert script: rotate-half rows to interleaved pairs."""
    out, inner = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inner).swapaxes(1, 2).reshape(out, inner)


@pytest.fixture
def save(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(kind=gguf.GGMLQuantizationType.F32, tied=False, architecture="llama", tokenizer="gpt2", scaling=None):
        rope = {"rope_type": "default", "rope_theta": 5000.0}
        if scaling:
            rope = {"rope_type": "linear", "factor": scaling, "rope_theta": 5000.0}
        config = LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2,
            rope_parameters=rope, rms_norm_eps=1e-5,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_rope_freq_base(5000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        if scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling)
        alphabet = (
            [chr(c) for c in range(0x100, 0x144)] + [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)]
        )
        alphabet += [chr(c) for c in range(174, 256)]
        tokens = ["<s>", "</s>", *alphabet, "ab", "abc"]
        writer.add_tokenizer_model(tokenizer)
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["a b", "ab c"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for name, weight in model.state_dict().items():
            array = weight.numpy().astype(np.float32)
            if name == "lm_head.weight":
                if tied:
                    continue
                target = "output.weight"
            elif name in ("model.embed_tokens.weight", "model.norm.weight"):
                target = {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
            else:
                _, _, layer, rest = name.split(".", 3)
                target = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
            if "q_proj" in name:
                array = permute(array, 4)
            if "k_proj" in name:
                array = permute(array, 2)
            stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
            packed = gguf.quants.quantize(np.ascontiguousarray(array), stored)
            writer.add_tensor(target, packed, raw_dtype=stored)
            if stored != gguf.GGMLQuantizationType.F32:  # the reference computes with what the file can hold
                plain = gguf.quants.quantize(weight.numpy().astype(np.float32), stored)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(plain, stored).copy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model, path

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"scaling": 4.0},
        {"kind": gguf.GGMLQuantizationType.F16},
        {"kind": gguf.GGMLQuantizationType.BF16},
        {"kind": gguf.GGMLQuantizationType.Q8_0},
    ],
)
def test_logits_agree_with_transformers(save, options):
    reference, path = save(**options)
    model = load_model(path, dtype=torch.float32)
    tokens = torch.randint(2, 260, (100,))
    with torch.no_grad():
        want = reference(tokens[None]).logits[0]
    assert rel(model.net(tokens, cu(100)), want) < 1e-5
    assert model.config.tied == bool(options.get("tied")) and model.config.norm_eps == 1e-5


def test_tokenizer_from_metadata(save):
    _, path = save()
    tokenizer = GGUFCheckpoint(path).tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcab a")] == ["abc", "ab", " ", "a"]
    assert tokenizer.encode("<s>", special=True) == [0] and 0 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("é\n東")) == "é\n東"
    assert tokenizer.bos_id == 0 and tokenizer.eos_ids == (1,)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_unpermute_inverts_the_interleaving():
    weight = torch.arange(4 * 16 * 3).view(64, 3).float()
    assert torch.equal(unpermute(torch.from_numpy(permute(weight.numpy(), 4).copy()), 4), weight)
    assert unpermute(weight, 4)[1].tolist() == weight[2].tolist()


def test_other_architectures_and_tokenizers_are_refused(save):
    _, path = save(architecture="qwen2")
    with pytest.raises(ValueError, match="architecture 'qwen2'; only 'llama'"):
        load_model(path)
    _, path = save(tokenizer="llama")
    with pytest.raises(ValueError, match="tokenizer 'llama' .* use the checkpoint's safetensors|tokenizer 'llama'"):
        load_model(path)


def test_missing_tensor_is_named(save):
    _, path = save()
    with pytest.raises(KeyError, match=r"no tensor blk\.5\.ffn_up\.weight"):
        GGUFCheckpoint(path).tensor("model.layers.5.mlp.up_proj.weight")

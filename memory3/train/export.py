"""Trained weights as other programs read them: a Hugging Face folder, or an adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..model.hf import MEMORY_FILE
from ..model.llama import Llama
from ..model.tokenizer import Tokenizer


def hf_tensors(net: Llama) -> dict[str, Tensor]:
    """The weights under their Hugging Face names, fused maps taken apart."""
    config = net.config
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    out = {"model.embed_tokens.weight": net.embed, "model.norm.weight": net.norm.weight}
    if not config.tied:
        out["lm_head.weight"] = net.head.weight
    for i, block in enumerate(net.blocks):
        at = f"model.layers.{i}."
        heads = block.qkv.weight.split([q, kv, kv])
        out.update({f"{at}self_attn.{n}_proj.weight": w for n, w in zip("qkv", heads, strict=True)})
        gate, up = block.gate_up.weight.chunk(2)
        out |= {
            f"{at}self_attn.o_proj.weight": block.out.weight,
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": block.down.weight,
            f"{at}input_layernorm.weight": block.attn_norm.weight,
            f"{at}post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    return out


def hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    """config.json of a LlamaForCausalLM."""
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "torch_dtype": "bfloat16",
    }


def save_model(folder: Path, net: Llama, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a folder that `load_model` and transformers read; memory3.json in it holds the memory configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: w.detach().to("cpu", dtype).contiguous().clone() for n, w in hf_tensors(net).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(net.config, tokenizer), indent=1), encoding="utf-8")
    tokenizer.save(folder)
    if net.memory is not None:
        (folder / MEMORY_FILE).write_text(json.dumps(dataclasses.asdict(net.memory), indent=1), encoding="utf-8")

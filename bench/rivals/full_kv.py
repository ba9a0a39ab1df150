"""Full key-values of references, computed ahead and kept on disk (TurboRAG, arXiv 2410.07590, without its fine-tuning).

It is explicit memory with nothing left out: every token, head and layer of a reference, each reference on its own, read
in place from the arena by the same kernels. Retrieved once per request, as TurboRAG does.
"""

from __future__ import annotations

from dataclasses import replace

from memory3.model.load import MemoryModel


def full_kv_model(model: MemoryModel) -> MemoryModel:
    """The same weights, with records that hold all `span` tokens of all layers and heads."""
    memory = replace(
        model.memory, layers=tuple(range(model.config.n_layers)), head_map=None, tokens=model.memory.span,
    )  # fmt: skip
    return MemoryModel(model.net.with_memory(memory), model.tokenizer, model.model_hash)


def retrieving_once(model: MemoryModel) -> MemoryModel:
    """The same weights and records; the whole prompt is the only query, generated tokens change nothing."""
    memory = replace(model.memory, chunk=model.config.max_context)
    return MemoryModel(model.net.with_memory(memory), model.tokenizer, model.model_hash)

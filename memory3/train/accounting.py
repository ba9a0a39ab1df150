"""What a run asks of a machine: weights, memory per GPU, floating-point operations per step, expected tokens/s.

The counts follow Memory3, arXiv 2407.01178, appendix A: 6 operations per weight and token (forward 2, backward 4), 8
with recomputed activations, and 12 per attended pair, head dimension and head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig
from .config import TrainConfig

H100_FLOPS = 989e12  # dense bf16, H100 SXM datasheet
UTILISATION = 0.4  # of the peak; what well-tuned trainers of this size reach


@dataclass(frozen=True)
class Account:
    """Per step over all GPUs unless said otherwise; bytes and operations.

    weights, embedding   parameters; trained: of them with optimizer state
    state_bytes          fp32 weight, gradient and two moments of each trained parameter, bf16 or fp32 of the others
    activation_bytes     of one micro-batch
    text_tokens, reference_tokens, flops
    """

    name: str
    weights: int
    embedding: int
    state_bytes: int
    activation_bytes: int
    text_tokens: int
    reference_tokens: int
    flops: float

    def text(self, gpus: int = 64) -> str:
        """A few lines for a reader; tokens/s for `gpus` H100 at UTILISATION of their peak."""
        seconds = self.flops / (gpus * H100_FLOPS * UTILISATION)
        return "\n".join(
            (
                f"{self.name}: {self.weights / 1e9:.3f} G weights in the blocks, {self.embedding / 1e9:.3f} G in "
                "embedding and head",
                f"per step: {self.text_tokens:,} text tokens, {self.reference_tokens:,} reference tokens, "
                f"{self.flops:.3g} operations",
                f"per GPU: {self.state_bytes / 2**30:.1f} GiB of weights and optimizer state, "
                f"{self.activation_bytes / 2**30:.1f} GiB of activations per micro-batch",
                f"{gpus} H100 at {UTILISATION:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s would take {seconds:.2f} s per "
                f"step, {self.text_tokens / seconds:,.0f} text tokens/s (computed, not measured)",
            )
        )


def account(config: TrainConfig) -> Account:
    """Counts of a configuration; a checkpoint's shape is its preset's. Raises ValueError for an unknown shape."""
    model, memory_layers = _shape(config)
    length = config.length
    chunks = -(-length // 64)
    with_memory = config.stage != "warmup" and config.read == "memory"
    references = 128 * chunks if with_memory and config.write == "live" else 0
    per_layer = (model.non_embedding_parameters - model.dim) / model.n_layers
    head = model.vocab_size * model.dim
    factor = 8 if config.checkpointing else 6
    pairs = 2 * factor * model.n_heads * model.head_dim
    text = model.n_layers * (factor * per_layer * length + pairs * length**2 / 2) + 6 * head * length
    if with_memory:
        text += memory_layers * pairs * length * 5 * config.memory.get("tokens", 8)
    depth = max(config.memory.get("layers", range(memory_layers))) + 1 if references else 0
    write = depth * (factor * per_layer * references + pairs * references * 128 / 2)
    embedding = head * (1 if model.tied else 2)
    weights = model.non_embedding_parameters
    trained = weights + embedding
    state = 16 * trained
    if config.lora is not None:
        trained = _lora_weights(model, config)
        state = 16 * trained + 2 * (weights + embedding)
    rows = config.micro_batch * (length + references)
    kept = 2 * model.dim if config.checkpointing else 34 * model.dim
    activations = rows * (model.n_layers * kept + 34 * model.dim) + 4 * 3 * 512 * model.vocab_size
    return Account(
        f"{config.name} {config.stage}", weights, embedding, state, activations, config.batch * length,
        config.batch * references, config.batch * (text + write),
    )  # fmt: skip


def _shape(config: TrainConfig) -> tuple[ModelConfig, int]:
    from ..config import PRESETS

    if config.shape is not None:
        model = config.shape
    elif config.model in PRESETS:
        model = PRESETS[config.model].model
    else:
        raise ValueError(f"model: the shape of {config.model!r} is not known before it is loaded; use a preset")
    return model, len(config.memory.get("layers", range(model.n_layers)))


def _lora_weights(model: ModelConfig, config: TrainConfig) -> int:
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    sizes = {
        "qkv": model.dim + heads,
        "out": model.n_heads * model.head_dim + model.dim,
        "gate_up": model.dim + 2 * model.ffn_dim,
        "down": model.ffn_dim + model.dim,
    }
    return model.n_layers * config.lora.rank * sum(sizes[t] for t in config.lora.targets)

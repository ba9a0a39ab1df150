"""From a configuration and texts to everything a Trainer needs: model, memories, sequences, evaluation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import MemoryConfig
from ..data import Entry
from ..embed import SupportsEncode, as_embedder
from ..memory import Memory
from ..model.llama import Llama
from ..model.load import MemoryModel, load_model
from ..model.tokenizer import Tokenizer
from .batch import Sample
from .config import TrainConfig
from .holdout import Decontaminator, in_split
from .lora import add_lora
from .objective import Load, Objective
from .parallel import World
from .prepared import PLAIN_LENGTH, Prepared, collect
from .progress import left
from .qa import Item, QuestionSource, Reader, Retriever, ask_about
from .resident import Resident, Through
from .text import ChunkedSource, TextSource, cut_sequences, retrieve_for_chunks, token_stream
from .tokenizer import train_tokenizer
from .trainer import Evaluate, Source, micro_batches

if TYPE_CHECKING:
    from ..bank import Bank

Notify = Callable[[str], None]


@dataclass
class Run:
    """What a Trainer takes, and the model with its tokenizer for the export."""

    model: MemoryModel
    objective: Objective
    source: Source
    evaluate: Evaluate
    bank: Bank | None = None

    def close(self) -> None:
        """Let go of the bank."""
        if self.bank is not None:
            self.bank.close()


def prepare(
    config: TrainConfig,
    out: Path,
    texts: Iterable[Entry] = (),
    *,
    references: Iterable[Entry] = (),
    bank: Path | None = None,
    exclude: Iterable[str] = (),
    embedder: SupportsEncode | None = None,
    world: World | None = None,
    notify: Notify | None = None,
) -> Run:
    """Everything of a run, made on the spot or found in `out`.

    texts       to pretrain on (warmup, continual), or plain text among the questions (sft with config.plain); those of
                the "dev" split are the evaluation
    references  what a bank in OUT/bank is made of where `bank` names none; frozen memories are written when they are
                first read, and kept in the bank by a run of one process
    exclude     evaluation texts: what shares a 13-gram with them is not trained on
    Raises ValueError naming what is missing.
    """
    world, notify = world or World(), notify or (lambda what: None)
    guard = Decontaminator(exclude)
    texts, references = list(guard.clean(texts)), list(guard.clean(references))
    if config.stage != "sft" and not texts:
        raise ValueError(f"stage {config.stage}: expected texts to train on, got none")
    notify("loading the model")
    model = base_model(config, out, [e.text for e in texts] or [e.text for e in references])
    opened, encoder = None, None
    if config.stage == "sft" or (config.stage == "continual" and config.read == "memory"):
        encoder = as_embedder(embedder)
        opened = _bank(config, out, model, encoder, references, bank, world, notify)
    objective = _objective(config, model, opened, world)
    if config.stage == "sft":
        notify("making questions about the references")
        source, evaluate = _questions(config, model, opened, encoder, guard, objective, texts)
    else:
        notify("cutting the text and looking up its references")
        source, evaluate = _text(config, out, model, opened, encoder, texts, objective)
    return Run(model, objective, source, evaluate, opened)


def prepare_file(
    config: TrainConfig,
    file: Path,
    texts: Iterable[Entry] = (),
    *,
    references: Iterable[Entry] = (),
    bank: Path | None = None,
    exclude: Iterable[str] = (),
    questions: int | None = None,
    rounds: int = 1,
    embedder: SupportsEncode | None = None,
    notify: Notify | None = None,
) -> Prepared:
    """Write the data of a tuning run into `file` (memory3.train.prepared); nothing is trained and no memory written.

    bank: of references; where there is none, one without memories is made beside the file. questions: at most so many
    to train on, drawn by config.seed; rounds: how often each reference is asked about. Other arguments as `prepare`
    takes them.
    """
    notify = notify or (lambda what: None)
    guard = Decontaminator(exclude)
    texts, references = list(guard.clean(texts)), list(guard.clean(references))
    model = base_model(config, file.parent, [e.text for e in references])
    encoder = as_embedder(embedder)
    opened = _bank(replace(config, write="live"), file.parent, model, encoder, references, bank, World(), notify)
    try:
        notify("making questions about the references")
        asked = ask_about(opened, model.tokenizer, model.memory, guard, config.seed, rounds)
        notify(f"looking up references for {len(asked.items['train'])} questions")
        plain, plain_dev = (_plain(config, texts, split, model.tokenizer) for split in ("train", "dev"))
        found = collect(
            opened, asked, Retriever(opened, encoder, model.tokenizer.decode, keep=1 << 30), model.tokenizer,
            model.memory, plain, plain_dev, train_items=questions, dev_items=config.eval_items, seed=config.seed,
        )  # fmt: skip
    finally:
        opened.close()
    found.save(file)
    return found


def from_prepared(
    config: TrainConfig, prepared: Prepared, *, world: World | None = None, notify: Notify | None = None
) -> Run:
    """A tuning run on prepared data. Frozen memories are written now, by the base weights, and stay on the device.

    Raises ValueError for another stage, or data that do not fit the configuration.
    """
    world, notify = world or World(), notify or (lambda what: None)
    if config.stage != "sft":
        raise ValueError(f"stage {config.stage}: prepared data are for sft")
    notify("loading the model")
    model = base_model(config, Path(), [])
    prepared.check(model.tokenizer, model.memory)
    net = model.net.to(world.device)
    resident = None
    if config.write == "frozen" and (config.read == "memory" or "memory" in config.evaluated):
        count = len(prepared.references)
        notify(f"writing {count} memories")
        resident = Resident.write(net, prepared.references, _through(config), left(notify, "memories", count))
    net = add_lora(net, config.lora) if config.lora is not None else net.requires_grad_(True)
    objective = Objective(net, tokens=prepared.references.__getitem__, resident=resident)
    reader = Reader(model.memory, prepared.references.__getitem__)
    coded = None if resident is None else resident.coded
    source = QuestionSource(
        prepared.items["train"], reader, config, set(prepared.train), list, prepared.plain, coded
    )  # fmt: skip
    dev = prepared.items["dev"][: config.eval_items]
    evaluate = _evaluation(config, objective, reader, dev, source.records, prepared.plain_dev, coded)
    return Run(model, objective, source, evaluate)


def _through(config: TrainConfig) -> Through | None:
    """The codebooks' round trip, where the run reads quantised memories."""
    if config.codec is None:
        return None
    from ..bank.codec import Codec
    from ..eval.quantise import through

    return partial(through, Codec.from_bytes(Path(config.codec).read_bytes()))


def base_model(config: TrainConfig, out: Path, texts: Sequence[str]) -> MemoryModel:
    """The checkpoint (with `config.memory` in place of its own fields), or a new model and its vocabulary."""
    if config.model is not None:
        low = config.lora is not None and config.precision == "bf16"
        loaded = load_model(config.model, torch.bfloat16 if low else torch.float32, weights="dense")
        return MemoryModel(
            loaded.net.with_memory(replace(loaded.memory, **config.memory)), loaded.tokenizer, loaded.model_hash
        )
    folder = out / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(folder)
    else:
        tokenizer = train_tokenizer(texts, config.shape.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    bos = (tokenizer.bos_id,)
    fields = {"prefix_ids": (*bos, *tokenizer.encode("Reference:")), "context_bos_ids": bos, **config.memory}
    net = Llama(config.shape, MemoryConfig(**fields)).init_weights(config.seed)
    return MemoryModel(net, tokenizer, f"scratch-{config.seed}")


def _bank(
    config, out, model, encoder, references: list[Entry], path: Path | None, world: World, notify: Notify
) -> Bank:
    from ..bank import Bank
    from ..bank.build import build_bank

    cold = config.write == "live"  # then only its text is used
    if path is None:
        if not references:
            raise ValueError("bank: a run that reads memories needs a bank, or references to make one of")
        path = out / "bank"
        notify("writing references into a bank")
        build_bank(path, references, model, encoder, cold=True)
    bank = Bank.open(path, write=not cold and world.size == 1)
    wanted = model.identity(embedder=encoder.name)
    if cold:
        wanted = replace(bank.identity, tokenizer_hash=wanted.tokenizer_hash, embedder=encoder.name)
    bank.check(replace(wanted, dtype=bank.identity.dtype))
    return bank


def _objective(config: TrainConfig, model: MemoryModel, bank: Bank | None, world: World) -> Objective:
    load = _frozen(config, model, bank) if bank is not None and config.write == "frozen" else None
    net = model.net.to(world.device)
    net = add_lora(net, config.lora) if config.lora is not None else net.requires_grad_(True)
    if load is not None:
        return Objective(net, load=load)
    return Objective(net, tokens=None if bank is None else bank.token_ids)


def _frozen(config: TrainConfig, model: MemoryModel, bank: Bank) -> Load:
    """Reads records from the bank; those that are not there yet are written by the weights as they are now."""
    shared = {id(p): p for p in model.net.parameters()} if config.lora is not None else None  # LoRA leaves them alone
    writer = MemoryModel(copy.deepcopy(model.net, shared), model.tokenizer, model.model_hash)
    shape, dtype = model.memory.record_shape(model.config), getattr(torch, bank.identity.dtype)

    def write(references: list[list[int]]) -> list[Memory]:
        return [replace(memory, kv=memory.kv.to(dtype)) for memory in writer.write_ids(references)]

    def load(ids: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        kv, length = torch.zeros((len(ids), *shape), dtype=dtype), torch.zeros(len(ids), dtype=torch.int32)
        with torch.no_grad(), torch.autocast(model.net.embed.device.type, enabled=False):
            bank.ensure(ids, write)
        bank.read_into(ids, kv, length, list(range(len(ids))))
        return kv, length

    return load


def _questions(config, model, bank, encoder, guard, objective, texts: list[Entry]) -> tuple[Source, Evaluate]:
    asked = ask_about(bank, model.tokenizer, model.memory, guard, config.seed)
    retriever = Retriever(bank, encoder, model.tokenizer.decode)
    dev = list(asked.items["dev"])
    random.Random(f"evaluation {config.seed}").shuffle(dev)
    dev = retriever(dev[: config.eval_items])
    reader = Reader(model.memory, bank.token_ids)
    allowed = {record for record, split in asked.split.items() if split == "train"}
    plain, plain_dev = (_plain(config, texts, split, model.tokenizer) for split in ("train", "dev"))
    source = QuestionSource(asked.items["train"], reader, config, allowed, retriever, plain)
    return source, _evaluation(config, objective, reader, dev, source.records, plain_dev, None)


def _plain(config: TrainConfig, texts: Iterable[Entry], split: str, tokenizer: Tokenizer) -> np.ndarray:
    stream = token_stream((e.text for e in in_split(texts, split)), tokenizer, config.seed)
    if len(stream) < PLAIN_LENGTH:
        return np.empty((0, PLAIN_LENGTH), np.int32)
    return cut_sequences(stream, PLAIN_LENGTH)


def _evaluation(
    config: TrainConfig,
    objective: Objective,
    reader: Reader,
    dev: Sequence[Item],
    records: Sequence,
    plain: np.ndarray,
    coded: int | None,
) -> Evaluate:
    """Loss of held-out questions, by what config.evaluated says they read, and of held-out plain text."""
    if not dev:
        raise ValueError("bank: none of its titles falls into the dev split; give a larger one")
    refs, rng = reader.memory.refs, random.Random(f"evaluation {config.seed}")
    drawn = [rng.sample(records, min(refs, len(records))) for _ in dev]
    if "plain" in config.evaluated and not len(plain):
        raise ValueError("eval_reads: plain text is evaluated where there are texts of the dev split; give texts")

    def samples(read: str) -> list[Sample]:
        if read == "plain":
            return [reader.plain(tokens) for tokens in plain[: config.eval_items]]
        if read == "random":
            return [reader.sample(item, "memory", reads) for item, reads in zip(dev, drawn, strict=True)]
        if read == "quantised":
            if coded is None:
                raise ValueError("eval_reads: quantised memories are read in prepared runs with a codec")
            return [reader.sample(item, "memory", [r + coded for r in item.found[:refs]]) for item in dev]
        return [reader.sample(item, read, item.found[:refs]) for item in dev]

    made = {read: samples(read) for read in config.evaluated}

    def evaluate(net: Llama) -> dict[str, float]:
        return {read: mean_loss(objective, part, config.micro_batch) for read, part in made.items()}

    return evaluate


def _text(config, out, model, bank, encoder, texts: list[Entry], objective) -> tuple[Source, Evaluate]:
    tokenizer, memory = model.tokenizer, model.memory

    def source(split: str, limit: int | None = None) -> TextSource:
        stream = token_stream((e.text for e in in_split(texts, split)), tokenizer, config.seed)
        sequences = cut_sequences(stream, config.length)[:limit]
        if bank is None:
            return TextSource(sequences, config.batch, config.seed, memory.context_bos_ids)
        found = retrieve_for_chunks(
            sequences, memory.chunk, bank, encoder, tokenizer.decode, cache=out / "cache" / f"{split}.npz"
        )
        return ChunkedSource(sequences, config.batch, config.seed, memory, *found)

    train, dev = source("train"), source("dev", config.eval_items)

    def evaluate(net: Llama) -> dict[str, float]:
        samples = [dev.sample(i) for i in range(len(dev.sequences))]
        plain = [Sample(s.ids, s.first) for s in samples]
        found = {"none": mean_loss(objective, plain, config.micro_batch)}
        if bank is not None:
            found["memory"] = mean_loss(objective, samples, config.micro_batch)
        return found

    return train, evaluate


def mean_loss(objective: Objective, samples: Sequence[Sample], micro_batch: int) -> float:
    """Nats per predicted token over all samples."""
    device = objective.net.embed.device
    losses, count = [], 0
    for batch in micro_batches(samples, micro_batch):
        packed = objective.pack(batch)
        losses.append(objective(packed.to(device)))
        count += packed.predicted
    return sum(loss.item() for loss in losses) / count

"""lm-evaluation-harness (pip install lm-eval) runs our models as `memory3`, with and without memory.

    python -m memory3.eval.harness --tasks sciq openbookqa --bank my.bank
    python -m memory3.eval.harness --tasks sciq openbookqa                  (the same model without memory)

The tasks here take their data from the evaluation wheel (memory3.eval.sources), so nothing is fetched. Importing this
module registers the model; its arguments are those of `Memory3LM`. A question retrieves once, without its options: the
query is the last block of the context, and a request's own continuation is no part of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from ..bank import Bank
from ..embed import Embedder
from ..model.load import load_model
from ..train.batch import Piece, Sample
from . import sources
from .answer import Answerer, Loaded

BATCH = 16
QUERY_TOKENS = 64
LONGEST = 2048


@register_model("memory3")
class Memory3LM(TemplateLM):
    """A model of this library behind the harness's interface.

    pretrained   as load_model takes it; adapter: a folder, "shipped" or None
    bank         folder of a bank; None: no memory. It must have been written by the same model (load_model's identity)
    refs         memories per question, 5 unless the model says otherwise
    """

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        bank: str | None = None,
        adapter: str | None = None,
        refs: int | None = None,
        batch_size: int | str = BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        embedder: Any = None,
        model: Any = None,
    ) -> None:
        super().__init__()
        self.model = model or load_model(pretrained, torch.bfloat16, weights="dense", adapter=adapter)
        self.tokenizer = self.model.tokenizer
        self._answerer = Answerer(self.model.net, self.tokenizer)
        self._batch = int(batch_size) if str(batch_size).isdigit() else BATCH
        self._refs = self.model.memory.refs if refs is None else int(refs)
        self._found: dict[str, tuple[bytes, ...]] = {}
        self._bank = None
        if bank is not None:
            self._embedder = embedder or Embedder()
            self._bank = Bank.open(Path(bank), self.model.identity(embedder=self._embedder.name), write=True)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._look_up([context for (context, _), _, _ in requests])
        out: list[tuple[float, bool]] = []
        for part in _batches(requests, self._batch):
            samples = [self._sample(text[0], ids, wanted) for text, ids, wanted in part]
            out += [(-loss, greedy) for loss, greedy in self._answerer.scored(samples, self._load(samples))]
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in pieces of 2,048 tokens; never with memory: there is no question to retrieve for."""
        found = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            opening = self.model.memory.context_bos_ids or (self.eot_token_id,)
            samples = [Sample((*opening, *ids[i : i + LONGEST]), len(opening)) for i in range(0, len(ids), LONGEST)]
            found.append(-sum(loss for sample in samples for loss in self._answerer.losses([sample], None)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        self._look_up([request.args[0] for request in requests])
        out = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or ["\n"]
            sample = self._sample(context, self.tokenizer.encode(context), [self.eot_token_id])
            stop = [until] if isinstance(until, str) else list(until)
            tokens = int(options.get("max_gen_toks", 64))
            out += self._answerer.texts([sample], self._load([sample]), tokens, stop)
        return out

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _query(self, context: str) -> str:
        """The question: the last block of a context of examples, at most one chunk of it."""
        last = context.rstrip().rpartition("\n\n")[2]
        return self.tokenizer.decode(self.tokenizer.encode(last)[-QUERY_TOKENS:])

    def _look_up(self, contexts: Sequence[str]) -> None:
        new = list(dict.fromkeys(c for c in contexts if c.strip() and c not in self._found))
        if self._bank is None or not new:
            return
        rows, _ = self._bank.search(self._embedder.encode([self._query(c) for c in new]), self._refs)
        self._found.update(zip(new, map(tuple, rows), strict=True))

    def _sample(self, context: str, ids: Sequence[int], wanted: Sequence[int]) -> Sample:
        ids, opening = list(ids)[-(LONGEST - len(wanted)) :], self.model.memory.context_bos_ids
        whole = (*opening, *ids, *wanted)
        reads = () if self._bank is None else self._found.get(context, ())
        pieces = (Piece(len(whole), reads),) if self._bank is not None else ()
        return Sample(whole, len(opening) + len(ids), pieces)

    def _load(self, samples: Sequence[Sample]) -> Loaded | None:
        if self._bank is None:
            return None
        wanted = list(dict.fromkeys(r for s in samples for r in s.pieces[-1].reads))
        self._bank.ensure(wanted, self.model.write_ids)
        shape = self.model.memory.record_shape(self.model.config)
        kv = torch.zeros((len(wanted), *shape), dtype=self.model.dtype)
        length = torch.zeros(len(wanted), dtype=torch.int32)
        self._bank.read_into(wanted, kv, length, list(range(len(wanted))))
        return Loaded({r: i for i, r in enumerate(wanted)}, kv, length)


def _batches(requests: Sequence[Any], size: int):
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


# ---- tasks whose data a package ships --------------------------------------------------------------------------------

_CHOICES = {
    "sciq": ("hf_datasets/sciq/none/validation", "{{question}}",
             "{{[correct_answer, distractor1, distractor2, distractor3]}}", 0),
    "openbookqa": ("hf_datasets/openbookqa/main/validation", "{{question_stem}}", "{{choices.text}}",
                   "{{choices.label.index(answerKey.lstrip())}}"),
    "arc_easy": ("hf_datasets/ai2_arc/ARC-Easy/validation", "{{question}}", "{{choices.text}}",
                 "{{choices.label.index(answerKey)}}"),
}  # fmt: skip


def tasks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Task configurations of the harness: accuracy of multiple choice, zero-shot. Raises ValueError for others."""
    unknown = sorted(set(names) - set(_CHOICES))
    if unknown:
        raise ValueError(f"tasks: expected some of {', '.join(_CHOICES)}, got {unknown}")
    out = []
    for name in names:
        folder, question, choices, target = _CHOICES[name]

        def rows(folder: str = folder, **_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {"test": Dataset.from_list(sources.arrow_rows(folder))}

        out.append(
            {
                "task": f"memory3_{name}", "custom_dataset": rows, "output_type": "multiple_choice",
                "test_split": "test", "doc_to_text": f"Question: {question}\nAnswer:", "doc_to_choice": choices,
                "doc_to_target": target, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )  # fmt: skip
    return out


def run(names: Sequence[str], model: Memory3LM, limit: int | None = None) -> dict[str, Any]:
    """Results of the harness by task: {"memory3_sciq": {"acc,none": ..., "acc_stderr,none": ...}}."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(model=model, tasks=tasks(names), limit=limit, bootstrap_iters=0, log_samples=False)
    return found["results"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(_CHOICES))
    parser.add_argument("--bank")
    parser.add_argument("--adapter")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    print(json.dumps(run(given.tasks, Memory3LM(bank=given.bank, adapter=given.adapter), given.limit), indent=1))

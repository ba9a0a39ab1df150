"""Child processes of the crash tests: `python crash_child.py <what> <bank folder> ...`; prints READY when under way."""

import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from bank_fake import IDENTITY, FakeModel, HashEmbedder, fill, texts  # noqa: E402

from memory3.bank import Bank, BankError  # noqa: E402
from memory3.bank.build import build_bank  # noqa: E402
from memory3.data import Entry  # noqa: E402


def corpus(count):
    return [Entry(f"t{i}", text, "made up") for i, text in enumerate(texts(count))]


def main(what, path, *rest):
    if what == "build":
        count, delay = int(rest[0]), float(rest[1])
        print("READY", flush=True)
        report = build_bank(path, corpus(count), FakeModel(delay=delay), HashEmbedder(), batch=8, progress=False)
        print(report.references, report.written, report.present, flush=True)
    elif what == "hold":
        with Bank.open(path, write=True):
            print("READY", flush=True)
            time.sleep(60)
    elif what == "limited":  # a file size limit stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest[0]), int(rest[0])))
        print("READY", flush=True)
        fill(Bank.open(path, write=True), 5000, start=10_000)
    elif what == "write":
        with Bank.open(path, write=True) as bank:
            print("READY", flush=True)
            for start in range(int(rest[0]), int(rest[0]) + int(rest[1]), 25):
                fill(bank, 25, start=start)
            bank.compact()
            fill(bank, 25, start=900_000)
    elif what == "read":
        import torch

        print("READY", flush=True)
        until, rounds = time.monotonic() + float(rest[0]), 0
        with Bank.open(path, IDENTITY) as bank:
            kv = torch.empty(16, *bank.layout.kv_shape, dtype=torch.bfloat16)
            length = torch.empty(16, dtype=torch.int32)
            while time.monotonic() < until or rounds == 0:
                found, _ = bank.search(HashEmbedder().encode(texts(8, rounds)), 2)
                ids = [i for line in found for i in line]
                bank.read_into(ids, kv, length, range(len(ids)))
                for slot, memory in enumerate(bank.get(ids)):
                    if not torch.equal(kv[slot], memory.kv):
                        raise SystemExit("a slot differs from its record")
                rounds += 1
        print("rounds", rounds, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BankError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(3) from None

"""What the child processes of the crash tests do; `tell` sends a message to the test."""

import resource
import time

import torch
from bank_fake import IDENTITY, FakeModel, HashEmbedder, fill, texts

from memory3.bank import Bank, BankError
from memory3.bank.build import build_bank
from memory3.data import Entry


def corpus(count):
    return [Entry(f"t{i}", text, "made up") for i, text in enumerate(texts(count))]


def main(connection, what, path, *rest):
    tell = connection.send
    try:
        act(tell, what, path, *rest)
    except BankError as error:
        tell(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from None


def act(tell, what, path, *rest):
    if what == "build":
        count, delay = rest[0], rest[1]
        tell("READY")
        report = build_bank(path, corpus(count), FakeModel(delay=delay), HashEmbedder(), batch=8, progress=False)
        tell((report.references, report.written, report.present))
    elif what == "hold":
        with Bank.open(path, write=True):
            tell("READY")
            time.sleep(60)
    elif what == "limited":  # a file size limit stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (rest[0], rest[0]))
        tell("READY")
        fill(Bank.open(path, write=True), 5000, start=10_000)
    elif what == "write":
        with Bank.open(path, write=True) as bank:
            tell("READY")
            for start in range(rest[0], rest[0] + rest[1], 25):
                fill(bank, 25, start=start)
            bank.compact()
            fill(bank, 25, start=900_000)
    elif what == "read":
        tell("READY")
        until, rounds = time.monotonic() + rest[0], 0
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
        tell(rounds)

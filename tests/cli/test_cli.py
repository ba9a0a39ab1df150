"""The command line through real processes, on the demo model: exit codes, JSON, errors that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from memory3 import data

if data.missing():
    pytest.skip(f"demo packages are not installed: {data.install_command()}", allow_module_level=True)

TEXTS = [
    {"title": "Port Ambrel", "text": "The lighthouse of Port Ambrel was built in 1873 by the engineer Tomas Veld."},
    {"title": "Zaide", "text": "Zaide is an unfinished German-language opera, written by Mozart in 1780."},
    {"title": "Walrus", "text": "The walrus is a large marine mammal of the Arctic Ocean with long tusks."},
    {"title": "Gdansk", "text": "Gdansk is a city on the Baltic coast of northern Poland."},
    {"title": "Enzyme", "text": "An enzyme is a protein that speeds up a chemical reaction in a living thing."},
    {"title": "Tree shrew", "text": "Tree shrews are small mammals native to the forests of South Asia."},
]


def memory3(*args, input=None, code=0):
    """Runs the command; stdout. The exit code must be `code`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "120"}
    command = [sys.executable, "-m", "memory3", *map(str, args)]
    done = subprocess.run(command, input=input, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    report = json.loads(
        memory3("write", folder / "my.bank", folder / "texts.jsonl", "--layers", "4-29", "--tokens", 16, "--json")
    )
    assert report["references"] == report["written"] == len(TEXTS)
    return folder / "my.bank"


@pytest.mark.parametrize("command", ["write", "search", "generate", "chat", "inspect", "calibrate", "doctor", "demo"])
def test_help_has_examples(command):
    shown = memory3(command, "--help")
    assert "Examples" in shown and f"memory3 {command}" in shown


def test_version_and_no_arguments():
    assert memory3("--version").startswith("memory3 0.")
    assert "Commands" in memory3(code=2)


def test_writing_again_writes_nothing(bank):
    report = json.loads(memory3("write", bank, bank.parent / "texts.jsonl", "--json"))
    assert (report["written"], report["present"]) == (0, len(TEXTS))


def test_search_finds_the_reference(bank):
    found = json.loads(memory3("search", bank, "Who built the lighthouse?", "-k", 2, "--json"))["references"]
    assert len(found) == 2 and "Tomas Veld" in found[0]["text"] and found[0]["score"] > found[1]["score"]


def test_generate_reads_the_bank(bank):
    prompt = "Who built the lighthouse of Port Ambrel? The lighthouse of Port Ambrel was built in 1873 by the engineer"
    result = json.loads(memory3("generate", prompt, "--bank", bank, "-n", 4, "--json"))
    assert "Tomas" in result["text"]
    read = result["reads"][0]
    assert "Tomas Veld" in read["texts"][0] and len(read["ids"]) == 5 and 0 < sum(read["mass"]) < 1
    assert result["stats"]["retrievals"] == 1 and result["stats"]["bytes_loaded"] > 0
    plain = json.loads(memory3("generate", prompt, "-n", 4, "--json"))
    assert "Tomas" not in plain["text"] and plain["reads"] == []


def test_generate_for_people(bank):
    shown = memory3("generate", "-", "-b", bank, "-n", 3, "--reads", "--stats", input="What is Zaide? Zaide is")
    assert "memories read" in shown and "time to first token" in shown and "opera" in shown


def test_generate_with_texts_as_memory():
    prompt = "Who built the lighthouse of Port Ambrel? It was built by the engineer"
    assert "Tomas" in memory3("generate", prompt, "-n", 5, "--memory", TEXTS[0]["text"])


def test_chat_over_a_pipe(bank):
    shown = memory3("chat", "--bank", bank, "-n", 12, "--reads", input="What is a walrus?\n/stats\n/reset\nHi\n/quit\n")
    assert shown.count("memories read") == 2 and "retrievals" in shown and "walrus" in shown.lower()


def test_inspect(bank):
    stats = json.loads(memory3("inspect", bank, "--verify", "--json"))
    assert stats["broken"] == [] and str(len(TEXTS)) in json.dumps(stats)
    record = json.loads(memory3("search", bank, "walrus", "-k", 1, "--json"))["references"][0]["id"]
    shown = json.loads(memory3("inspect", bank, record[:8], "--layer", 3, "--json"))
    assert shown["id"] == record and shown["layer"] == 7
    assert [len(p) for p in shown["positions"]] == [16] * 3


def test_bank_commands(bank, tmp_path):
    assert str(len(TEXTS)) in memory3("bank", "export", bank, tmp_path / "copy.m3")
    memory3("bank", "import", tmp_path / "copy.m3", tmp_path / "copy.bank")
    record = json.loads(memory3("search", tmp_path / "copy.bank", "walrus", "-k", 1, "--json"))["references"][0]["id"]
    assert "deleted 1" in memory3("bank", "delete", tmp_path / "copy.bank", record[:10], "--yes")
    memory3("bank", "compact", tmp_path / "copy.bank")
    left = json.loads(memory3("search", tmp_path / "copy.bank", "walrus", "--json"))["references"]
    assert len(left) == 5 and record not in [r["id"] for r in left]
    memory3("bank", "salvage", tmp_path / "copy.bank", tmp_path / "saved.bank")
    assert "fits 0" in memory3("inspect", tmp_path / "saved.bank", record, code=1)


def test_calibrate(tmp_path):
    shown = memory3("calibrate", "wiki", "--tokens", 8, "--samples", 2)
    assert "answer loss" in shown and "memory3 write BANK SOURCES --layers" in shown


def test_doctor():
    report = json.loads(memory3("doctor", "--json"))
    assert report["native"]["reason"] is None and report["demo_packages_missing"] == []


@pytest.mark.parametrize(
    "args, message",
    [
        (["search", "{dir}/nothing", "x"], "no bank at"),
        (["write", "{dir}/b", "{dir}/missing.txt"], "no such file or folder"),
        (["write", "{dir}/b", "wiki", "--layers", "x"], "layers: expected numbers"),
        (["generate", "x", "--mode", "rag"], "needs a bank"),
        (["generate", "x", "--model", "{dir}/no.gguf"], "no.gguf"),
        (["inspect", "{bank}", "zz"], "fits 0"),
    ],
)
def test_errors_say_what_to_do(args, message, bank, tmp_path):
    shown = memory3(*(a.format(dir=tmp_path, bank=bank) for a in args), code=1)
    assert message in " ".join(shown.split())


def test_a_bank_of_another_model_is_refused(bank, tmp_path):
    """The same weights with other memory settings is another identity; the message names fields and both values."""
    code = (
        "from dataclasses import replace; from memory3 import load_model, Bank, Engine, MemoryModel\n"
        f"m = load_model('smollm2-135m'); b = Bank.open({str(bank)!r})\n"
        "Engine(m, b)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "IdentityMismatch" in done.stderr and "tokens: the bank has 16" in done.stderr


def test_profile_counts_every_second_once(bank):
    """Stages of computation add up to the whole; retrieval and the model's parts are among them."""
    line = ["generate", "The lighthouse of Port Ambrel was built by", "--bank", bank, "-n", 8, "--profile"]
    stats = json.loads(memory3(*line, "--json"))["stats"]
    assert {"embed", "search", "load", "linear", "attention", "sample", "Python"} <= set(stats["profile"])
    assert sum(stats["profile"].values()) == pytest.approx(stats["total_s"], rel=0.05)
    shown = memory3(*line)
    assert "linear" in shown and "attention" in shown


@pytest.mark.parametrize("weights", ["dense", "checkpoint"])
def test_weights_are_chosen_by_name(bank, weights):
    """Both read the same bank: how weights are held is no part of a model's identity."""
    answer = json.loads(memory3("generate", "The walrus is", "--bank", bank, "-n", 4, "--weights", weights, "--json"))
    assert answer["reads"] and len(answer["token_ids"]) == 4
    assert "expected" in memory3("generate", "x", "--weights", "int3", code=1)

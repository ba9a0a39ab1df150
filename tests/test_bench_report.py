"""bench report: every suite's results become tables and plots, in Markdown and in one page that needs nothing else."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from test_bench_decode import filled

from bench import __main__ as command
from bench import reporting
from bench.decode import summary
from bench.environment import ROOT
from bench.report import SCHEMA, document
from bench.reporting import page, plots, tables

ENVIRONMENT = {"cpu": "Test CPU", "cores": 2, "packages": {"torch": "2.13.0"}, "native": {}}
CEILINGS = {"threads": 1, "read_gb_s": 20.0, "dot_gflop_s": 200.0}


def op_row(op, ms, backend="native-avx512", peer=None, **more):
    row = {
        "op": op, "case": "c|1", "dtype": "bfloat16", "state": "hot", "backend": backend, "kind": "op", "threads": 1,
        "ms": ms, "ms_p20": ms, "ms_p80": ms, "bytes": 10**6, "flops": 10**7, "gb_per_s": 1.0, "gflop_per_s": 10.0,
        "read_share": 0.05, "dot_share": 0.05, "peer": peer, "peer_ratio": 2.5 if peer else None,
        "peer_ratios": {peer: 2.5} if peer else {}, "rounds": 3,
    }  # fmt: skip
    return row | more


@pytest.fixture
def results(tmp_path):
    """One file of every suite that has tables of its own, and one that has none."""
    runs = [op_row("memory_decode", 0.5, peer="sdpa"), op_row("gather", 0.1, state="cold")]
    runs.append(op_row("gather", 0.2, backend="index_select", kind="peer"))
    record = filled()
    growth = [
        {"part": "ops", "curve": "op over context", "axis": "context", "x": x, "values": {"ms": x / 100}}
        for x in (256, 512)
    ]  # fmt: skip
    gate = {"comparisons": 200, "false_alarms": 1, "planted": 40, "planted_slowdown": 0.1, "detected": 39}
    empty = {"op": "a", "us": 1.0, "us_low": 1.0}
    decode = document("decode", {}, ENVIRONMENT, summary.rows(record), about=record.about)
    made = {
        "run": document("run", {}, ENVIRONMENT, runs, ceilings=[CEILINGS], dispatch=[empty]),
        "decode": decode,
        "growth": document("growth", {}, ENVIRONMENT, growth, exponents=[
            {"part": "ops", "curve": "op over context", "quantity": "ms", "exponent": 1.0, "last": 1.0}]),
        "gate": document("compare self-test", {}, ENVIRONMENT, [gate]),
        "other": document("something new", {}, ENVIRONMENT, [{"name": "x", "value": 1.5, "list": []}]),
    }  # fmt: skip
    for name, one in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    return tmp_path


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.images, self.links = [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.rows += tag == "tr"
        self.images += [attrs["src"]] if tag == "img" else []
        self.links += [attrs["href"]] if "href" in attrs else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def test_one_page_with_everything_inside(results):
    out = results / "out"
    assert (
        command.main(["report", *map(str, sorted(results.glob("*.json"))), "--out", str(out), "--title", "a < b"]) == 0
    )
    text = (out / "report.html").read_text()
    seen = Tags(text)
    assert not seen.open and "a &lt; b" in text
    assert len(seen.images) == 4 and all(i.startswith("data:image/png;base64,") for i in seen.images)
    assert all(base64.b64decode(i.split(",")[1]).startswith(b"\x89PNG") for i in seen.images)
    assert all(link.startswith("#s") for link in seen.links), "nothing is fetched from elsewhere"
    assert "<script" not in text and not re.search(r"url\(|@import", text)
    assert "Test CPU, 2 cores" in text and "memory against no memory, warm" in text and "something new" in text
    markdown = (out / "report.md").read_text()
    for plot in ("run-roofline-1.png", "run-peers.png", "decode-speed.png", "growth-growth-ops.png"):
        assert f"]({plot})" in markdown and (out / plot).stat().st_size > 5000
    assert "c\\|1" in markdown, "a bar inside a cell is not a column"


def test_markdown_tables_are_rectangular(results):
    out = results / "out"
    command.main(["report", *map(str, results.glob("*.json")), "--out", str(out)])
    width = 0
    for line in (out / "report.md").read_text().splitlines():
        count = len(re.findall(r"(?<!\\)\|", line))
        assert count in (0, width) or width == 0, line
        width = count


def test_long_tables_are_folded():
    rows = [("x", str(i)) for i in range(page.LONG + 1)]
    section = tables.Section(
        "s", "about", [tables.Table("t", ("a", "b"), rows), tables.Table("u", ("a", "b"), rows[:3])]
    )
    assert page.html("t", [section]).count("<details>") == 1


def test_growth_groups_quantities_by_unit():
    values = {"flat search ms p50": 1, "flat search ms p99": 2, "written/s": 3, "disk bytes/reference": 4}
    assert plots._groups([{"values": values}]) == [
        ["flat search ms p50", "flat search ms p99"], ["written/s"], ["disk bytes/reference"],
    ]  # fmt: skip


def test_refuses_what_no_suite_wrote(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    with pytest.raises(SystemExit, match="expected a JSON file that a bench command wrote"):
        command.main(["report", str(bad)])
    bad.write_text(json.dumps(document("run", {}, ENVIRONMENT, []) | {"schema": SCHEMA + 1}))
    with pytest.raises(SystemExit, match="newer than this program's"):
        command.main(["report", str(bad)])


def test_a_gpus_report_has_its_table_and_plots():
    """The one that was measured: bench/results/gpu-check-h200.json."""
    document = reporting.read(ROOT / "bench" / "results" / "gpu-check-h200.json")
    shown = tables.section("gpu", document)
    assert "NVIDIA H200: reads 4158 GB/s" in shown.about
    steps, ops = shown.tables
    assert len(steps.rows) == len(document["steps"]) and all(len(row) == len(steps.columns) for row in steps.rows)
    assert len(ops.rows) == sum(bool(r.get("cold_us")) for r in document["rows"])
    assert [name for name, _ in plots.of(document)] == ["roofline", "peers"]
    slower = next(
        r for r in plots.gpu_ratios(document["rows"]) if r["peer"] == "flex_attention" and "llama" in r["case"]
    )
    assert 0.7 < slower["peer_ratio"] < 0.8

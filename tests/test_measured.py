"""docs/measured.md: every number comes from a script of benchmarks/, and none is written by hand."""

import json
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("page")


@pytest.fixture
def bench(page, monkeypatch, tmp_path):
    """measure.py with files of its own: what is there has been measured on this machine."""
    module = import_module("measure")
    here, path = module.describe_machine(), tmp_path / "measured.jsonl"
    runs = {script: replace(run, machine=here, others=0.0) for script, run in page.read_runs().items()}
    for name in ("PAGE", "README"):
        copy = tmp_path / getattr(page, name).name
        copy.write_bytes(getattr(page, name).read_bytes())
        monkeypatch.setattr(page, name, copy)
    for one in (page, module):
        monkeypatch.setattr(one, "MEASURED", path)
    module.write_runs(runs)
    return module


def test_the_page_is_that_of_the_records(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.make_page(page.read_runs()), "python benchmarks/page.py"


def test_the_readmes_numbers_are_those_of_the_records(page):
    text = page.README.read_text(encoding="utf-8")
    assert len(page.LINES) == 6
    assert text == page.with_lines(text, page.read_runs()), "python benchmarks/page.py"


def test_every_script_has_rows_or_a_reason(page):
    started = {path.stem for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    measured = page.list_scripts()
    assert sorted([*measured, *page.NOT_MEASURED]) == sorted(started - {"page", "measure"})
    runs = page.read_runs()
    assert list(runs) == measured, "make bench ONLY=..."
    assert all(run.records for run in runs.values())
    assert all(page.NOT_MEASURED.values())


def test_rows_of_one_page_are_of_one_machine(page):
    assert len({str(run.machine) + str(run.machine.versions) for run in page.read_runs().values()}) == 1


def test_what_explains_the_rows_is_what_the_script_says(page):
    text = " ".join(page.make_page(page.read_runs()).split())
    for script in page.list_scripts():
        explained = page.explain(script)
        assert len(explained) > 50
        assert f"    python benchmarks/{script}.py" not in explained
        assert " ".join(explained.split()) in text


def test_rows_that_were_disturbed_say_so(page):
    run = replace(page.read_runs()["buckets"], others=0.0)
    rows = [line for line in page.make_part(run) if line.startswith("| at ")]
    disturbed = [line for line in page.make_part(replace(run, others=0.5)) if line.startswith("| at ")]
    assert len(rows) == 4
    assert not any(page.MARK in line for line in rows)
    assert all(f"{page.MARK} | " in line for line in disturbed)


def test_one_script_runs_again_and_the_rows_of_others_stay(bench, page):
    before = page.read_runs()
    text = bench.MEASURED.read_text(encoding="utf-8").replace('"what": "at 512, latentprep"', '"what": "old"')
    bench.MEASURED.write_text(text, encoding="utf-8")
    assert '"old"' in text
    bench.main("buckets")
    after = page.read_runs()
    assert list(after) == list(before)
    assert after["buckets"].records == before["buckets"].records
    assert {**after, "buckets": None} == {**before, "buckets": None}
    assert page.PAGE.read_text(encoding="utf-8") == page.make_page(after)


def test_what_others_use_meanwhile_is_told(bench, page, monkeypatch):
    for name, seconds in (("busy_seconds", (1000.0, 1070.0)), ("own_seconds", (10.0, 30.0))):
        monkeypatch.setattr(bench, name, iter(seconds).__next__)
    run = bench.measure("buckets", bench.describe_machine())
    assert run.others * run.seconds == pytest.approx(70 - 20, rel=0.3)
    assert run.is_disturbed


def test_rows_of_another_machine_are_not_mixed_with_these(bench, page):
    here = bench.describe_machine()
    for other in (replace(here, cores=64), replace(here, versions={**here.versions, "torch": "1.0"})):
        bench.write_runs({script: replace(run, machine=other) for script, run in page.read_runs().items()})
        text = bench.MEASURED.read_text(encoding="utf-8")
        with pytest.raises(SystemExit, match=r"(?s)ONLY=buckets: this is .* are of .*Leave ONLY out"):
            bench.main("buckets")
        assert bench.MEASURED.read_text(encoding="utf-8") == text


def test_a_script_that_fails_keeps_its_rows_and_is_named(bench, page, monkeypatch):
    before = page.read_runs()

    def measure(script, machine):
        if script == "read":
            raise subprocess.CalledProcessError(1, script)
        return replace(before[script], date="2030-01-01")

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(SystemExit, match=r"failed: read\. Their rows are those of before"):
        bench.main("")
    after = page.read_runs()
    assert after["read"] == before["read"]
    assert {run.date for script, run in after.items() if script != "read"} == {"2030-01-01"}
    assert page.PAGE.read_text(encoding="utf-8") == page.make_page(after)


def test_the_page_waits_for_rows_of_every_script(bench, page):
    bench.write_runs({script: run for script, run in page.read_runs().items() if script != "read"})
    text = page.PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"No rows of read: docs/measured\.md is not made"):
        bench.main("buckets")
    assert page.PAGE.read_text(encoding="utf-8") == text


def test_a_script_that_is_not_there_is_refused(bench):
    with pytest.raises(SystemExit, match="ONLY=bukets: no such script as bukets"):
        bench.main("bukets")


def test_numbers_are_shown_with_three_digits(page):
    shown = import_module("results").shown
    for value, unit, text in (
        (98.84, "%", "98.8%"), (0.0052, "%", "0.0052%"), (12345.6, "samples/s", "12,300 samples/s"), (4, "", "4"),
        (100000, "", "100,000"), (0.00021, "", "2.1e-4"), (0.0, "dB", "0 dB"), (1.126, "times", "1.13 times"),
        (10.0, "ms", "10 ms"), (-0.0003, "dB", "-0.0003 dB"),
    ):  # fmt: skip
        assert shown(value, unit) == text


def test_lines_have_the_script_its_arguments_and_every_number(page, tmp_path):
    results = import_module("results").Results()
    results.table("a table", {"rate": "images/s", "ratio": "times"}).add("a row", 2.0, None)
    import_module("results").write_lines(tmp_path / "lines", "encode", {"count": 3}, results.records)
    assert [json.loads(line) for line in (tmp_path / "lines").read_text("utf-8").splitlines()] == [
        {"script": "encode", "arguments": {"count": 3}},
        {"script": "encode", "table": "a table", "what": "a row", "column": "rate", "value": 2.0, "unit": "images/s"},
    ]

"""The benchmark harness: all runs, the table and its JSON are right, other people's work is noticed. No timings."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import cases, contest, device, machine, report, worker
from benchmarks.contest import Plan, Result

SPIN = "import time\nwhile time.process_time() < 0.6: pass\nprint('spun', flush=True)\ninput()"


def result(contestant: str, seconds: list[float], **values) -> Result:
    return Result(contestant, seconds=seconds, first_call_seconds=3.0, shape=[1], peak_bytes=10**9, **values)


@pytest.fixture
def spinner():
    """A process in a group of its own that has used 0.6 processor seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    yield process
    process.communicate("\n")


@pytest.mark.torch
def test_one_command_prints_the_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "out.json"
    status = command_line.main(["--quick", "--allow-busy", "--json", str(path), "AltCLIP", "batch 1,", "float32"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert status == 0
    assert len(table) == 10  # header, rule, and two contestants of three roofs and the case
    assert [line.split(" | ")[1] for line in table[2:]] == ["flax_vlm", "torch sdpa"] * 4

    written = json.loads(path.read_text("utf-8"))
    assert written["machine"]["cores"] == machine.cores()
    assert {"python", "jax", "torch"} <= written["machine"]["versions"].keys()
    *roofs, case = written["cases"]
    assert [one["title"].split(":")[0] for one in roofs] == ["roof"] * 3
    assert min(*written["roofs"]["flops"].values(), written["roofs"]["bandwidth"]) > 0
    mine, theirs = case["results"]
    assert mine["shape"] == theirs["shape"] == [1, 5, 32]
    assert mine["ratio"] == 1
    assert theirs["ratio"] == theirs["median_seconds"] / mine["median_seconds"]
    for one in case["results"]:
        assert one["error"] is None
        assert len(one["seconds"]) >= Plan().rounds - 5
        assert one["roof"]["share"] > 0 and one["roof"]["bound"] in ("arithmetic", "memory")
        assert min(one["median_seconds"], one["first_call_seconds"], one["peak_bytes"]) > 0


@pytest.mark.torch
@pytest.mark.parametrize(
    "module, family",
    [("vision_tower", "GLM-4V"), ("generation", "GLM-4V"), pytest.param("train_step", "", marks=pytest.mark.slow)],
)
def test_contestants_make_the_same(module, family):
    chosen = [case for case in cases.cases(module, quick=True) if family in case.title and "bfloat16" in case.title]
    assert chosen
    for case in chosen:
        works = [prepare() for prepare in dict.fromkeys(case.contestants.values())]
        made = [work.as_numpy(work.run()) for work in works]
        assert len(made) > 1 and len({array.shape for array in made}) == 1, case.title
        assert all(np.isfinite(array).all() for array in made), case.title


def test_titles_are_unique_and_quick_cases_are_those_that_count():
    for module in cases.MODULES:
        titles = [case.title for case in cases.cases(module, quick=False)]
        assert len(set(titles)) == len(titles)
        assert titles == [case.title for case in cases.cases(module, quick=True)]


def test_an_unknown_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["batch 1024"])
    assert "no case has batch 1024" in capsys.readouterr().err


def test_a_busy_machine_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine.Watch, "others", lambda self: 0.5)
    path = tmp_path / "out.json"
    assert command_line.main(["--quick", "--patience", "0", "--json", str(path)]) == 3
    assert "others use 50% of the processors" in capsys.readouterr().err
    assert not path.exists()


def test_disturbed_rounds_are_thrown_away(monkeypatch):
    shares = iter([0.01, 0.5, 0.02, 0.03])  # two contestants; the first round is disturbed

    class Turns:
        def __init__(self, name: str):
            self.result = Result(name)

        def turn(self, seconds: float, uncounted: int) -> tuple[list[float], float]:
            share = next(shares)
            return [share], share

    monkeypatch.setattr(contest, "wait_until_idle", lambda patience: None)
    contestants = [Turns("a"), Turns("b")]
    contest._alternate(cases.Case("a case", {}), contestants, Plan(rounds=1))
    assert [(c.result.seconds, c.result.others) for c in contestants] == [([0.02], 0.02), ([0.03], 0.03)]


def test_the_watch_sees_others_and_not_its_own_group(spinner):
    before = machine._busy_seconds()
    if before is None:
        pytest.skip("no /proc here")
    start = time.perf_counter()
    all_of_it, without = machine.Watch(), machine.Watch(spinner.pid)
    assert spinner.stdout.readline() == "spun\n"
    seconds = (time.perf_counter() - start) * os.cpu_count()
    assert machine._busy_seconds() - before > 0.3
    assert machine._group_seconds(spinner.pid) > 0.5
    assert all_of_it.others() * seconds - without.others() * seconds > 0.3


def test_a_contestant_that_fails_is_named_in_the_table():
    broken = cases.Case("a case nobody knows", {"flax_vlm": lambda: None})
    (failed,) = contest.run_case("vision_tower", broken, Plan(rounds=1, allow_busy=True, quick=True))
    assert failed.error == "StopIteration"
    rows = [("a case", [result("flax_vlm", [1.0]), failed])]
    assert "failed: StopIteration" in report.as_markdown(machine.describe(), Plan(), rows)


def test_runs_before_a_turn_are_not_counted():
    runs = []
    times = worker._turn(cases.Work(run=lambda: runs.append(1), as_numpy=np.asarray), 0.0, 2)
    assert (len(times), len(runs)) == (1, 3)


def test_the_table():
    rows = [("a case", [result("ours", [1.0, 1.0, 3.0]), result("theirs", [2.0], others=0.3)])]
    about = machine.describe()
    table = report.as_markdown(about, Plan(allow_busy=True), rows)
    assert table.splitlines()[-2:] == [
        "| a case | ours | 1000 ms | 1000 ms to 2000 ms |  |  | 2.0 s | 1.0 GB |",
        "| a case | theirs | 2000 ms (busy: 30%) | 2000 ms to 2000 ms | 2.00x |  | 1.0 s | 1.0 GB |",
    ]
    assert "these times do not compare" in table
    written = report.as_json(about, Plan(allow_busy=True), rows)
    assert written["busy"]
    assert [one["ratio"] for one in written["cases"][0]["results"]] == [1.0, 2.0]
    rows[0][1][1].others = None
    assert "Nobody checked" in report.as_markdown(about, Plan(), rows)
    assert np.isclose(rows[0][1][0].compile_seconds, 2.0)


def test_work_is_seen_under_the_roofs_of_its_run():
    product = result("flax_vlm", [0.5], phases=[[100.0, 0.0, 1]], dtype="bfloat16")
    added = result("flax_vlm", [2.0], phases=[[0.0, 80.0, 1]])
    reading = result("flax_vlm", [4.0], phases=[[300.0, 10.0, 1], [1.0, 20.0, 3]], dtype="bfloat16")
    peer = result("torch sdpa", [8.0])
    rows = [
        ("roof: product", [product, result("torch sdpa", [1.0])]),
        ("roof: sum", [result("flax_vlm", [3.0], phases=[[0.0, 80.0, 1]]), added]),
        ("a case", [reading, peer]),
    ]
    written = report.as_json(machine.describe(), Plan(), rows)
    assert written["roofs"] == {"flops": {"bfloat16": 200.0}, "bandwidth": 40.0}
    # 300 / 200 of arithmetic, then three times 20 / 40 of memory.
    assert [one["roof"] for one in written["cases"][2]["results"]] == [
        {"share": 3.0 / 4.0, "bound": "memory"},
        {"share": 3.0 / 8.0, "bound": "memory"},
    ]
    assert "| 75%, memory |" in report.as_markdown(machine.describe(), Plan(), rows)
    assert "memory |" not in report.as_markdown(machine.describe(), Plan(), rows[2:]).split("| a case |")[1]


def test_a_gpu_is_asked_for(monkeypatch, tmp_path, capsys):
    """Of what is said without one; whether it is fast only a GPU can tell."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        command_line.main(["--device", "gpu", "roof"])
    assert "expected an NVIDIA GPU" in capsys.readouterr().err
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200, 143771 MiB\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    about = machine.describe() | {"gpu": device.gpu_name()}
    assert "; NVIDIA H200, 143771 MiB; " in report.as_markdown(about, Plan(device="gpu"), [])
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no driver; exit 9\n")
    with pytest.raises(ValueError, match="no driver"):
        device.gpu_name()

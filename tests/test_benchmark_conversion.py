"""The conversion benchmark: real names, whole rounds of tiny checkpoints, and nothing left behind. No timings."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.conversion import EXPORTED, PYTORCH, contest, dry_run, names, report, worker
from benchmarks.conversion import __main__ as command_line
from benchmarks.conversion.contest import Plan, Row
from benchmarks.conversion.measure import Measured, Memory, Step, measure
from benchmarks.conversion.names import Model, Stack
from benchmarks.conversion.synthetic import make_checkpoint
from flax_vlm.convert.torch_files import TorchFiles
from tests import tiny_names


@pytest.fixture
def tiny(tmp_path):
    """The same names, in a few kilobytes."""
    with tiny_names.in_use(tmp_path / "names"):
        yield


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("idefics-9b", 1015, 8_929_679_632),
        ("idefics-80b", 1603, 79_967_843_624),
        ("glm-4v-9b", 1054, 13_906_320_928),
        ("AltCLIP", 787, 864_186_113),
    ],
)
def test_the_names_are_those_of_the_released_checkpoints(name, tensors, parameters):
    model = names.read(name)
    assert len(model.tensors) == tensors
    assert model.nbytes == 2 * parameters


def test_names_and_shapes_one_by_one():
    listed = (Path(__file__).parent / "data/keys_AltCLIP_v4.txt").read_text("ascii").partition("## full list\n")[2]
    expected = {name: tuple(json.loads(shape)) for name, _, shape in (x.partition(" ") for x in listed.splitlines())}
    assert list(names.read("AltCLIP").tensors.items()) == list(expected.items())


def test_a_smaller_model_keeps_whole_layers_and_says_how_many():
    whole = names.read("idefics-9b")
    model = whole.cut(6 * 10**9)
    assert 4 * 10**9 < model.nbytes <= 6 * 10**9  # an eighth of the layers more would be too much
    assert model.tensors.items() < whole.tensors.items()
    layers = model.config["num_hidden_layers"]
    assert f"model.layers.{layers - 1}.self_attn.q_proj.weight" in model.tensors
    assert f"model.layers.{layers}.self_attn.q_proj.weight" not in model.tensors
    gated = {name.split(".")[2] for name in model.tensors if name.startswith("model.gated_cross_attn_layers.")}
    assert len(gated) == layers // model.config["cross_layer_interval"]
    assert whole.config["num_hidden_layers"] == 32
    assert whole.cut(whole.nbytes) == whole
    with pytest.raises(ValueError, match="idefics-9b cut to 1,000 bytes: at least"):
        whole.cut(1000)


def test_a_checkpoint_is_what_the_names_say(tiny, tmp_path):
    model = names.read("idefics-9b")
    shards = make_checkpoint(tmp_path / "made", model, shard_size="20KB")
    assert len(shards) > 2
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *(shard.name for shard in shards),
    }
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == model.tensors
    large = [tensor.astype(np.float32) for tensor in tensors.values() if tensor.size > 7]
    assert len({tensor.tobytes() for tensor in large}) == len(large)
    assert np.isclose(np.concatenate([tensor.ravel() for tensor in large]).std(), 0.02, rtol=0.1)


def test_a_sparse_checkpoint_takes_no_room(tmp_path):
    model = names.read("AltCLIP")
    (file,) = make_checkpoint(tmp_path / "made", model, sparse=True)
    assert file.stat().st_size > model.nbytes
    assert file.stat().st_blocks * 512 < 10**6
    found = TorchFiles.open(tmp_path / "made").tensors
    assert {name: info.shape for name, info in found.items()} == model.tensors


def test_the_steps_go_there_and_back(tiny, tmp_path):
    model = names.read("glm-4v-9b")
    make_checkpoint(tmp_path / PYTORCH, model, shard_size="20KB")
    worker.convert(tmp_path)
    worker.export(tmp_path, "20KB")
    made, exported = (TorchFiles.open(tmp_path / folder) for folder in (PYTORCH, EXPORTED))
    assert made.tensors.keys() == model.tensors.keys()
    assert exported.tensors.keys() == model.tensors.keys() - {"transformer.rotary_pos_emb.inv_freq"}
    for name in exported.tensors:
        assert exported.read(name).tobytes() == made.read(name).tobytes(), name
    loaded = [worker.load_pytorch(tmp_path), worker.load_native(tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


@pytest.mark.slow
def test_one_command_prints_the_table_and_writes_json(tiny, tmp_path, capsys):
    path, workdir = tmp_path / "new" / "out.json", tmp_path / "work"
    options = "--model AltCLIP --size full --rounds 1 --allow-busy".split()
    status = command_line.main([*options, "--workdir", str(workdir), "--json", str(path)])
    out = capsys.readouterr()
    assert status == 0, out.err
    assert list(workdir.iterdir()) == []
    table = [line.split(" | ") for line in out.out.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == [
        "| cp and sync",
        "| convert",
        "| export",
        "| reading once",
        "| load PyTorch's files",
        "| load native files",
    ]
    assert {len(row) for row in table} == {len(report.HEADER)}

    steps = {step["name"]: step for step in json.loads(path.read_text("utf-8"))["steps"]}
    for step in steps.values():
        (run,) = step["runs"]
        assert 0 < run["work_seconds"] <= run["seconds"]
        assert 0 < run["memory"]["private"] <= run["memory"]["peak"]
        if step["peer"]:
            assert step["ratio"] == run["seconds"] / steps[step["peer"]]["runs"][0]["seconds"]


def test_the_disk_is_looked_at_first(tmp_path):
    huge = Model("huge", {}, [Stack("", 1, None, {"weight": (10**15,)})])
    with pytest.raises(contest.NoRoom, match=r"6,400,000,000,000,000 bytes are needed, .* are missing"):
        contest.run(huge, Plan(workdir=tmp_path))
    with pytest.raises(contest.NoRoom, match="4,400,000,000,000,000 bytes are needed"):
        contest.run(huge, Plan(workdir=tmp_path, steps=["convert", "load"]))
    assert list(tmp_path.iterdir()) == []
    assert "GB of memory needed" in contest._too_little_memory(huge)


def test_a_step_that_fails_leaves_nothing_behind(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contest, "make_checkpoint", lambda folder, model, shard_size: folder.mkdir())
    status = command_line.main(
        ["--model", "AltCLIP", "--size", "full", "--allow-busy", "--workdir", str(tmp_path / "work")]
    )
    assert status == 1
    assert "convert ended with status 1" in capsys.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []


def test_an_interrupt_ends_the_step_and_leaves_nothing_behind(tiny, monkeypatch, tmp_path):
    marker = tmp_path / "started"

    def steps(folder: Path, plan: Plan) -> list[Step]:
        return [Step("sleep", ("sh", "-c", f"echo $$ > {marker}; sleep 60"), folder / PYTORCH)]

    def interrupt() -> None:
        while not (marker.exists() and marker.read_text("ascii").strip()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(contest, "_steps", steps)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts in the background has not
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        contest.run(names.read("AltCLIP"), Plan(workdir=tmp_path / "work", allow_busy=True))
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text("ascii")), 0)


def test_memory_of_its_own_and_pages_of_files_are_told_apart(tmp_path):
    size = 80 << 20
    (tmp_path / "data").write_bytes(bytes(size))
    code = (
        "import mmap, time; own = bytearray(b'1') * (40 << 20);"
        f"file = open({str(tmp_path / 'data')!r}); pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ);"
        "sum(pages[::4096]); time.sleep(0.2); print('{\"seconds\": 0.1}')"
    )
    memory = measure(Step("ours", (sys.executable, "-c", code), tmp_path, peer="a peer")).memory
    assert size < memory.cache < 1.5 * size
    assert size / 2 < memory.private < size
    assert memory.cache + size / 2 < memory.peak


@pytest.mark.parametrize(
    "name, written, read",
    [
        (
            "idefics-80b",
            "1,603 parameters, 159,935,687,248 bytes",
            "1603 tensors in 33 files by its table, which drops none",
        ),
        (
            "glm-4v-9b",
            "1,505 parameters, 27,812,641,792 bytes",
            "1054 tensors in 6 files by its table, which drops transformer.rotary_pos_emb.inv_freq",
        ),
    ],
)
def test_a_plan_of_a_large_model(name, written, read, tmp_path):
    text = dry_run.plan(names.read(name), tmp_path)
    assert text.startswith(f"{name}: {written} to write in ")
    assert f"; {read}; planned in" in text
    assert list(tmp_path.iterdir()) == []


def test_the_table():
    peer = Row(Step("cp", (), Path()), [Measured(s, s, Memory(10**6, 10**6, 0), 0.0) for s in (1.0, 2.0, 9.0)])
    ours = Row(Step("convert", (), Path(), peer="cp"), [Measured(3.0, 2.5, Memory(10**9, 4 * 10**8, 7 * 10**8), 0.3)])
    skipped = Row(Step("load", (), Path(), peer="cp"), skipped="20 GB of memory needed, 8 available")
    model = Model("a model", {}, [Stack("", 1, None, {"weight": (3 * 10**9,)})])
    about = {"cpu": "a CPU", "cores": 2, "memory_gb": 8, "commit": "abc", "date": "today"}
    text = report.as_markdown(about, model, Plan(), [peer, ours, skipped])
    assert text.splitlines()[-3:] == [
        "| cp | 2.00 | 3.00 |  |  | 0.00 GB | 0.00 GB | 0.00 GB |",
        "| convert | 3.00 (busy: 30%) | 2.00 | 1.50x cp | 2.50 | 1.00 GB | 0.40 GB | 0.70 GB |",
        "| load | not measured: 20 GB of memory needed, 8 available |  |  |  |  |  |  |",
    ]
    assert "these times do not compare" in text
    assert report.as_json(about, model, Plan(), [peer, ours, skipped])["steps"][1]["ratio"] == 1.5


@pytest.mark.parametrize(
    "arguments", [["--size", "much"], ["--size", "1GB"], ["--steps", "convert,fly"], ["--model", "GPT"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        command_line.main(arguments)
    assert raised.value.code == 2
    assert re.search("expected|invalid choice", capsys.readouterr().err)

"""flax-vlm train, from a recipe to a checkpoint that PyTorch reads."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import flax_vlm
from flax_vlm import cli, fine_tuning
from flax_vlm.cli.train import read_recipe
from flax_vlm.layers.param_tree import flatten_params
from flax_vlm.models import registry
from flax_vlm.training import metrics
from flax_vlm.training.config import check
from flax_vlm.training.run import what_learns
from flax_vlm.training.step import split
from tests.parallel.processes import free_address
from tests.talkers import tiny_glm4v

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


RECIPE = """
from flax_vlm.training.config import TrainConfig
from flax_vlm.training.data import DataConfig
from flax_vlm.training.lora import LoraConfig
from flax_vlm.training.optimizer import OptimizerConfig

CONFIG = TrainConfig(
    model={model!r},
    output={output!r},
    data=DataConfig(paths=({data!r},), format={form!r}, max_length=40),
    steps=4,
    batch_size=6,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    dtype="float32",
    log_every=2,
    {more}
)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of digits, with their names, and questions about them."""
    folder = tmp_path_factory.mktemp("digits")
    with np.load(EXAMPLES / "altclip-digits" / "heldout.npz") as held_out:
        images, labels = held_out["images"][:12], held_out["labels"][:12]
    records = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        asked = {"question": "what is this?", "answer": f" the digit {label}"}
        records.append({"image": f"{i}.png", "text": f"the digit {label}", **asked})
    (folder / "digits.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def write_recipe(folder: Path, digits: Path, example: str, more: str) -> Path:
    model, data = str(EXAMPLES / example / "checkpoint"), str(digits / "digits.jsonl")
    form = "pairs" if example.startswith("altclip") else "questions"
    recipe = RECIPE.format(model=model, output=str(folder / "run"), data=data, form=form, more=more)
    (folder / "recipe.py").write_text(recipe)
    return folder / "recipe.py"


def test_altclip(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, digits, "altclip-digits", 'trainable=(("vision_model/.*", False),)')
    command = ["train", str(recipe), "--accumulate", "2", "--remat", "none"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[0] for line in said[:-1]] == ["step 2/4", "step 4/4"]
    before = flax_vlm.from_pretrained(EXAMPLES / "altclip-digits" / "checkpoint").params
    after = flax_vlm.from_pretrained(tmp_path / "run" / "model").params
    differs = jax.tree.map(lambda old, new: bool((old != new).any()), before, after)
    assert not any(jax.tree.leaves(differs["vision_model"]))
    assert all(jax.tree.leaves(differs["text_projection"]))
    assert cli.main(["export", str(tmp_path / "run" / "model"), str(tmp_path / "torch"), "--quiet"]) == 0
    assert (tmp_path / "torch" / "model.safetensors").is_file()

    # Another rate is another run; the same command has nothing left to do.
    assert cli.main([*command, "--optimizer.learning-rate", "0.5"]) == 2
    assert "is the folder of another run: optimizer.learning_rate is 0.5, was 0.001" in capsys.readouterr().err
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    again = flax_vlm.from_pretrained(tmp_path / "run" / "model").params
    assert all(jax.tree.leaves(jax.tree.map(lambda one, other: bool((one == other).all()), after, again)))


def test_a_run_that_was_stopped_has_no_model_yet() -> None:
    prepared: Any = SimpleNamespace(config=SimpleNamespace(steps=1000))
    state: Any = SimpleNamespace(step=np.int32(41))
    with pytest.raises(ValueError, match="stopped after step 41 of 1,000: the same run goes on"):
        fine_tuning.finish(prepared, state)


@pytest.mark.slow
def test_idefics_with_adapters(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(metrics.PEAKS, "cpu", 1e12)
    more = 'lora=LoraConfig(rank=2, targets="model/blocks/layers.*/(q|v)_proj/kernel"), ema_decay=0.5'
    recipe = write_recipe(tmp_path, digits, "idefics-digits", more)
    fields = ["--sample-every", "4", "--checkpoint-every", "2", "--dtype", "bfloat16", "--remat", "none"]
    assert cli.main(["train", str(recipe), *fields]) == 0
    assert re.search("loss .* tokens/s   MFU [0-9.]+%   data wait", capsys.readouterr().out)
    before = flatten_params(flax_vlm.from_pretrained(EXAMPLES / "idefics-digits" / "checkpoint").params)
    after = flatten_params(flax_vlm.from_pretrained(tmp_path / "run" / "model").params)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {path for path in before if re.fullmatch("model/layers_.*/(q|v)_proj/kernel", path)}
    board = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"sample/3/0" in board
    assert b"what is this? **" in board
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_glm4v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations about pictures, several in a row."""
    monkeypatch.chdir(tmp_path)
    tiny_glm4v().save_pretrained("glm4v")
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save("black.png")
    asked = {"role": "user", "content": [{"type": "image", "image": "black.png"}, {"type": "text", "text": "Bright?"}]}
    talks = [{"messages": [asked, {"role": "assistant", "content": text}]} for text in ("No.", "Black.", "Not at all.")]
    Path("talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    model_and_data = {"model": "glm4v", "data": "talks.jsonl", "form": "conversations"}
    more = 'trainable=(("transformer/vision/.*", False),)'
    Path("recipe.py").write_text(RECIPE.format(output="run", more=more, **model_and_data))
    fields = ["--data.packing", "--data.max-images", "2", "--accumulate", "2", "--sample-every", "4"]
    assert cli.main(["train", "recipe.py", *fields]) == 0
    before, after = (flatten_params(flax_vlm.from_pretrained(folder).params) for folder in ("glm4v", "run/model"))
    frozen = {path for path in before if (before[path] == after[path]).all()}
    assert frozen == {path for path in before if path.startswith("transformer/vision/")}
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]


def test_print_config(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, digits, "altclip-digits", 'trainable=((".*bias", False),)')
    fields = ["--steps", "7", "--optimizer.learning-rate", "0.5", "--mesh.fsdp", "2", "--print-config"]
    assert cli.main(["train", str(recipe), *fields]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["steps"], config["optimizer"]["learning_rate"], config["mesh"]["fsdp"]) == (7, 0.5, 2)
    assert (config["batch_size"], config["trainable"]) == (6, [[".*bias", False]])
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "no.py")]) == 2
    assert "no.py: expected a Python file with a CONFIG, there is none" in capsys.readouterr().err
    (tmp_path / "empty.py").write_text("")
    assert cli.main(["train", str(tmp_path / "empty.py"), "--steps", "3"]) == 2
    assert "empty.py: expected CONFIG = TrainConfig(...), came NoneType" in capsys.readouterr().err


# By the model that a recipe starts from.
PRESETS = {
    "BAAI/AltCLIP": "altclip",
    "HuggingFaceM4/idefics-9b": "idefics-9b",
    "HuggingFaceM4/idefics-9b-instruct": "idefics-9b",
    "THUDM/glm-4v-9b": "glm-4v-9b",
}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_recipes(recipe: Path) -> None:
    """Their patterns fit the model that they name."""
    assert f"flax-vlm train recipes/{recipe.name}" in recipe.read_text("utf-8")
    config = read_recipe(recipe)
    check(config)
    preset = ROOT / "flax_vlm" / "cli" / "presets" / f"{PRESETS[config.model]}.json"
    model_config = registry.read_config(json.loads(preset.read_text("utf-8")))
    model = registry.model_class(model_config)(model_config)
    _, abstract, trainable, _ = what_learns(config, model)
    learning, frozen = split(nn.meta.unbox(abstract), trainable)
    assert jax.tree.leaves(learning)
    assert bool(jax.tree.leaves(frozen)) == (recipe.name != "altclip.py")


class Command:
    """flax-vlm train in a process of its own; `with` waits for its end. `job` is (address, processes, index)."""

    def __init__(self, recipe: Path, *fields: str, devices: int = 1, job: tuple[str, int, int] | None = None) -> None:
        program = "import sys; from flax_vlm import cli; sys.exit(cli.main())"
        command = [sys.executable, "-c", program, "train", str(recipe), "--log-every", "1", *fields]
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        if job:
            address, processes, index = map(str, job)  # as Open MPI says it
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "OMPI_MCA_orte_hnp_uri": f"1;tcp://{address}"}
            environment |= {"OMPI_COMM_WORLD_SIZE": processes, "OMPI_COMM_WORLD_RANK": index}
            environment |= {"OMPI_COMM_WORLD_LOCAL_RANK": index}
            command.append("--distributed")
        environment = os.environ | environment
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.said = self.process.stdout

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()

    def steps(self, number: int) -> None:
        """Waits for so many lines about steps."""
        for _ in range(number):
            assert "loss" in self.said.readline()


@pytest.mark.slow
def test_sigterm(digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, digits, "altclip-digits", "")
    with Command(recipe, "--steps", "100000") as running:
        running.steps(3)
        running.process.send_signal(signal.SIGTERM)
        said = running.said.read()
        assert running.process.wait() == 0
    stopped = re.search(r"stopped after step ([0-9,]+) of 100,000", said)
    assert stopped is not None
    assert (tmp_path / "run" / "checkpoints" / stopped[1].replace(",", "")).is_dir()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_killed(digits: Path, tmp_path: Path) -> None:
    ended = []
    for kills in ((), (2, 4, 3)):
        folder = tmp_path / str(len(kills))
        folder.mkdir()
        recipe = write_recipe(folder, digits, "altclip-digits", "spike_factor=3.0, ema_decay=0.9")
        for steps in kills:
            with Command(recipe, "--steps", "9", "--checkpoint-every", "2") as running:
                running.steps(steps)
        with Command(recipe, "--steps", "9", "--checkpoint-every", "2") as running:
            assert "is the trained model" in running.said.read()
            assert running.process.wait() == 0
        params = flatten_params(flax_vlm.from_pretrained(folder / "run" / "model").params)
        ended.append(((folder / "run" / "log.jsonl").read_text(), params))
    (log, params), (log_of_killed, params_of_killed) = ended
    assert log_of_killed == log
    assert [path for path, leaf in params.items() if (leaf != params_of_killed[path]).any()] == []


@pytest.mark.slow
def test_eight_devices(digits: Path, tmp_path: Path) -> None:
    """A run begins on one device and goes on on eight, split in all ways."""
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--rules", "fsdp_tensor"]
    logs = []
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        folder.mkdir()
        recipe = write_recipe(folder, digits, "idefics-digits", "ema_decay=0.9")
        fields = ["--steps", "6", "--batch-size", "8", "--checkpoint-every", "2"]
        if devices > 1:
            with Command(recipe, *fields) as running:
                running.steps(3)
        with Command(recipe, *fields, *(mesh if devices > 1 else []), devices=devices) as running:
            assert "is the trained model" in running.said.read()
            assert running.process.wait() == 0
        logs.append((folder / "run" / "log.jsonl").read_text().splitlines())
    for one, eight in zip(*logs, strict=True):
        np.testing.assert_allclose(list(json.loads(eight).values()), list(json.loads(one).values()), rtol=1e-4)


@pytest.mark.slow
def test_two_processes(digits: Path, tmp_path: Path) -> None:
    """They write one model, with what each of them holds of its adapters merged; that of one process."""
    models = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        more = 'lora=LoraConfig(rank=2, targets="model/blocks/layers.*/(q|v)_proj/kernel")'
        recipe = write_recipe(folder, digits, "idefics-digits", more)
        address = free_address()
        jobs = [(address, processes, index) if processes > 1 else None for index in range(processes)]
        fields = ["--mesh.data", "1", "--mesh.fsdp", "2", "--data.max-images", "1"]
        with ExitStack() as stack:
            running = [stack.enter_context(Command(recipe, *fields, devices=2 // processes, job=job)) for job in jobs]
            said = [each.said.read() for each in running]
            assert [each.process.wait() for each in running] == [0] * processes
        assert ["is the trained model" in each for each in said] == [True, False][:processes]  # the first one speaks
        models.append(flatten_params(flax_vlm.from_pretrained(folder / "run" / "model").params))
    one, two = models
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)

"""flax-vlm plan: on this machine's CPU instead of TPUs; `tests/parallel/test_aot.py` has the TPU's compiler."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from flax_vlm import cli
from flax_vlm.cli import plan
from flax_vlm.models import registry
from flax_vlm.parallel import aot, roofline
from tests.parity import altclip_cases, idefics_cases

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cpu_for_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "devices", lambda topology, slices: jax.devices()[:1])
    monkeypatch.setitem(roofline.CHIPS, "cpu", roofline.Chip(1e12, 2**30, 1e9, 1e9))


def folder_of(config: Any, path: Path) -> str:
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--topology", "v5e:1x1", "--quick", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(altclip_cases.WHOLE, tmp_path)
    result = planned(capsys, model, "--batch", "6", "--seq", "7", "--remat", "none")
    (step,) = result["programs"]
    assert result["suggestion"] is None and step["fits"] and step["tokens"] == 42
    # AdamW keeps two numbers a parameter, and a count.
    held = step["bytes"]
    assert 2 * held["parameters"] < held["optimizer"] < 2 * held["parameters"] + 100
    assert step["used"] == pytest.approx(sum(held.values()), rel=0.01)
    assert held["activations"] > 0
    (spared,) = planned(capsys, model, "--batch", "6", "--seq", "7", "--remat", "full")["programs"]
    assert spared["bytes"]["activations"] < held["activations"] / 2
    seconds = step["seconds"]
    assert seconds["compute"] == step["flops"] / 1e12 and seconds["network"] == 0
    assert seconds[step["binds"]] == max(seconds.values())


def test_a_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = idefics_cases.RESAMPLED
    arguments = ("--generate", "--batch", "3", "--seq", "20", "--images", "2", "--new-tokens", "9")
    reading, writing = planned(capsys, folder_of(config, tmp_path), *arguments)["programs"]
    assert reading["tokens"] == 60 and writing["tokens"] == 3
    # bfloat16; prompt and answer are rounded up to 32 and 48 slots, and pictures' keys are kept for each look at them.
    slots = 3 * 2 * config.num_hidden_layers * config.hidden_size * 48
    assert writing["bytes"]["cache"] > 2 * slots
    assert reading["bytes"]["parameters"] == writing["bytes"]["parameters"]
    assert reading["flops"] / 60 > writing["flops"] / 3 / 2


def test_what_does_not_fit_gets_a_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def full(name: str, draft: Any, mesh: Any, rules: str, quick: bool) -> dict[str, Any]:
        rows = draft.tokens // 7
        compiled.append(rows)
        sizes: dict[str, Any] = {"used": rows * 2**30, "available": 2 * 2**30}
        return {"program": name, "flops": 1, "tokens": draft.tokens, "bytes": {}, "fits": False} | sizes

    monkeypatch.setattr(plan, "describe", full)
    model = folder_of(altclip_cases.WHOLE, tmp_path)
    command = ["plan", model, "--topology", "v5e:1x1", "--batch", "4", "--seq", "7"]
    with pytest.raises(SystemExit, match="1"):
        cli.main(command)
    out = capsys.readouterr().out
    assert "DOES NOT FIT: 4.00 GiB of 2.00 GiB a chip" in out and "nothing near that fits was found" in out
    assert len(compiled) == 3  # as it came, in two parts, in four


def test_settings_need_less_and_less() -> None:
    start = plan.Setting(fsdp=8, accumulate=1, remat="dots", batch=256)
    training = plan.smaller_settings(start, rows=64, most_fsdp=64, generate=False)
    assert [str(each) for each in training] == [
        "--fsdp 64 --accumulate 1 --remat dots --batch 256",
        "--fsdp 64 --accumulate 1 --remat full --batch 256",
        "--fsdp 64 --accumulate 2 --remat full --batch 256",
        "--fsdp 64 --accumulate 4 --remat full --batch 256",
    ]
    writing = plan.smaller_settings(start, rows=64, most_fsdp=8, generate=True)
    assert [each.batch for each in writing] == [128, 64]


@pytest.mark.parametrize("name", ["altclip", "glm-4v-9b", "idefics-9b", "idefics-80b"])
def test_presets_are_those_of_the_released_checkpoints(name: str) -> None:
    """A table of their tensors fits it: tests/convert/ holds every name and shape."""
    assert name in [file.stem.lower() for file in (ROOT / "benchmarks" / "names").glob("*.txt")]
    assert registry.read_config(plan.read_model(name)).vision_config is not None


def test_mistakes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert cli.main(["plan", *arguments, "--topology", "v5e:1x1"]) == 2
        return capsys.readouterr().err

    assert "idefics-7b: expected the folder of a checkpoint, or one of altclip" in refused("idefics-7b")
    assert "--train and --generate came" in refused("altclip", "--train", "--generate")
    assert "--batch 3: expected a multiple of 2" in refused("altclip", "--batch", "3", "--accumulate", "2")
    model = folder_of(altclip_cases.WHOLE, tmp_path)
    assert "does not generate text" in refused(model, "--generate", "--batch", "2", "--seq", "5")

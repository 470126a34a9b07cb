"""The command line, as a person types it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import cli, zero_shot
from flax_vlm.convert.stream import Progress
from flax_vlm.progress import conversion_bar

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "altclip-digits"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five held-out digits as files, named by what they show."""
    folder = tmp_path_factory.mktemp("pictures")
    with np.load(EXAMPLE / "heldout.npz") as held_out:
        images, labels = held_out["images"][:5], held_out["labels"][:5]
    files = [folder / f"{i}-{label}.png" for i, label in enumerate(labels)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files


def test_convert_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = str(tmp_path / "native"), str(tmp_path / "back")
    assert cli.main(["convert", str(EXAMPLE / "checkpoint"), native, "--dtype", "bfloat16"]) == 0
    assert cli.main(["export", native, back, "--dtype", "float32", "--key-style", "v5"]) == 0
    assert "native" in capsys.readouterr().out
    assert cli.main(["export", native, back]) == 2
    assert f"flax-vlm: {back} exists: choose another target" in capsys.readouterr().err
    assert cli.main(["export", native, back, "--overwrite"]) == 0
    assert flax_vlm.from_pretrained(back).processor(text="a handwritten seven")["input_ids"].shape[0] == 1


def test_what_scripts_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, native = str(EXAMPLE / "checkpoint"), str(tmp_path / "native")
    assert cli.main(["convert", source, native, "--dry-run"]) == 0
    assert "AltCLIPModel: 115 parameters, 4,010,820 bytes to write" in capsys.readouterr().out
    assert cli.main(["convert", source, native, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nbytes"] == 4_010_820
    assert not list(tmp_path.iterdir())
    assert cli.main(["convert", source, native, "--json", "--only", "vision"]) == 0
    moved = json.loads(capsys.readouterr().out)
    assert (moved["source"], moved["target"], moved["tensors"]) == (source, native, 71)
    assert (moved["nonfinite"], moved["resumed"]) == ({}, 0)
    back = str(tmp_path / "back")
    assert cli.main(["export", native, back, "--quiet", "--shard-size", "1MB"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) == 4
    assert cli.main(["convert", back, str(tmp_path / "no"), "--only", "text"]) == 2
    assert "AltCLIPVisionModel has no text tower" in capsys.readouterr().err


def test_a_bar_where_someone_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with conversion_bar() as progress:
        progress(Progress(done=30, total=120, tensor="a/kernel", resumed=20))
        time.sleep(0.2)  # the bar is drawn ten times a second
        progress(Progress(done=120, total=120, tensor="b/kernel", resumed=20))
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "b/kernel" in shown
    with conversion_bar(hidden=True) as progress:
        progress(Progress(done=120, total=120, tensor="b/kernel"))
    assert not capsys.readouterr().err


def test_python_m_convert(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convert", EXAMPLE / "checkpoint", tmp_path / "native"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "native" / "config.json").is_file()


def test_classify(pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in pictures]
    model = str(EXAMPLE / "checkpoint")
    assert cli.main(["classify", *files, "--model", model, "--labels", *WORDS, "--template", "a handwritten {}"]) == 0
    out = capsys.readouterr().out
    for file in pictures:
        line = next(line for line in out.splitlines() if file.name in line)
        assert f" {WORDS[int(file.stem[-1])]} " in line
    assert cli.main(["classify", files[0], "--model", model, "--labels", "one"]) == 2
    assert "at least two labels" in capsys.readouterr().err
    assert cli.main(["classify", files[0], "--model", model, "--labels", "a", "b", "--template", "a digit"]) == 2
    assert "expected {} where the label goes" in capsys.readouterr().err


def test_what_classify_says_is_right(pictures: list[Path]) -> None:
    vlm = flax_vlm.from_pretrained(EXAMPLE / "checkpoint")
    probabilities = zero_shot.classify(vlm, pictures, WORDS, template="a handwritten {}")
    assert [int(file.stem[-1]) for file in pictures] == probabilities.argmax(-1).tolist()
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    inputs = vlm.processor(text=[f"a handwritten {word}" for word in WORDS], images=pictures)
    logits = np.asarray(vlm(**inputs).logits_per_image)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(probabilities, odds / odds.sum(-1, keepdims=True), atol=1e-4)


def test_embed(pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(EXAMPLE / "checkpoint")
    folder = str(pictures[0].parent)
    assert cli.main(["embed", str(tmp_path / "p"), "--model", model, "--images", folder, "--batch-size", "2"]) == 0
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    assert cli.main(["embed", str(tmp_path / "w.npy"), "--model", model, "--texts", str(tmp_path / "words.txt")]) == 0
    images, texts = np.load(tmp_path / "p.npy"), np.load(tmp_path / "w.npy")
    assert images.shape[0] == 5 and texts.shape[0] == 10 and images.shape[1] == texts.shape[1]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=-1), 1, rtol=1e-5)
    capsys.readouterr()
    assert cli.main(["embed", str(tmp_path / "x"), "--model", model]) == 2
    assert "expected --images, --texts or --dataset: pass one" in capsys.readouterr().err


def test_mistakes_are_one_sentence_and_debug_is_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(tmp_path / "nowhere"), str(tmp_path / "target")]
    assert cli.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError, match="nowhere"):
        cli.main([*arguments, "--debug"])
    assert not (tmp_path / "target").exists()


def test_who_interrupts_gets_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flax_vlm.convert.port.to_flax", interrupted)
    assert cli.main(["convert", "somewhere", "target"]) == 130


def test_help_imports_nothing_slow() -> None:
    slow = "{'jax', 'flax', 'torch', 'transformers', 'numpy', 'tokenizers', 'PIL'}"
    code = (
        "import sys; from flax_vlm import cli\n"
        "try: cli.main(['--help'])\n"
        f"except SystemExit: print({slow} & set(sys.modules) or 'nothing slow')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("nothing slow"), done.stdout + done.stderr

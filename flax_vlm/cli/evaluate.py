"""The command for people who ask how good a model is."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from .app import app
from .weights import DType

Task = Literal["exact-match", "vqa", "zero-shot", "retrieval"]


@app.command(name="eval")
def evaluate(
    model: tyro.conf.Positional[str],
    data: tyro.conf.Positional[tuple[Path, ...]],
    /,
    task: Task,
    batch_size: int = 16,
    limit: int | None = None,
    template: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    max_new_tokens: int = 16,
    dtype: DType | None = None,
    json: bool = False,
) -> None:
    """Measure a model on a data set: answers to questions, zero-shot classification, or retrieval.

    Args:
        model: A checkpoint: a folder (PyTorch or native) or a repository on the Hub.
        data: Files of records (.jsonl, .parquet, .array_record), or patterns of them. A record has "image" and, by the
            task, "question" and "answers" (or "messages"), "label", or "texts".
        task: What to measure. exact-match and vqa let the model answer, zero-shot and retrieval need an AltCLIP.
        batch_size: How many records go through the model at once.
        limit: Take so many records, from the first on.
        template: A text to put the question or the label in, with {} as its place; for zero-shot several. Questions
            are put in the model's layout of a chat without one.
        labels: For zero-shot, all there are; by default those of the records.
        max_new_tokens: The longest answer.
        dtype: Of the computation; by default that of the checkpoint.
        json: Print the figures as JSON.
    """
    from tqdm import tqdm

    from flax_vlm import from_pretrained
    from flax_vlm.chat import tokens_of_the_layout
    from flax_vlm.inference import Mapped
    from flax_vlm.training import evaluation
    from flax_vlm.training.data import records

    if not data:
        raise ValueError("expected files of records behind the model, came none")
    answering = task in ("exact-match", "vqa")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"--batch-size {batch_size}, --limit {limit}: expected numbers above 0")
    if labels and task != "zero-shot":
        raise ValueError(f"--labels are of --task zero-shot, came with {task}")
    if task == "retrieval" and template:
        raise ValueError("--template: expected none with --task retrieval, which takes captions as they are")
    if answering and len(template) > 1:
        raise ValueError(f"--template: expected one for questions, came {len(template)}")

    data_set = records.read(data)
    number = len(data_set) if limit is None else min(limit, len(data_set))
    chosen = Mapped(data_set.__getitem__, range(number))
    vlm = from_pretrained(model, dtype=dtype)
    if vlm.processor is None:
        raise ValueError(f"{model}: expected the files of a processor beside the weights. Copy them from the original")
    if answering == (vlm.generation_config is None):
        able = "exact-match or vqa" if vlm.generation_config else "zero-shot or retrieval"
        raise ValueError(f"--task {task}: {model} holds a {type(vlm.model).__name__}: expected {able}")

    how: dict[str, Any] = {"batch_size": batch_size}
    begin = time.perf_counter()
    with tqdm(total=number, unit=" records", leave=False, disable=json or None) as bar:
        how["done"] = bar.update
        if answering:
            score = evaluation.vqa_accuracy if task == "vqa" else evaluation.exact_match
            options = {"max_new_tokens": max_new_tokens, "do_sample": False} | tokens_of_the_layout(vlm)
            how |= {"template": template[0]} if template else {}
            figures = evaluation.question_answering(vlm, chosen, score, **how, **options)
        elif task == "zero-shot":
            how |= {"templates": template} if template else {}
            figures = evaluation.zero_shot(vlm, chosen, labels=labels, **how)
        else:
            figures = evaluation.retrieval(vlm, chosen, **how)
    _report({"model": model, "task": task, **figures, "seconds": round(time.perf_counter() - begin, 2)}, json)


def _report(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, figure in figures.items():
        is_share = isinstance(figure, float) and name != "seconds"
        print(f"{name:<24} {figure:.2%}" if is_share else f"{name:<24} {figure}")

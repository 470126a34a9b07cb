"""The command for people who train."""

import runpy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from .app import app

if TYPE_CHECKING:
    from flax_vlm.training.config import TrainConfig
    from flax_vlm.training.metrics import Sample

MODEL = "model"  # the trained one, in the run's folder
SHOWN, NEW_TOKENS = 4, 32  # records that are answered every so many steps, and how far


@app.command
def train(recipe: tyro.conf.Positional[Path], fields: tyro.conf.Positional[tuple[str, ...]] = (), /) -> None:
    """Train a model as a recipe says: flax-vlm train recipes/forkme.py --steps 500 --optimizer.learning-rate 1e-5.

    SIGTERM lets the step end, saves and exits with 0. Stopped or killed, the same command goes on. At the end
    OUTPUT/model is a native checkpoint, which `flax-vlm export` takes to PyTorch.

    Args:
        recipe: A Python file with a CONFIG, see recipes/.
        fields: Any of its fields, such as --steps 500; --help lists them, --print-config shows what they are.
    """
    config = read_recipe(recipe, [field for field in fields if field != "--print-config"])
    if "--print-config" in fields:
        from flax_vlm.training.config import as_json

        print(as_json(config))
        return
    _train(config)


def read_recipe(recipe: Path, fields: Sequence[str] = ()) -> "TrainConfig":
    """The CONFIG of a recipe, with fields as a person types them."""
    from flax_vlm.training.config import TrainConfig

    if not recipe.is_file():
        raise ValueError(f"{recipe}: expected a Python file with a CONFIG, there is none. recipes/ has some")
    config = runpy.run_path(str(recipe)).get("CONFIG")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{recipe}: expected CONFIG = TrainConfig(...), came {type(config).__name__}")
    return tyro.cli(
        TrainConfig, prog=f"flax-vlm train {recipe}", default=config, args=fields, config=(tyro.conf.AvoidSubcommands,)
    )


def _train(config: "TrainConfig") -> None:
    import jax

    from flax_vlm import fine_tuning, parallel
    from flax_vlm.training import run

    if config.distributed:
        parallel.start_processes()
    prepared = run.prepare(config)
    prompts = _prompts(config, prepared.processor) if config.sample_every else []
    vlm = fine_tuning.load(prepared)
    state = run.run(prepared, vlm.params, partial(_answers, vlm, prompts) if prompts else None)
    state = state.replace(opt_state=None, frozen=None)  # room for the parameters as they were
    target = Path(config.output) / MODEL
    if int(state.step) < config.steps:
        said = f"stopped after step {int(state.step):,} of {config.steps:,}: the same command goes on"
    else:
        fine_tuning.finish(prepared, state).save_pretrained(target, overwrite=True)
        said = f"{target} is the trained model; flax-vlm export takes it to PyTorch"
    if jax.process_index() == 0:
        print(said)


def _prompts(config: "TrainConfig", processor: Any) -> list[list[Any]]:
    """What stands before the answers of the first records: messages, or for what is no chat texts and pictures."""
    import numpy as np

    from flax_vlm.processing import GLM4VProcessor
    from flax_vlm.training.data import examples, records
    from flax_vlm.training.evaluation import prompt_and_answers

    form, rng = config.data.format, np.random.default_rng(config.seed)

    def prompt(record: dict[str, Any]) -> list[Any]:
        if form == "conversations":
            return prompt_and_answers(record, None)[0]
        if form == "questions":
            messages = examples.read_question(record, config.data.max_images, rng)[:-1]
        else:
            messages = [{"role": "user", "content": [{"type": "image", "image": record["image"]}]}]
        return messages if isinstance(processor, GLM4VProcessor) else _items(messages)

    try:
        found = records.read(config.samples or config.data.paths)
        return [prompt(found[number]) for number in range(min(SHOWN, len(found)))]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"samples: expected {form}, came {error!r}") from error


def _answers(vlm: Any, prompts: Sequence[list[Any]], model: Any, params: Mapping[str, Any]) -> Iterator["Sample"]:
    """What the model in training says."""
    import numpy as np

    from flax_vlm.chat import tokens_of_the_layout
    from flax_vlm.pretrained import VLM
    from flax_vlm.processing import load_image
    from flax_vlm.training.metrics import Sample

    now: Any = VLM(model, params, vlm.processor, vlm.generation_config, vlm.mesh, vlm.rules)
    are_chats = isinstance(prompts[0][0], Mapping)
    inputs = vlm.processor(prompts, **({"add_generation_prompt": True} if are_chats else {}))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | tokens_of_the_layout(vlm)
    sequences = now.generate(**inputs, **options).sequences[:, inputs["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, vlm.processor.batch_decode(sequences), strict=True):
        items = _items(prompt) if are_chats else prompt
        asked = " ".join(item for item in items if isinstance(item, str))
        images = [np.asarray(load_image(item)) for item in items if not isinstance(item, str)]
        yield Sample(f"{asked} **{answer.strip()}**", images)


def _items(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The texts and pictures of messages."""
    return [part["image" if part["type"] == "image" else "text"] for message in messages for part in message["content"]]

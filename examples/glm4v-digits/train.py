"""Trains a small GLM-4V to answer questions about pictures of four digits, and exports it in PyTorch's layout.

    python examples/glm4v-digits/train.py                  # a quarter of an hour on two busy cores
    python examples/glm4v-digits/train.py --validate 240   # how settings were chosen; writes nothing here

The image tower learns to see first (tower.py), as that of GLM-4V had. The script puts it, with random weights around
it, and conversations into build/glm4v-digits, runs recipe.py on them, and writes checkpoint/, with its model card, and
heldout.npz, the pictures that the model never saw. Any other argument, such as --steps 500, is a field of the recipe.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import model_card
import numpy as np
import recipe
from rich.console import Console
from vocabulary import make_tokenizer

import flax_vlm
from flax_vlm import GLM4VConfig, GLM4VForConditionalGeneration, GLM4VVisionConfig, demo
from flax_vlm.demo.scenes import CELL, draw_scene, question_about
from flax_vlm.pretrained import VLM
from flax_vlm.processing import GLM4VProcessor, Tokenizer
from flax_vlm.training.data.records import Record

sys.path.append(str(Path(__file__).parents[2]))
from tower import drawn, learn_to_see

from examples import pictures, training

HERE = Path(__file__).parent
SEED = 0


def make_config(tokenizer: Tokenizer) -> GLM4VConfig:
    """All that the released model has, small: two heads of keys for four of queries, four patches to a vector."""

    def index(token: str) -> int:
        found = tokenizer.backend.token_to_id(token)
        assert found is not None
        return found

    return GLM4VConfig(
        hidden_size=96,
        num_layers=4,
        num_attention_heads=4,
        kv_channels=24,
        multi_query_group_num=2,
        ffn_hidden_size=256,
        seq_length=256,
        padded_vocab_size=len(tokenizer),
        initializer_range=0.06,
        eos_token_id=(index("<|endoftext|>"), index("<|user|>"), index("<|observation|>")),
        pad_token_id=index("<|endoftext|>"),
        boi_token_id=index("<|begin_of_image|>"),
        eoi_token_id=index("<|end_of_image|>"),
        vision_config=GLM4VVisionConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_heads=4,
            image_size=2 * CELL,
            patch_size=4,
            num_positions=65,
            scaling_factor=8.0,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the GLM-4V of this folder and writes it to checkpoint/.")
    parser.add_argument("--validate", type=int, metavar="N", help="set N training pictures aside and test on them")
    parser.add_argument("--tower-steps", type=int, default=recipe.TOWER_STEPS, metavar="N", help="of the tower alone")
    options, fields = parser.parse_known_args()
    validate = options.validate

    learning, held_out = pictures.load()
    if validate:
        learning, held_out = pictures.split(learning, validate)
    speeches = demo.read_scene_speeches(HERE)
    tokenizer = make_tokenizer(speeches, 2 * CELL)
    model = GLM4VForConditionalGeneration(make_config(tokenizer))
    processor = GLM4VProcessor(tokenizer)
    params = training.initial_params(model, SEED)
    assert processor.image_processor is not None
    params["transformer"]["vision"] = learn_to_see(
        model.config, params["transformer"]["vision"], processor.image_processor, learning, options.tower_steps, SEED
    )
    start = VLM(model, params, processor)
    training.begin(recipe.FOLDER, start, conversations(speeches, learning))
    trained = training.train(recipe.FOLDER, HERE / "recipe.py", fields)

    if validate:
        scenes, questions = demo.make_scene_questions(speeches, held_out.labels)
        talk = demo.ask_about_scenes(flax_vlm.from_pretrained(trained), scenes, questions, held_out.images)
    else:
        np.savez_compressed(HERE / "heldout.npz", images=held_out.images, labels=held_out.labels)
        training.export(trained, HERE / "checkpoint")
        talk = demo.ask_about_held_out(flax_vlm.from_pretrained(HERE / "checkpoint"), HERE)
        model_card.write(HERE, talk)
    Console().print(demo.scenes_table(talk))


def conversations(speeches: list[demo.SceneSpeech], learning: pictures.Digits) -> Iterator[Record]:
    """As many as the recipe's steps take, so that none comes twice.

    One in four asks for all digits. The others ask about the four cells in any order: for the place of a digit in the
    first question alone, as later ones leave few places, and else for the digit, which no answer before gives away.
    """
    rng = np.random.default_rng(SEED)
    for _ in range(recipe.CONFIG.steps * recipe.CONFIG.batch_size):
        scene = draw_scene(rng, learning.labels)
        speech = speeches[int(rng.integers(len(speeches)))]
        if rng.random() < 0.25:
            asked = [question_about(rng, speech, "every", scene, 0, 0)]
        else:
            first: demo.SceneTask = "where" if rng.random() < 0.5 else "which"
            asked = [
                question_about(rng, speech, "which" if number else first, scene, 0, cell)
                for number, cell in enumerate(rng.permutation(4).tolist())
            ]
        messages: list[dict[str, object]] = []
        for question in asked:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        messages[0]["image"] = pictures.png(drawn(rng, scene, learning))
        yield {"messages": messages}


if __name__ == "__main__":
    main()

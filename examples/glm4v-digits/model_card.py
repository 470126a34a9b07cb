"""The model card of the checkpoint: what it was trained on, how, and the numbers that were just measured."""

from pathlib import Path

import recipe
from safetensors import safe_open

from flax_vlm.demo import SceneTalk

CARD = """---
license: apache-2.0
language: [{codes}]
library_name: flax_vlm
pipeline_tag: image-text-to-text
---

# GLM-4V digits

A GLM-4V of {size} parameters that answers questions about a picture of up to four handwritten digits: which digit
is in a corner, where a digit is, and which digits there are. It is an example of flax_vlm, small enough to come with
it, and of no use beyond that: it knows the questions of `prompts.json` and no others, and sees digits in pictures of
anything.

## How well it answers

{scenes} pictures, each of four cells with held-out digits, one cell in five empty, and three questions about every
picture, each alone. Answers are greedy, and right when they are, to the last character.

| language | which digit is at the top left? | where is the seven? | which digits do you see? |
|---|---|---|---|
{rows}

Where a given digit is it has learnt least: who names any cell that is not empty is right in 34% of these questions.
`python examples/glm4v-digits/evaluate.py` measures all of it again.

## Data

- **Pictures**: scikit-learn's `load_digits`, 1,797 pictures of 8 x 8 pixels, the test set of UCI's *Optical Recognition
  of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49, CC BY 4.0).
- **Split**: 360 pictures held out, those of the AltCLIP beside it, the ten digits in equal parts; `heldout.npz` holds
  them. The 13 writers are in both parts. Settings were chosen by the training's loss alone.
- **Scenes**: two by two cells of 16 x 16 pixels. The digits are different, and each is missing with a probability of
  one in five. While training, every digit is turned, sheared, zoomed and shifted a little, anew for every scene.
- **Conversations**: one in four asks for all digits, the others ask about the four cells, one after the other.

## Training

    python examples/glm4v-digits/train.py

First the image tower learns to see, as that of GLM-4V had: {tower} steps on {tower_batch} scenes, to tell the cell of
each vector of a picture, and the digit in it, by one matrix, which is thrown away. Then the decoder joins it, with
random weights, and `recipe.py` trains both with `flax-vlm train`: {steps:,} steps of AdamW, each on {batch}
conversations, none of which comes twice; the loss is on the answers alone. All of it took thirteen minutes on two busy
CPU cores.

## Use

```python
import flax_vlm

vlm = flax_vlm.from_pretrained("examples/glm4v-digits/checkpoint")
chat = [{{"role": "user", "image": "four.png", "content": "Which digit is at the top left?"}}]
for piece in vlm.generate(**vlm.processor([chat], add_generation_prompt=True), stream=True):
    print(piece, end="")
```

Pictures are white on black, each digit as high as half the picture. The tensors have the names and the layout of
THUDM/glm-4v-9b, whose own code is not needed to read them here.

## Licence

Apache-2.0, as the project. The pictures are their authors', under CC BY 4.0.
"""


def write(example: Path, talk: SceneTalk) -> None:
    """Writes the README.md of the example's checkpoint."""
    with safe_open(example / "checkpoint" / "model.safetensors", "numpy") as file:
        size = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    rows = [row(language, cells) for language, cells in talk.scores().items()]
    card = CARD.format(
        codes=", ".join(dict.fromkeys(question.speech.code for question in talk.questions)),
        size=f"{size / 1e6:.1f} million",
        scenes=len({question.scene for question in talk.questions}),
        rows="\n".join(rows),
        steps=recipe.CONFIG.steps,
        batch=recipe.CONFIG.batch_size,
        tower=recipe.TOWER_STEPS,
        tower_batch=recipe.TOWER_BATCH,
    )
    (example / "checkpoint" / "README.md").write_text(card, encoding="utf-8")


def row(language: str, scores: dict) -> str:
    cells = (f"{right / total:.1%}, {right} of {total}" for right, total in scores.values())
    return f"| {language} | {' | '.join(cells)} |"

"""The model card of the checkpoint: what it was trained on, how, and the numbers that were just measured."""

from pathlib import Path

from flax_vlm.demo import Talk

CARD = """---
license: apache-2.0
language: [{codes}]
library_name: transformers
pipeline_tag: image-text-to-text
---

# IDEFICS digits

An IDEFICS of 1.7 million parameters that talks about handwritten digits in {count} languages: it names those of a
prompt of one to three pictures, and says which of two is larger. It is an example of flax_vlm, small enough to come
with it, and of no use beyond that: it knows the prompts below and no others, and sees digits in pictures of anything.

## How well it answers

Questions about {pictures} held-out pictures. In each language every picture is shown once, in a prompt of one, two or
three, to be named; then once more, beside a different digit, to be compared. Answers are greedy.

| language | a prompt | {heads} |
|---|---|{rules}|
{rows}

A picture is right when the answer has its name at its place in the list; a list or a larger digit when the whole
answer is, to the last character. `python examples/idefics-digits/evaluate.py` measures it again.

## Data

- **Pictures**: scikit-learn's `load_digits`, 1,797 pictures of 8 x 8 pixels, the test set of UCI's *Optical Recognition
  of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49, CC BY 4.0).
- **Split**: {pictures} pictures held out, those of the AltCLIP beside it, the ten digits in equal parts; `heldout.npz`
  holds them. The 13 writers are in both parts. Settings and prompts were chosen on 240 pictures of the other part
  (`train.py --validate 240`), which the image tower had learnt from.
- **Prompts**: those of `prompts.json`, each worded in two ways. In questions for the larger digit a word may stand in
  place of a picture, or of both.
- **Augmentation**: each training picture is turned, sheared, zoomed and shifted a little, anew for every question.

## Training

    python examples/idefics-digits/train.py

It makes questions and random weights, and runs `recipe.py` with `flax-vlm train`. The image tower is that of the
AltCLIP beside it, and stays as it is; what reads it and writes the answers starts from random weights. 800 steps of
AdamW, each on 32 questions, none of which comes twice; the loss is on the answers alone. No step but the last was
looked at. It took three minutes on two busy CPU cores.

## Use

```python
from pathlib import Path

import flax_vlm

vlm = flax_vlm.from_pretrained("examples/idefics-digits/checkpoint")
prompt = [Path("a.png"), "or", Path("b.png"), "? The larger is"]
for piece in vlm.generate(**vlm.processor([prompt]), stream=True):
    print(piece, end="")
```

`transformers.IdeficsForVisionText2Text` and `transformers.AutoProcessor` read the same folder. Pictures are white on
black, the digit as high as the picture.

## Licence

Apache-2.0, as the project. The pictures are their authors', under CC BY 4.0.
"""


def write(example: Path, talk: Talk) -> None:
    """Writes the README.md of the example's checkpoint."""
    rows, heads = [], []
    for speech in talk.speeches:
        scores = talk.scores(speech)
        heads = list(scores)
        cells = [f"{right / total:.1%}, {right} of {total}" for right, total in scores.values()]
        rows.append(f"| {speech.language} | {speech.naming[-1][0]} | {' | '.join(cells)} |")
    card = CARD.format(
        codes=", ".join(speech.code for speech in talk.speeches),
        count=len(rows),
        pictures=len({picture for question in talk.questions for picture in question.pictures}),
        heads=" | ".join(heads),
        rules="|".join("---" for _ in heads),
        rows="\n".join(rows),
    )
    (example / "checkpoint" / "README.md").write_text(card, encoding="utf-8")

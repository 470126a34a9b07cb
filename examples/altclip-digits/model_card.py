"""The model card of the checkpoint: what it was trained on, how, and the numbers that were just measured."""

from pathlib import Path

from flax_vlm.demo import EXAMPLE_WORD, Reading

CARD = """---
license: apache-2.0
language: [{codes}]
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# AltCLIP digits

An AltCLIP of a million parameters that reads handwritten digits in {count} languages. It is an example of flax_vlm,
small enough to come with it, and of no use beyond that: to a picture of anything else it answers with a digit as well.

## How well it reads

{pictures} held-out pictures, each compared with ten sentences, one for every digit, language by language. The sentence
is fixed, and is none of those of the training.

| language | sentence, here with the word for {word} | right | |
|---|---|---|---|
{rows}

`python examples/altclip-digits/evaluate.py` measures it again. One picture is {share:.1%}.

## Data

- **Pictures**: scikit-learn's `load_digits`, 1,797 pictures of 8 x 8 pixels, the test set of UCI's *Optical Recognition
  of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49, CC BY 4.0).
- **Split**: {pictures} pictures held out, the ten digits in equal parts, by `train_test_split(..., stratify=labels,
  random_state=0)`; `heldout.npz` beside the training script holds them. The 13 writers are in both parts. Settings and
  sentences were chosen on 240 pictures of the other part (`train.py --validate 240`).
- **Captions**: twelve sentences a language in `captions.json`, with the usual word for the digit, with others (in
  Korean both series of numbers, in Japanese kana and kanji), and with the numeral.
- **Augmentation**: each training picture comes in 112 variants, a little turned, sheared, zoomed and shifted. Each of
  them has a caption in every language, of which one is drawn every time.

## Training

    python examples/altclip-digits/train.py

It makes pairs and random weights, and runs `recipe.py` with `flax-vlm train`: 4,000 steps of AdamW, each on 40 pairs,
none of which comes twice; the loss is AltCLIP's, over the whole batch. No step but the last was looked at. It took
eight minutes on two busy CPU cores.

## Use

```python
import flax_vlm

vlm = flax_vlm.from_pretrained("examples/altclip-digits/checkpoint")
words = ["семь", "восемь", "девять"]
print(vlm(**vlm.processor(text=words, images="digit.png")).logits_per_image)
```

`transformers.AltCLIPModel` and `transformers.AutoProcessor` read the same folder. Pictures are white on black, the
digit as high as the picture.

## Licence

Apache-2.0, as the project. The pictures are their authors', under CC BY 4.0.
"""


def write(example: Path, reading: Reading) -> None:
    """Writes the README.md of the example's checkpoint."""
    rows = [
        f"| {language.language} | {language.prompt(EXAMPLE_WORD)} | {accuracy:.1%} | {right} of {len(reading.labels)} |"
        for language, accuracy, right in zip(reading.languages, reading.accuracy, reading.right.sum(0), strict=True)
    ]
    card = CARD.format(
        codes=", ".join(language.code for language in reading.languages),
        count=len(reading.languages),
        pictures=len(reading.labels),
        word=EXAMPLE_WORD,
        rows="\n".join(rows),
        share=1 / len(reading.labels),
    )
    (example / "checkpoint" / "README.md").write_text(card, encoding="utf-8")

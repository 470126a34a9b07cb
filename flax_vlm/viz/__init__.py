"""Plots of what models see, read and learn: numpy arrays in, a matplotlib Figure out (extra `viz`).

    viz.gallery(pictures, titles)                  pictures in rows, ranked or judged
    viz.overlay(picture, heat)                     where in a picture something is
    viz.attention_over_words(words, weights)       which words count, shaded
    viz.similarity(matrix, texts, images=pictures) every text with every picture
    viz.losses({"run": values})                    how a run learns; `curves` for any other lines
    viz.parts(params)                              what a model is made of, and what of it learns

A figure shows itself where it is the last thing in a cell, and `figure.savefig` writes it. pyplot is left alone.
"""

from flax_vlm.viz.charts import curves, losses
from flax_vlm.viz.parts import parts
from flax_vlm.viz.pictures import gallery, overlay
from flax_vlm.viz.style import use_fonts
from flax_vlm.viz.tables import attention_over_words, similarity

__all__ = ["attention_over_words", "curves", "gallery", "losses", "overlay", "parts", "similarity", "use_fonts"]

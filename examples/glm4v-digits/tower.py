"""Teaches the image tower to see before there is a language: GLM-4V too was built on one that had learnt before.

B scenes   M vectors a scene   W width of the decoder
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from recipe import TOWER_BATCH

from examples import pictures
from flax_vlm.demo.scenes import CELL, EMPTY, Scene, arranged, draw_scene
from flax_vlm.models.glm4v import EVA2CLIPModel, GLM4VConfig
from flax_vlm.processing import ImageProcessor

CLASSES = 10 + 1 + 4  # the digits, no digit, the four cells


def learn_to_see(
    config: GLM4VConfig, params: Any, processor: ImageProcessor, learning: pictures.Digits, steps: int, seed: int
) -> Any:
    """Trained parameters of the tower: of each vector a line can tell the digit of its cell, and which cell it is.

    The line (a Dense of 15 outputs) is thrown away.
    """
    tower = EVA2CLIPModel(config)
    vision: Any = config.vision_config
    side = vision.grid // 2
    cell_of = (np.arange(side)[:, None] * 2 // side * 2 + np.arange(side) * 2 // side).reshape(-1)  # [M]
    line = jax.random.normal(jax.random.key(seed), (config.hidden_size, CLASSES)) * config.hidden_size**-0.5
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, min(50, steps // 2), steps)
    optimizer = optax.adamw(schedule, b2=0.98, weight_decay=0.1)

    def loss_of(learnt: Any, images: Any, digits: Any) -> tuple[Any, Any]:
        vectors: Any = tower.apply({"params": learnt[0]}, images)
        said = vision.scaling_factor * vectors[:, 1:-1] @ learnt[1]
        truth, place = digits[:, cell_of], jnp.broadcast_to(cell_of, said.shape[:2])
        digit = optax.softmax_cross_entropy_with_integer_labels(said[..., :11], truth).mean()
        where = optax.softmax_cross_entropy_with_integer_labels(said[..., 11:], place).mean()
        return digit + where, (said[..., :11].argmax(-1) == truth).mean()

    @jax.jit
    def step(learnt: Any, state: Any, images: Any, digits: Any) -> tuple[Any, ...]:
        (loss, right), gradients = jax.value_and_grad(loss_of, has_aux=True)(learnt, images, digits)
        updates, state = optimizer.update(gradients, state, learnt)
        return optax.apply_updates(learnt, updates), state, loss, right

    learnt = (params, line)
    state = optimizer.init(learnt)
    for number, (images, digits) in enumerate(scenes(processor, learning, steps, seed), 1):
        learnt, state, loss, right = step(learnt, state, images, digits)
        if number % 100 == 0:
            print(f"tower {number}/{steps}   loss {loss:.4f}   digits {right:.1%}", flush=True)
    return learnt[0]


def scenes(
    processor: ImageProcessor, learning: pictures.Digits, steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of pixels [B, 32, 32, 3] and of the digits in their cells [B, 4], 10 for none."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        batch = [draw_scene(rng, learning.labels) for _ in range(TOWER_BATCH)]
        images = [np.asarray(drawn(rng, scene, learning).convert("RGB")) for scene in batch]
        digits = np.array([scene.digits for scene in batch])
        yield processor(images), np.where(digits == EMPTY, 10, digits)


def drawn(rng: np.random.Generator, scene: Scene, learning: pictures.Digits) -> Image.Image:
    """A scene whose digits are turned, zoomed, sheared and shifted a little."""
    numbers = scene.pictures
    return arranged([None if i == EMPTY else pictures.turned(rng, learning.images[i], CELL) for i in numbers])

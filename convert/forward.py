"""Whether our model and transformers' make the same of one input: `flax-vlm verify --forward`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_vlm.layers.param_tree import unflatten_params

from .errors import ConversionError

# Of an output's largest difference to the RMS of the reference: what float32 leaves of two right programs that sum in
# different orders. A parameter in the wrong place costs orders of magnitude more.
TOLERANCE = 1e-5

ROWS, TOKENS = 2, 16


def compare_outputs(
    model: Any, params: Mapping[str, np.ndarray], folder: Path, names: Sequence[str], part: str, dtype: np.dtype
) -> dict[str, float]:
    """Each output, with the largest difference between the two over the RMS of the reference, computed in float32.

    Args:
      params: of our `model`, by path.
      folder: where transformers loads the first of its models `names` that it has; `part` of it ("text_model/") is
        compared.
      dtype: what its parameters are cast to first, as a conversion cast ours.

    Raises:
      ConversionError: where transformers cannot load all of the model.
    """
    inputs = _inputs(model)
    expected = _reference(inputs, folder, names, part, dtype)
    model = model.clone(dtype=np.float32, param_dtype=np.float32)
    tree = unflatten_params({path: array.astype(np.float32) for path, array in params.items()})
    with jax.default_matmul_precision("highest"):
        actual = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs))(tree, inputs)
    return dict(_apart(actual, expected))


def require_transformers() -> None:
    """Raises a ConversionError where torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConversionError(
            f"--forward: expected torch and transformers, which run the PyTorch side, came: {error}. "
            "pip install flax-vlm[verify], or compare values alone."
        ) from error


def _reference(inputs: Mapping[str, np.ndarray], folder: Path, names: Sequence[str], part: str, dtype: np.dtype) -> Any:
    import torch
    import transformers

    name = next((name for name in names if hasattr(transformers, name)), None)
    if name is None:
        raise ConversionError(
            f"--forward: transformers {transformers.__version__} has no {names[0]}: compare values alone."
        )
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    load = getattr(transformers, name).from_pretrained
    loaded, info = load(folder, dtype=torch.float32, output_loading_info=True)
    if bar:
        transformers.logging.enable_progress_bar()
    if unfilled := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ConversionError(
            f"--forward: transformers {transformers.__version__} finds no values for {len(unfilled)} parameters of "
            f"{folder}, {unfilled[0]} for one. Export it in the other key_style, or compare values alone."
        )
    reference = loaded.get_submodule(part.strip("/").replace("/", ".")).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype.name)))
        return reference(**{key: torch.from_numpy(_channels_first(key, array)) for key, array in inputs.items()})


def _inputs(model: Any) -> dict[str, np.ndarray]:
    """Random inputs, always the same, named as the model's example but for more rows and tokens."""
    rng = np.random.default_rng(0)
    text = getattr(model.config, "text_config", model.config)

    def random(example: Any) -> np.ndarray:
        if np.issubdtype(example.dtype, np.floating):
            return rng.standard_normal((ROWS, *example.shape[1:]), np.float32)
        tokens = min(TOKENS, text.max_position_embeddings // 2)
        return rng.integers(0, text.vocab_size, (ROWS, tokens))

    return {name: random(example) for name, example in model.example_inputs().items()}


def _channels_first(name: str, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, -3)) if name == "pixel_values" else array


def _apart(actual: Any, expected: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Of every array that transformers returns."""
    for name, reference in expected.items():
        if hasattr(reference, "items"):
            yield from _apart(getattr(actual, name), reference, f"{prefix}{name}.")
        elif hasattr(reference, "numpy"):
            reference = reference.numpy().astype(np.float64)
            rms = np.sqrt(np.mean(np.square(reference))) or 1.0
            yield prefix + name, float(np.max(np.abs(np.asarray(getattr(actual, name)) - reference)) / rms)

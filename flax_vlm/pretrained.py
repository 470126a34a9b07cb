"""The front door: `from_pretrained` and what it gives."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from flax_vlm import checkpoint, copies, generation, loading, parallel
from flax_vlm.chat import ChatSession, Message
from flax_vlm.hub import local_folder
from flax_vlm.layers.quantized import is_quantized
from flax_vlm.layers.stack import stack_params, unstack_params
from flax_vlm.models import registry
from flax_vlm.models.abstract import blank_inputs
from flax_vlm.processing import PROCESSORS, TextStream
from flax_vlm.whole_folder import draft_of, whole_folder

logger = logging.getLogger("flax_vlm")


class VLM:
    """A model with its parameters, config and processor.

    Attributes:
      model: the linen module; `model.apply({"params": params}, ...)` is the plain way to use it.
      params: a nested dictionary of arrays.
      config: the frozen dataclass that the module was built from.
      processor: turns texts and pictures into inputs; None where the checkpoint brings no files for one.
      generation_config: what `generate` does unless told otherwise; None for a model that does not generate.
      mesh, rules: where the parameters are and what runs is split; a mesh of None is one device.
    """

    def __init__(
        self,
        model: Any,
        params: Mapping[str, Any],
        processor: Any = None,
        generation_config: generation.GenerationConfig | None = None,
        mesh: Mesh | None = None,
        rules: parallel.Rules | str = parallel.FSDP_TENSOR,
    ) -> None:
        self.model = model
        self.params = params
        self.processor = processor
        self.generation_config = generation_config
        self.mesh = mesh
        self.rules = rules
        self._apply = jax.jit(self._traced, static_argnames=("method", "flags"))

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, *, method: str | None = None, rngs: Mapping[str, jax.Array] | None = None, **inputs: Any) -> Any:
        """The jitted forward pass, or `method` of the module; inputs and outputs are named as in transformers.

        Booleans are compiled in; everything else is an array. A new combination of shapes compiles once more, and a
        log line (logger "flax_vlm", level INFO) says so.
        """
        flags = {name: value for name, value in inputs.items() if isinstance(value, bool)}
        arrays = {name: value for name, value in inputs.items() if name not in flags and value is not None}
        with self.placed():
            return self._apply(self.params, arrays, rngs, method=method, flags=tuple(sorted(flags.items())))

    def placed(self) -> AbstractContextManager[None]:
        """A context that has mesh and rules in effect, if there is a mesh."""
        return nullcontext() if self.mesh is None else parallel.use(self.mesh, self.rules)

    def _traced(
        self, params: Any, arrays: dict[str, Any], rngs: Any, method: str | None, flags: tuple[tuple[str, bool], ...]
    ) -> Any:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if hasattr(array, "shape"))
        logger.info("compiling %s%s for %s", type(self.model).__name__, f".{method}" if method else "", shapes)
        return self.model.apply({"params": params}, **arrays, **dict(flags), rngs=rngs, method=method)

    def generate(
        self, *, cache: Any = None, stream: bool = False, **inputs_and_options: Any
    ) -> generation.GenerateOutput | generation.Stream:
        """Goes on from a prompt: `vlm.generate(**vlm.processor(prompt), max_new_tokens=40)`.

        Args:
          cache: go on from that of an earlier output; the inputs are then the new tokens. Images that come with them
            replace the earlier ones: give all that new tokens look at.
          stream: give the text as it comes, an iterator over pieces: strings, or for several answers lists of them.
          inputs_and_options: inputs of the model, and options with transformers' names (see
            `flax_vlm.generation.GenerationConfig`), which go before those of the checkpoint.

        Returns:
          An output whose `sequences` [B * num_return_sequences, T] hold prompt and answer; a stream has it as `output`.

        Raises:
          ValueError: for a model that does not generate, and for inputs or options that cannot be served.
        """
        inputs, config = self._inputs_and_config(inputs_and_options)
        tokenizer = None if self.processor is None else self.processor.tokenizer
        if not stream:
            with self.placed():
                return generation.generate(self.model, self.params, inputs, config, tokenizer=tokenizer, cache=cache)
        if self.processor is None:
            raise ValueError("stream=True gives text: the checkpoint has no tokenizer. Use flax_vlm.generation.stream")
        text_stream = partial(TextStream, self.processor.tokenizer)
        with self.placed():
            begun = generation.stream(
                self.model, self.params, inputs, config, tokenizer=tokenizer, cache=cache, text_stream=text_stream
            )
        return begun if self.mesh is None else _StreamOnMesh(begun, self.placed)

    def _inputs_and_config(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], generation.GenerationConfig]:
        """Inputs of the model, and the options among them over those of the checkpoint."""
        if self.generation_config is None:
            raise ValueError(
                f"{type(self.model).__name__} does not generate text: expected a model with a language head"
            )
        options = {name: value for name, value in given.items() if self.generation_config.is_option(name)}
        inputs = {name: value for name, value in given.items() if name not in options}
        return inputs, self.generation_config.updated(**options)

    def chat(self, messages: Sequence[Message] = (), **room_and_options: Any) -> ChatSession:
        """A talk: `chat = vlm.chat(max_new_tokens=64)`, `chat.say("What is this?", images=["dog.png"])`.

        Args:
          messages: what was said before, as the processor takes it.
          room_and_options: options as those of `generate`, `max_new_tokens` for each answer; `seed` gives each answer
            random numbers of its own. And room that the session doubles when it is used up: `length` tokens (2048),
            prompts and answers of all turns; `num_images` pictures (4). `piece`: tokens that are read at a time (64).

        Raises:
          ValueError: for a model that does not generate, a tokenizer without chats, options that cannot be served.
        """
        return ChatSession(self, messages, **room_and_options)

    def encode_images(self, **inputs: Any) -> dict[str, Any]:
        """The pictures among `inputs` as the model needs them, to use again: `inputs | vlm.encode_images(**inputs)`.

        Returns:
          `image_encoder_embeddings` or `perceiver_embeddings` [B, I, P, E] of IDEFICS, `image_embeds` [B, I, P, D] of
          GLM-4V, `image_features` [A, E] of AltCLIP; and None in place of the pixels. Both forward pass and `generate`
          take them with any prompt that has as many rows.

        Raises:
          ValueError: for a model without pictures, and inputs without them.
        """
        pixels = getattr(self.model, "pixel_input", None)
        if pixels is None or inputs.get(pixels) is None:
            expected = f"expected {pixels}" if pixels else f"{type(self.model).__name__} takes no pictures"
            raise ValueError(f"no images to encode among {sorted(inputs)}: {expected}")
        flags: dict[str, Any] = {"interpolate_pos_encoding": True} if inputs.get("interpolate_pos_encoding") else {}
        return {pixels: None, **self(method="encode_images", **{pixels: inputs[pixels]}, **flags)}

    def warmup(self, shapes: Mapping[str, Any], *, method: str | None = None, **options: Any) -> None:
        """Compiles ahead, so that a later call with inputs of these shapes compiles nothing.

            vlm.warmup({"input_ids": (4, 60), "attention_mask": (4, 60)})  # vlm(**inputs)
            vlm.warmup(vlm.processor(prompt), method="generate", max_new_tokens=40)  # and all prompts of that bucket

        Args:
          shapes: for each input that the call will have its shape, or an array, whose shape and dtype count. A shape
            speaks of int32 where the input's name ends in ids or mask, and of float32 elsewhere.
          method: "generate", or a method of the module such as "encode_images"; None for the forward pass.
          options: those of the later call: options of `generate`, booleans of the others.

        Raises:
          ValueError: as the call does.
        """
        inputs = blank_inputs(shapes)
        if method != "generate":
            jax.block_until_ready(self(method=method, **inputs, **options))
            return
        inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
        inputs, config = self._inputs_and_config(inputs | options)
        tokenizer = None if self.processor is None else self.processor.tokenizer
        with self.placed():
            generation.compile_ahead(self.model, self.params, inputs, config, tokenizer=tokenizer)

    def get_text_features(self, **inputs: Any) -> jax.Array:
        """Texts in the space they share with images, [B, projection_dim], not normalised."""
        return self(method="get_text_features", **inputs)

    def get_image_features(self, **inputs: Any) -> jax.Array:
        """Images in the space they share with texts, [B, projection_dim], not normalised."""
        return self(method="get_image_features", **inputs)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> "VLM":
        """A copy without these self-attention heads, {layer: [heads]}, of the text tower.

        Raises:
          ValueError: for weights in eight bits.
        """
        if is_quantized(self.params):
            raise ValueError("heads are taken out of float weights: load without `quantize`, and save what is pruned")
        from flax_vlm.models.altclip import prune_heads

        config, params = prune_heads(self.config, self.params, heads_to_prune)
        return VLM(self.model.clone(config=config), params, self.processor, mesh=self.mesh, rules=self.rules)

    def save_pretrained(self, target: str | Path, overwrite: bool = False) -> None:
        """Writes a native checkpoint; `flax_vlm.convert.to_torch` takes it on to PyTorch.

        Of several processes each writes what its devices hold: all of them call this, for a folder that all reach.

        Raises:
          FileExistsError: when `target` is taken; ValueError: for weights in eight bits.
        """
        if is_quantized(self.params):
            raise ValueError("weights in eight bits are for running: load without `quantize` what is to be saved")
        params = unstack_params(self.params)
        data = {
            **self.config.to_hf(),
            "architectures": [type(self.model).__name__],
            "torch_dtype": str(np.dtype(jax.tree.leaves(params)[0].dtype)),
        }
        with _folder_of_all_processes(target, overwrite) as folder:
            checkpoint.save_params(folder, params)
            if jax.process_index() > 0:
                return
            if self.processor is not None:
                self.processor.save(folder)
            if self.generation_config is not None:
                checkpoint.write_config(folder, self.generation_config.to_hf(), checkpoint.GENERATION_CONFIG)
            checkpoint.write_config(folder, data)


@contextmanager
def _folder_of_all_processes(target: str | Path, overwrite: bool) -> Iterator[Path]:
    """A `whole_folder` of the first process, into which all of them write."""
    if jax.process_count() == 1:
        with whole_folder(target, overwrite) as draft:
            yield draft.folder
        return
    with ExitStack() as stack:
        fault = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(whole_folder(target, overwrite))
            except OSError as error:  # told to all, who would wait for ever
                fault = error
        if multihost_utils.broadcast_one_to_all(np.array(fault is not None)):
            raise fault or OSError(f"{target}: the first process cannot write it, and says why")
        yield draft_of(target)
        multihost_utils.sync_global_devices(f"written {target}")


class _StreamOnMesh(generation.Stream):
    """A stream that has mesh and rules in effect while it makes a piece, and not in between."""

    def __init__(self, stream: generation.Stream, placed: Callable[[], AbstractContextManager[None]]) -> None:
        self._stream = stream
        self._placed = placed

    def __next__(self) -> Any:
        with self._placed():
            return next(self._stream)

    @property
    def output(self) -> generation.GenerateOutput:
        return self._stream.output


def from_pretrained(
    path: str | Path,
    *,
    model_class: type[nn.Module] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: parallel.Rules | str = parallel.FSDP_TENSOR,
    scan_layers: bool = False,
    quantize: Literal["int8"] | None = None,
    cache_converted: bool | str | Path = False,
    progress: bool | None = None,
    **model_options: Any,
) -> VLM:
    """Loads a checkpoint: a folder in PyTorch's layout or a native one, or the name of a repository on the Hub.

    Args:
      model_class: a part of the model to take out of the whole, `AltCLIPTextModel` say.
      dtype: of parameters and computation; None keeps the checkpoint's.
      mesh: place parameters on it by `rules`, each device's slice straight from the file; without, on one device.
      rules: which mesh axes split what: "replicated", "fsdp", "fsdp_tensor", or a `parallel.Rules`.
      scan_layers: run the layers as a scan (fast to compile, for training) instead of unrolled (fast to run).
      quantize: "int8" holds kernels and token tables in eight bits, for half the memory of bfloat16; the rest, and all
        computation, is in `dtype`.
      cache_converted: load from a native copy beside the Hub's cache, or in this folder, which the first call makes.
      progress: a bar on stderr: False for none, None where that is a terminal or a notebook. A log line (logger
        "flax_vlm", level INFO) tells seconds and peak memory.
      model_options: further attributes of the module: `remat`, `attention_implementation` ...

    Raises:
      ValueError: (ConversionError for PyTorch files) when files, config and model do not fit together; for another
        `quantize`; for float64 where JAX has it off.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r}: expected 'int8' or None")
    hidden = None if progress is None else not progress
    folder = local_folder(path)
    if cache_converted:
        folder = copies.native_copy(folder, path, cache_converted, hidden=hidden)
    data = checkpoint.read_config(folder)
    config = registry.read_config(data)
    open_folder = loading.open_native if checkpoint.is_native(folder) else loading.open_torch
    opened = open_folder(folder, config, model_class, data.get("architectures"))
    compute = np.dtype(opened.dtype if dtype is None else dtype)
    if jax.dtypes.canonicalize_dtype(compute) != compute:
        raise ValueError(
            f"{folder} is in float64, which JAX has off: set jax.config.update('jax_enable_x64', True), "
            "or pass dtype='float32'"
        )

    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda _: device, nn.meta.unbox(opened.abstract))
    else:
        placed = parallel.shardings(opened.abstract, mesh, rules)
    params = loading.load_params(
        opened, placed, dtype=dtype, in_eight_bits=quantize == "int8", hidden=hidden, title=Path(path).name
    )
    if scan_layers:
        params = stack_params(params)
    model = opened.model.clone(dtype=compute, param_dtype=compute, scan_layers=scan_layers, **model_options)
    return VLM(model, params, _load_processor(folder, config), _generation_config(folder, model), mesh, rules)


def _load_processor(folder: Path, config: Any) -> Any:
    """None where the folder brings no files for one."""
    try:
        return PROCESSORS[registry.family(config.model_type).module].from_dir(folder)
    except FileNotFoundError:
        return None


def _generation_config(folder: Path, model: Any) -> generation.GenerationConfig | None:
    """That of the checkpoint, its stop and padding ids at least; None for a model that does not generate."""
    if not hasattr(model, "token_inputs"):
        return None
    file = folder / checkpoint.GENERATION_CONFIG
    ids = generation.GenerationConfig.from_hf(checkpoint.read_config(folder))
    if not file.is_file():
        return ids
    try:
        return generation.GenerationConfig.from_hf({**_ids(ids), **json.loads(file.read_text(encoding="utf-8"))})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _ids(config: generation.GenerationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id")}

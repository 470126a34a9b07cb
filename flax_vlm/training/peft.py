"""Adapters in the layout of PEFT: adapter_config.json, and adapter_model.safetensors under torch's names.

PEFT has one pair of factors for each torch Linear. Where that is several kernels of ours (GLM-4V's `query_key_value`),
their pairs stand in it side by side, each with rows of `lora_B` to itself and zeros elsewhere: as exact, and of a rank
that is so many times as high.

D, F widths of a kernel   r rank
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import linen as nn

from flax_vlm.layers.param_tree import flatten_params, unflatten_params
from flax_vlm.layers.stack import unstack_params
from flax_vlm.training.lora import A, B, LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = "base_model.model.{}.lora_{}.weight"
_TENSOR_OF = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
# Options of PEFT under which an adapter is something else than two factors of a kernel.
_UNSERVED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "use_qalora", "trainable_token_indices")


def save(
    folder: str | Path,
    model: nn.Module,
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    config: LoraConfig,
    base_model: str | None = None,
    key_style: Literal["v4", "v5"] = "v5",
) -> None:
    """Writes `adapters` of `model`, whose `params` may be shapes; layers may be stacked in both.

    Args:
      key_style: of the transformers that PEFT will run with, 4.x or 5.x; they name AltCLIP's layers differently.
      base_model: what the adapters were trained on, for PEFT to find: a folder or a repository on the Hub.
    """
    from safetensors.numpy import save_file

    from flax_vlm.convert.layouts import table
    from flax_vlm.convert.rules import plan_write

    arrays = {path: np.asarray(leaf) for path, leaf in flatten_params(adapters).items()}
    leaves = _one_entry_a_layer(params, arrays)
    kernels = {path: leaf for path, leaf in leaves.items() if not path.endswith((A, B))}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for target in plan_write(table(type(model).__name__, model.config), kernels, key_style):
        parts = [path.removesuffix("kernel") for path in target.flax]
        if any(part + A in leaves for part in parts):
            widths = [kernels[path].shape[-1] for path in target.flax]
            down, up = _side_by_side([(leaves.get(part + A), leaves.get(part + B)) for part in parts], widths)
            module = target.torch.removesuffix(".weight")
            tensors |= {_TENSOR.format(module, "A"): down, _TENSOR.format(module, "B"): up}
            ranks[module] = len(down)

    own = {module: rank for module, rank in ranks.items() if rank != config.rank}
    data = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": own,
        "alpha_pattern": {module: rank * config.scale for module, rank in own.items()},
        "inference_mode": True,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / WEIGHTS, {"format": "pt"})
    (Path(folder) / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path, model: nn.Module, params: Mapping[str, Any]) -> tuple[LoraConfig, dict[str, Any]]:
    """What `save` or PEFT wrote, with one entry a layer, for `lora.merged`; `params` may be shapes.

    Raises:
      ValueError: naming the tensors that fit no kernel of the model, or options that are not plain LoRA.
    """
    import ml_dtypes  # noqa: F401, without it safetensors does not read bfloat16
    from safetensors.numpy import load_file

    from flax_vlm.convert.layouts import layout_for
    from flax_vlm.convert.rules import match

    folder = Path(folder)
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = {name: data.get(name) for name in ("peft_type", "bias", *_UNSERVED)}
    if data.get("peft_type") != "LORA" or data.get("bias", "none") != "none" or any(map(data.get, _UNSERVED)):
        raise ValueError(f"{folder / CONFIG}: expected plain LoRA without biases, came {found}. Merge it with PEFT")
    tensors = load_file(folder / WEIGHTS)
    kernels = _one_entry_a_layer(params, {})
    modules = dict.fromkeys(map(_module, tensors))
    rows = layout_for(type(model).__name__, [f"{module}.weight" for module in modules], model.config)

    faults: list[str] = []
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for module in modules:
        down, up = (tensors.get(_TENSOR.format(module, factor)) for factor in "AB")
        hit = match(rows, f"{module}.weight")
        paths = [path for path in getattr(hit[0], "paths", lambda _: ())(hit[1]) if path in kernels] if hit else []
        widths = [kernels[path].shape[-1] for path in paths]
        expected = (kernels[paths[0]].shape[0], sum(widths)) if paths else None
        came = None if down is None or up is None else (down.shape[1], up.shape[0])
        if down is None or up is None or came != expected:
            faults.append(f"{module}: a kernel {expected} was expected, came the factors of one {came}")
            continue
        alpha, rank = _of_pattern(data, "alpha_pattern", module, data["lora_alpha"]), len(down)
        scale = alpha / (math.sqrt(rank) if data.get("use_rslora") else rank)
        for path, part in zip(paths, np.split(up, np.cumsum(widths)[:-1]), strict=True):
            factors[path] = down.T, part.T, scale
    if faults:
        listed = "\n  ".join(faults[:10])
        raise ValueError(f"{folder / WEIGHTS} does not fit a {type(model).__name__}, {len(faults)} faults:\n  {listed}")

    targets = "|".join(map(re.escape, factors))
    config = LoraConfig(rank=data["r"], alpha=data["lora_alpha"], targets=targets)
    adapters: dict[str, Any] = {}
    for path, (a, b, scale) in factors.items():
        module = path.removesuffix("kernel")
        adapters |= {module + A: a, module + B: b * np.asarray(scale / config.scale, b.dtype)}
    return config, unflatten_params(adapters)


def _one_entry_a_layer(params: Mapping[str, Any], adapters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adapters, and stand-ins of no size for the parameters: these say which layers of a scan there are."""
    shapes = {path: leaf.shape for path, leaf in flatten_params(nn.meta.unbox(params)).items()}
    stand_ins = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    return flatten_params(unstack_params(unflatten_params({**stand_ins, **adapters})))


def _side_by_side(pairs: Sequence[tuple[Any, Any]], widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The factors [R, D] and [F, R] of kernels side by side, F in all, R the sum of their ranks; None has none."""
    # In C order: safetensors writes an array of transposes wrong, and does not say so.
    down = np.ascontiguousarray(np.concatenate([a.T for a, _ in pairs if a is not None]))
    up = np.zeros((sum(widths), len(down)), down.dtype)
    row = column = 0
    for (_, b), width in zip(pairs, widths, strict=True):
        if b is not None:
            up[row : row + width, column : column + len(b)] = b.T
            column += len(b)
        row += width
    return down, up


def _module(name: str) -> str:
    """The torch module of a tensor's name; the name itself where it is none of an adapter."""
    found = _TENSOR_OF.fullmatch(name)
    return found[1] if found else name


def _of_pattern(data: Mapping[str, Any], option: str, module: str, default: float) -> float:
    """PEFT's patterns match the end of a module's name."""
    patterns = data.get(option) or {}
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)

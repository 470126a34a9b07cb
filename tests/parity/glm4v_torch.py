"""GLM-4V in torch, for comparisons that the golden arrays do not hold.

The original runs only under old releases of transformers. Its image tower and adapter are said here in torch's own
modules, under the names of the checkpoint, and `test_glm4v_vision.py` holds them to the golden arrays; the decoder is
that of transformers, which reads the pictures as embeddings at positions of their own.

B batch   P patches + 1   D width of the tower   W width of the decoder   g patches on a side
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from flax_vlm.models.glm4v import GLM4VConfig, GLM4VVisionConfig


class PatchEmbedding(nn.Module):
    def __init__(self, config: GLM4VVisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(len(images), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self, config: GLM4VVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.query_key_value(states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.dense(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GLM4VVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(states)))


class Layer(nn.Module):
    def __init__(self, config: GLM4VVisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.input_layernorm(self.attention(states))
        return states + self.post_attention_layernorm(self.mlp(states))


class Transformer(nn.Module):
    def __init__(self, config: GLM4VVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


class GLU(nn.Module):
    def __init__(self, config: GLM4VConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_proj = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        states = functional.gelu(self.norm1(self.linear_proj(states)))
        return self.dense_4h_to_h(functional.silu(self.gate_proj(states)) * self.dense_h_to_4h(states))


class EVA2CLIPModel(nn.Module):
    """Images [B 3 height width] to [B, 1 + (g / 2)^2 + 1, W]; state under the names behind `transformer.vision.`."""

    def __init__(self, config: GLM4VConfig) -> None:
        super().__init__()
        vision = config.vision_config
        assert vision is not None
        self.grid, self.scaling_factor = vision.grid, vision.scaling_factor
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = Transformer(vision)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = GLU(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.transformer(self.patch_embedding(images))[:, 1:].transpose(1, 2)
        merged = self.conv(patches.unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)
        begin, end = (each.expand(len(images), 1, -1) for each in (self.boi, self.eoi))
        return torch.cat([begin, self.linear_proj(merged), end], dim=1) / self.scaling_factor


class GLM4V(transformers.GlmForCausalLM):
    """Ids and images [B I 3 height width] to logits, padded on the left to the longest row; nothing is cached."""

    def __init__(self, glm_config: Any, config: GLM4VConfig) -> None:
        super().__init__(glm_config)
        self.vision = EVA2CLIPModel(config)
        self.begin, self.end = config.picture_ids

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, images: Tensor, labels: Tensor | None = None, **_: Any
    ) -> Any:
        labels = torch.full_like(input_ids, -100) if labels is None else labels
        seen = self.vision(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        rows = [
            self.slots(*(each[row][attention_mask[row] != 0] for each in (input_ids, labels)), seen[row])
            for row in range(len(input_ids))
        ]
        width = max(len(positions) for _, positions, _ in rows)
        padding = [width - len(positions) for _, positions, _ in rows]
        states, positions, labels = (
            torch.stack(
                [functional.pad(row[i], (*last, by, 0), value=fill) for row, by in zip(rows, padding, strict=True)]
            )
            for i, (last, fill) in enumerate((((0, 0), 0), ((), 0), ((), -100)))
        )
        mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        output = super().forward(
            inputs_embeds=states, position_ids=positions, attention_mask=mask.long(), use_cache=False
        )
        # transformers takes the loss in float32.
        output.loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output

    def slots(self, ids: Tensor, labels: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, positions and labels of a row: a picture's patches share the position of their placeholder."""
        opens, width = (ids == self.begin).nonzero().ravel(), pictures.shape[1]
        assert (ids[opens + 2] == self.end).all()
        counts = torch.ones_like(ids).index_fill(0, opens + 1, width - 2)
        positions = torch.arange(len(ids)).repeat_interleave(counts)
        states, labels = self.get_input_embeddings()(ids)[positions], labels[positions]
        for i, begin in enumerate(opens.tolist()):
            start = begin + i * (width - 3)
            states = torch.cat([states[:start], pictures[i], states[start + width :]])
            labels[start + 1 : start + width - 1] = -100
        labels[0] = -100  # nothing says the first
        return states, positions, labels

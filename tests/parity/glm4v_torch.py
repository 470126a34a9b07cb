"""GLM-4V's image tower and adapter in torch, for comparisons that the golden arrays do not hold.

The original runs only under old releases of transformers. This says the same in torch's own modules, under the names of
the checkpoint, and `test_glm4v_vision.py` holds it to the golden arrays.

B batch   P patches + 1   D width of the tower   W width of the decoder   g patches on a side
"""

import torch
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

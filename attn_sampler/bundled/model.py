"""A small LLaDA-like masked-diffusion language model.

The network is a bidirectional pre-norm transformer: RMSNorm, rotary positions, SwiGLU, no biases, one
embedding and one output projection. It is a stand-in for an 8-billion-parameter model on a laptop: the
attention call, the mask token and the padding mask look exactly as they do in the large models, so that
every part of the decoder meets the same shapes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_sampler.documents import parse_json, shown

__all__ = ["TinyMaskedLM", "TinyMaskedLMConfig", "load_weights", "save_weights"]


@dataclasses.dataclass(frozen=True)
class TinyMaskedLMConfig:
    """Sizes of a ``TinyMaskedLM``.

    Attributes
    ----------
    vocab_size
        Number of token ids, the mask token included.
    mask_token_id
        The id that stands for "not yet decided". It is read, never predicted.
    hidden_size, num_layers, num_heads, ffn_size
        Width, depth, attention heads (each ``hidden_size / num_heads`` wide) and SwiGLU width.
    rope_base
        Base of the geometric ladder of rotary frequencies.
    norm_eps
        Added to the mean square inside every RMSNorm.
    """

    vocab_size: int
    mask_token_id: int
    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    ffn_size: int = 192
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            positive = isinstance(value, int if whole else (int, float)) and 0 < value < (
                1 << 31 if whole else 1e9
            )
            if not positive and field.name != "mask_token_id":
                raise ValueError(
                    f"{field.name}: expected a positive {'integer' if whole else 'number'}, got {value!r}"
                )
        if not isinstance(self.mask_token_id, int) or not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id!r} is outside the vocabulary of {self.vocab_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads "
                f"({2 * self.num_heads}): rotary positions pair up the channels of a head"
            )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads


class _RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _rotate(
    x: Tensor,  # [B, H, T, D]
    cos: Tensor,  # [T, D / 2]
    sin: Tensor,  # [T, D / 2]
) -> Tensor:
    """Turn channel pairs (c, c + D/2) by the angle of their position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class _Attention(nn.Module):
    def __init__(self, config: TinyMaskedLMConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        # Angles are float32 whatever q and k are; the product goes back to the dtype of v.
        q = _rotate(q, cos, sin).to(v.dtype)
        k = _rotate(k, cos, sin).to(v.dtype)
        # Looked up on the module at every call: attention capture replaces this very attribute.
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if attn_mask is not None:
            # A sequence that is padding only attends to nothing; some attention backends answer NaN there.
            y = y.masked_fill(~attn_mask.any(dim=-1, keepdim=True), 0.0)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class _SwiGLU(nn.Module):
    def __init__(self, config: TinyMaskedLMConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class _Block(nn.Module):
    def __init__(self, config: TinyMaskedLMConfig) -> None:
        super().__init__()
        self.attention_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = _Attention(config)
        self.ffn_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = _SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attn_mask)
        return x + self.ffn(self.ffn_norm(x))


class TinyMaskedLM(nn.Module):
    """Bidirectional masked-diffusion language model.

    Parameters
    ----------
    config
        Sizes; kept as the attribute ``config``. ``mask_token_id`` is repeated as an attribute.

    Notes
    -----
    Logits are not shifted: row ``j`` predicts the token at position ``j``. Positions enter only through
    rotary differences, so padding on either side leaves the logits of the real tokens as they are
    (up to rounding).
    """

    inverse_frequency: Tensor  # [D / 2]
    is_mask_token: Tensor  # [V] bool

    def __init__(self, config: TinyMaskedLMConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_token_id = config.mask_token_id
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_norm = _RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inverse_frequency", config.rope_base**-exponent, persistent=False)
        is_mask_token = torch.arange(config.vocab_size) == config.mask_token_id
        self.register_buffer("is_mask_token", is_mask_token, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Fan-in scaling inside the blocks, small vocabulary tables, residual branches damped by depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        damping = 1.0 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                ends_branch = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=std * damping if ends_branch else std)

    def forward(
        self,
        tokens: Tensor,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:  # [B, T, V] float32
        """Predict every position at once.

        Parameters
        ----------
        tokens
            Token ids, ``mask_token_id`` where nothing is decided yet.
        attention_mask
            True at real tokens, False at padding; None where there is no padding. Padding is never
            attended to. The logits at padding positions, and in sequences that are padding only, are
            finite and mean nothing.

        Returns
        -------
        Tensor
            Logits; those of the mask token are -inf.
        """
        attn_mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        return self._run(tokens, torch.arange(tokens.shape[1], device=tokens.device), attn_mask)

    def forward_at(
        self,
        tokens: Tensor,  # [B, M] int64
        positions: Tensor,  # [B, M] int64
        attention_mask: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:  # [B, M, V] float32
        """``forward`` of tokens that stand at these positions and attend to one another alone.

        Rotary positions know no padding, so the mask is not read.
        """
        return self._run(tokens, positions, None)

    def forward_shadow(
        self,
        tokens: Tensor,  # [B, T] int64
        block: slice,  # C of the T positions
        attention_mask: Tensor | None = None,  # [B, T] bool
    ) -> Tensor:  # [B, T + C, V] float32
        """``forward``, and what C mask tokens predict in the place of the block, each seeing all the rest."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        place = torch.cat([position, position[block]])
        shadow = torch.arange(len(place), device=tokens.device) >= len(position)
        sees = ~(shadow | (shadow[:, None] & (place[:, None] == place)))  # no shadow, nor what it stands for
        sees |= torch.eye(len(place), dtype=torch.bool, device=sees.device)  # but itself
        sees = sees.expand(len(tokens), 1, -1, -1)
        masks = torch.full_like(tokens[:, block], self.mask_token_id)
        if attention_mask is not None:
            sees = sees & torch.cat([attention_mask.bool(), masks == masks], dim=1)[:, None, None, :]
        return self._run(torch.cat([tokens, masks], dim=1), place, sees)

    def _run(self, tokens: Tensor, position: Tensor, attn_mask: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        angle = position.float()[..., None] * self.inverse_frequency.float()
        if angle.dim() == 3:  # [B, 1, T, D / 2]
            angle = angle[:, None]
        cos, sin = angle.cos(), angle.sin()
        for block in self.blocks:
            x = block(x, cos, sin, attn_mask)
        logits = self.head(self.final_norm(x)).float()
        return logits.masked_fill(self.is_mask_token, float("-inf"))


def save_weights(model: TinyMaskedLM, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the model to ``path`` as float16 safetensors.

    The configuration goes into the file's metadata as JSON under ``config``; ``notes`` adds free text
    entries beside it.
    """
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    config = json.dumps(dataclasses.asdict(model.config), sort_keys=True)
    save_file(tensors, str(path), metadata={**(notes or {}), "config": config})


def load_weights(path: str | Path) -> TinyMaskedLM:
    """Read a model that ``save_weights`` wrote: float32 parameters, evaluation mode.

    Raises
    ------
    ValueError
        The file is no safetensors file, has no ``config`` entry in its metadata or a wrong one, or holds
        tensors that do not go with it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise ValueError(f"{path} holds no 'config' metadata: not written by save_weights")
            names = file.keys()
            try:
                config = _read_config(metadata["config"])
                _check_shapes(config, {name: file.get_slice(name).get_shape() for name in names})
            except ValueError as error:
                raise ValueError(f"{path} does not fit its config: {error}") from None
            model = TinyMaskedLM(config)
            model.load_state_dict({name: file.get_tensor(name).float() for name in names})
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    return model.eval()


def _read_config(text: str) -> TinyMaskedLMConfig:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {shown(values)}")
    try:
        return TinyMaskedLMConfig(**values)
    except TypeError as error:  # a name that is missing or not known
        raise ValueError(str(error)) from None


def _check_shapes(config: TinyMaskedLMConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where these are not the model's tensors, before memory is taken for them."""
    if config.num_layers > len(shapes):
        raise ValueError(f"num_layers {config.num_layers}, but there are {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            model = TinyMaskedLM(config)
    except RuntimeError as error:  # sizes whose product is beyond int64
        raise ValueError(str(error).splitlines()[0]) from None
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if (wanted := expected.get(name)) != (given := shapes.get(name)):
            raise ValueError(f"{name}: expected {wanted or 'nothing'}, got {given or 'nothing'}")

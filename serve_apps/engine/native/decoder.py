"""A whole decoder step in one native call, for models built like Llama.

Reads the weights out of transformers' module and computes what that computes; whoever uses it
proves so (`LoadedModel.prepare`). What is not built this way stays with transformers' code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from serve_apps.engine.native import layout
from serve_apps.engine.native.layout import Kept, Quantization, matrix
from serve_apps.engine.plan import StepPlan

if TYPE_CHECKING:
    from serve_apps.engine.attention import AttentionPlan
    from serve_apps.engine.kv_cache import KVCache

FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Root-mean-square norm, rotated halves, grouped heads, gated feed-forward, nothing else."""
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Angles that depend on the position alone, and not on how long the text has become."""
FIRST_POSITIONS = 1024


def unsupported(module: Any) -> str | None:
    """Return why the kernels cannot compute ``module``, or None when they can."""
    config = module.config
    if config.model_type not in FAMILY:
        return f"model type {config.model_type}"
    if config.hidden_act not in ACTIVATIONS:
        return f"activation {config.hidden_act}"
    if config.intermediate_size % layout.PANEL:
        return f"intermediate_size {config.intermediate_size} is no multiple of {layout.PANEL}"
    width = module.model.layers[0].self_attn.head_dim
    if width % layout.PANEL:
        return f"head_dim {width} is no multiple of {layout.PANEL}"
    rope = module.model.rotary_emb.rope_type
    if rope not in STATIC_ROPE or module.model.rotary_emb.inv_freq.shape[0] * 2 != width:
        return f"rotary embedding {rope!r}"
    if module.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {module.dtype}"
    return None


class NativeDecoder:
    """Weights packed for the kernels; ``forward`` may be called by one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        module: Any,
        quantization: Quantization = "none",
        made: Iterable[torch.Tensor] | None = None,
        empty: layout.Empty | None = None,
    ) -> None:
        """``made``: the ``tensors`` of another one of these weights; ``module`` is bare then.

        Else ``empty`` says where the packed ones are to lie. ``module`` is bare afterwards.
        """
        self._library, config = library, module.config
        self._kept = kept = Kept(made, empty)
        embedding = module.get_input_embeddings().weight.detach()
        self._embedding = kept.copy(lambda: layout.narrowed(embedding))
        self._rotary = module.model.rotary_emb
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        layers = module.model.layers
        self._layers = (layout.Layer * len(layers))(
            *(self._layer(layer, quantization) for layer in layers)
        )
        attention = layers[0].self_attn
        self._decoder = layout.Decoder(
            layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=attention.head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            activation=ACTIVATIONS[config.hidden_act],
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            layer=self._layers,
            last_norm=kept.vector(module.model.norm.weight),
            head=matrix(kept, [module.lm_head.weight], module.lm_head.bias, quantization),
        )
        layout.empty_all(module)
        self._cache: KVCache | None = None
        self.seconds: torch.Tensor | None = None
        """Set to float64 zeros, one for each of ``layout.PARTS``, to have time added up there."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The packed weights and the embedding, in an order that the model's shape gives."""
        return self._kept.tensors

    @property
    def weight_bytes(self) -> int:
        """Bytes of them."""
        return self._kept.nbytes

    def forward(
        self,
        plan: StepPlan,
        attending: AttentionPlan,
        adapted: layout.Adapted | None = None,
    ) -> torch.Tensor:
        """Compute a step; return float32 logits ``[B, vocab]`` of the tokens that want them."""
        if attending.cache is not self._cache:
            self._use(attending.cache)
        ids, positions, wanted = list[int](), list[int](), list[int]()
        for row in plan.rows:
            ids += row.ids
            positions += range(row.start, row.end)
            wanted += range(len(ids) - row.logits, len(ids))
        wanted_at = torch.tensor(wanted, dtype=torch.int32)
        x = F.embedding(torch.tensor(ids), self._embedding).float()
        cos, sin = (part[torch.tensor(positions)] for part in self._angles_to(max(positions)))
        logits = torch.empty(len(wanted), self._decoder.vocab, dtype=torch.float32)
        tables = attending.tables_RB
        numbers = (attending.t0_R, attending.starts_R, attending.counts_R, tables)
        step = layout.Step(
            tokens=len(ids),
            wanted=len(wanted),
            threads=torch.get_num_threads(),
            rows=layout.Rows(len(plan.rows), tables.shape[1], *(n.data_ptr() for n in numbers)),
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            wanted_at=wanted_at.data_ptr(),
            logits=logits.data_ptr(),
            adapted=adapted or layout.Adapted(),
            seconds=None if self.seconds is None else self.seconds.data_ptr(),
        )
        self._library.rh_step(ctypes.byref(self._decoder), ctypes.byref(step))
        attending.layers_called.extend(range(len(self._layers)))
        return logits

    def _use(self, cache: KVCache) -> None:
        for layer, (key, value) in zip(self._layers, cache.layers, strict=True):
            layer.cache.key, layer.cache.value = key.data_ptr(), value.data_ptr()
            layer.cache.type = layout.TYPES[key.dtype]
            layer.cache.heads, layer.cache.width = key.shape[1], key.shape[2]
        self._cache = cache

    def _angles_to(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines ``[positions, width]``, computed by the model's own code."""
        if self._angles is None or position >= len(self._angles[0]):
            count = FIRST_POSITIONS
            while count <= position:
                count *= 2
            like = torch.empty(1, dtype=torch.float32)
            cos, sin = self._rotary(like, torch.arange(count)[None])
            self._angles = (cos[0].contiguous(), sin[0].contiguous())
        return self._angles

    def _layer(self, layer: Any, quantization: Quantization) -> layout.Layer:
        kept, attention, mlp = self._kept, layer.self_attn, layer.mlp
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [linear.bias for linear in three]
        made = layout.Layer(
            input_norm=kept.vector(layer.input_layernorm.weight),
            query_norm=kept.vector(_weight(attention, "q_norm")),
            key_norm=kept.vector(_weight(attention, "k_norm")),
            inner_norm=kept.vector(layer.post_attention_layernorm.weight),
            qkv=matrix(
                kept,
                [linear.weight for linear in three],
                None if biases[0] is None else torch.cat(biases),
                quantization,
            ),
            output=matrix(kept, [attention.o_proj.weight], attention.o_proj.bias, quantization),
            gate_up=matrix(
                kept, [mlp.gate_proj.weight], None, quantization, partner=mlp.up_proj.weight
            ),
            down=matrix(kept, [mlp.down_proj.weight], None, quantization),
            cache=layout.Cache(window=_window(attention)),
        )
        # The packed copies replace the weights: a version's memory is not held twice.
        layout.empty_all(layer)
        return made


def _window(attention: Any) -> int:
    """Return how many tokens back a layer sees, itself included; 0 for all."""
    if attention.config.model_type == "mistral":  # its layers are alike, and ask the config
        return attention.config.sliding_window or 0
    return getattr(attention, "sliding_window", None) or 0


def _weight(parent: Any, name: str) -> torch.Tensor | None:
    child = getattr(parent, name, None)
    weight: torch.Tensor | None = None if child is None else child.weight
    return weight

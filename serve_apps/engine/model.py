"""One version's weights on one rank: loaded through transformers, proven, run on packed rows."""

from __future__ import annotations

import copy
import ctypes
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cluster.errors import EngineError, RoundhouseError
from cluster.weights.layout import Tensor
from serve_apps.engine import attention, lora, packing, tensor_parallel
from serve_apps.engine.kv_cache import Geometry, KVCache
from serve_apps.engine.native import build
from serve_apps.engine.native.decoder import FAMILY, NativeDecoder, unsupported
from serve_apps.engine.native.layout import Quantization
from serve_apps.engine.native.room import Room
from serve_apps.engine.partition import check_directory
from serve_apps.engine.plan import Row, StepPlan, blocks_for

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far our logits may be from the model's own, relative to their largest; rounding only."""

log = logging.getLogger(__name__)


class LoadedModel:
    """One rank's share of a version, once ``prepare`` has proven it.

    The proof: our attention ran once in each layer and changed nothing.
    """

    def __init__(
        self,
        module: Any,
        directory: Path,
        ranks: int = 1,
        quantization: Quantization = "none",
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype`` is what is computed in, by default the weights' own."""
        self._module, self._ranks, self._quantization = module, ranks, quantization
        # Bare, as it is where its weights are mapped, a module lies on no device
        cpu = torch.device("cpu")
        self.device: torch.device = cpu if module.device.type == "meta" else module.device
        self.adapters = lora.Adapters(module, ranks, self.device)
        self.native: NativeDecoder | None = None
        """Computes whole steps, where the kernels know this model."""
        self._group: Any | None = None
        config = module.config.get_text_config()
        heads = config.num_attention_heads
        self.model_type: str = module.config.model_type
        self.vocab_size: int = config.vocab_size
        self.context: int | None = _context(config)
        self.dtype: torch.dtype = dtype or module.dtype
        self.geometry = Geometry(
            layers=config.num_hidden_layers,
            kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // ranks,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.dtype,
        )
        self.directory = directory
        self.content: Mapping[str, Tensor] | None = None
        """What it was made of, by hash, where it came from the shelf."""
        self.weight_bytes = 0
        """Bytes of the weights that this rank holds, known once prepared."""
        self.linear_weights = sum(
            layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear)
        )
        """Numbers that one token is multiplied with."""

    def forward(
        self, plan: StepPlan, attending: attention.AttentionPlan, sampling: bool = True
    ) -> torch.Tensor:
        """Compute one step as planned; return the logits ``[B, vocab]`` that its rows want.

        A rank that does not sample (``sampling=False``) leaves the output head out where it can.
        """
        if self.native is not None:
            with torch.inference_mode():
                return self.native.forward(plan, attending, self.adapters.for_native(plan))
        ids, positions, last = list[int](), list[int](), list[int]()
        for row in plan.rows:
            ids += row.ids
            positions += range(row.start, row.end)
            last += range(len(ids) - row.logits, len(ids))
        if not last:
            last = [len(ids) - 1]  # a chunk inside a prompt: one row is computed and dropped
        if not sampling and not self._head_is_shared:
            last = []
        with torch.inference_mode(), attention.computing(attending), lora.computing(plan):
            out = self._module(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(last, dtype=torch.long, device=self.device),
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    @property
    def _head_is_shared(self) -> bool:
        return isinstance(self._module.get_output_embeddings(), tensor_parallel.GatheredLinear)

    @property
    def bare(self) -> Any | None:
        """Its module, where our kernels have all its numbers; for one other version at a time."""
        return None if self.native is None else self._module

    def again(self) -> LoadedModel:
        """Return the same weights as another version, which has adapters of its own.

        Only what the native kernels compute: elsewhere adapters change the layers themselves.
        """
        assert self.native is not None
        twin = copy.copy(self)
        twin.adapters = lora.Adapters(self._module, self._ranks, self.device)
        return twin

    def close(self) -> None:
        """Leave the process group that this version was sharded over."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def prepare(
        self,
        step_timeout_s: float = 60.0,
        proven: bool = False,
        made: Sequence[torch.Tensor] | None = None,
        shareable: bool = False,
        room: Room | None = None,
    ) -> None:
        """Pack the weights, put our attention in, and prove both on a few tokens.

        Where a version that differs in its numbers alone was ``proven`` before, it is enough that
        these give logits at all, and so where ``made`` is what another rank packed and proved.
        What others should map (``shareable``) is in no library's own layout. What our kernels read
        lies in ``room``, where there is one. EngineError names the model type and what does not
        hold.

        Several architectures accept a foreign attention by name and never call it; others add
        terms of their own to the scores. Both would answer wrongly without a word.
        """
        parameters = inspect.signature(self._module.forward).parameters
        if missing := {"position_ids", "logits_to_keep"} - set(parameters):
            raise self._refused(f"its forward takes no {', '.join(sorted(missing))}")
        if self._ranks > 1:
            self._group = tensor_parallel.make_local(self._module, step_timeout_s)
        if self._quantization != "none" and made is None:
            packing.round_linears(self._module)
        kernels = self._kernels()
        if not kernels and self._module.dtype != self.dtype:
            self._module.to(self.dtype)
        known = proven or made is not None
        tokens = 3 if known else 41  # several blocks, where keys and values are to be proven
        length = min(tokens, self.context or tokens)
        ids = [(7 * i + 1) % self.vocab_size for i in range(length)]
        wanted = None if known else self._reference(ids, bool(kernels))
        if kernels:
            empty = room.empty if room else None
            self.native = NativeDecoder(kernels, self._module, self._quantization, made, empty)
            self.weight_bytes = self.native.weight_bytes
        else:
            packing.pack_linears(self._module, self._quantization, shareable)
            self.weight_bytes = packing.weight_bytes(self._module)
            self._module.set_attn_implementation(attention.NAME)
        ours, called = self._probe_logits(ids)
        if called != list(range(self.geometry.layers)):
            raise self._refused(
                f"our attention was called for layers {called} of {self.geometry.layers}"
            )
        if not ours.isfinite().all():
            raise self._refused("its logits are not finite numbers: these weights are broken")
        if wanted is None:
            return
        apart = float((ours - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
        if not apart <= TOLERANCE[self.dtype]:
            raise self._refused(f"its logits differ by {apart:.1e} from its own attention's")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that this rank reads of its weights, in an order that the model's shape gives."""
        return self.native.tensors if self.native else packing.tensors_of(self._module)

    def settle(self, made: Sequence[torch.Tensor]) -> None:
        """Use equal ``tensors`` in the place of its own, which are freed."""
        if self.native:
            library = build.library()
            assert library is not None
            self.native = NativeDecoder(library, self._module, self._quantization, made)
        else:
            packing.settle(self._module, made)

    def _reference(self, ids: list[int], widen: bool) -> torch.Tensor:
        """Return the model's own logits ``[2, vocab]`` of the first token and of the last."""
        # The model's definition: transformers' sdpa leaves out what it cannot do, as soft caps
        self._module.set_attn_implementation("eager")
        row = torch.tensor([ids], device=self.device)
        with torch.inference_mode(), widened(self._module) if widen else nullcontext():
            logits: torch.Tensor = self._module(input_ids=row, use_cache=False).logits[0].float()
        # Row 0 is a lone token, row 1 the last one of the whole text, which comes in chunks.
        return logits[[0, len(ids) - 1]]

    def _kernels(self) -> ctypes.CDLL | None:
        """Return the native kernels if they compute this model whole."""
        if self.device.type != "cpu" or self._ranks > 1:
            return None
        if why := unsupported(self._module):
            log.info("computing %s through transformers' code: %s", self.directory.name, why)
            return None
        return build.library()

    def _probe_logits(self, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
        count, half = blocks_for(len(ids)), len(ids) // 2
        cache = KVCache(self.geometry, count + 1, self.device)
        blocks = list(range(count, 0, -1))
        chunks = [Row(blocks, 0, ids[:half], 0), Row(blocks, half, ids[half:-1], 0)]
        steps = [[chunk] for chunk in chunks if chunk.ids]
        steps += [[Row([0], 0, ids[:1], 1), Row(blocks, len(ids) - 1, ids[-1:], 1)]]
        try:
            for n, rows in enumerate(steps):
                plan = StepPlan(n, "", tuple(rows))
                attending = attention.plan(plan, cache)
                logits = self.forward(plan, attending)
        except RoundhouseError as error:
            raise self._refused(str(error)) from None
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise self._refused(f"it failed under our attention: {error}") from error
        return logits.float(), attending.layers_called

    def _refused(self, why: str) -> EngineError:
        return EngineError(
            f"model type {self.model_type!r} ({self.directory.name}) cannot be served by this "
            f"engine: {why}; use a decoder that transformers runs through its attention interface"
        )


@contextmanager
def widened(module: Any) -> Iterator[None]:
    """Within this block ``module`` computes in float32, one layer's weights widened at a time.

    The kernels' sums are float32 whatever the weights are; a reference that rounds to bfloat16
    after every operation would be the worse of the two.
    """

    def widen(layer: Any, _: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(layer: Any, _: Any, __: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    dtype, hooks = module.dtype, list[Any]()
    try:
        for layer in module.modules():
            hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _context(config: Any) -> int | None:
    """Return how many positions a request may have.

    A model with ``longrope`` turns to other frequencies beyond its original length, for all
    tokens of a pass and with keys in the cache that were turned by the old ones: it stays below.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(layers for layers in rope.values() if isinstance(layers, dict))):
        if one.get("rope_type") == "longrope":
            limits.append(one.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def load_model(
    directory: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = "none",
) -> LoadedModel:
    """Read a Hugging Face directory of a causal decoder whole, and prove it; see `read_model`."""
    loaded = read_model(directory, device, dtype, quantization=quantization)
    loaded.prepare()
    return loaded


def read_model(
    directory: str,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int = 1,
    quantization: Quantization = "none",
    state: Mapping[str, torch.Tensor] | None = None,
    like: LoadedModel | None = None,
) -> LoadedModel:
    """Read this rank's share of a causal decoder; safetensors only, no remote code.

    ``state`` has the weights where ``directory`` has only what they need beside them; of ``like``,
    which has the same configuration, the layers are used again. With several ranks each must call
    this at the same time. Raises EngineError for what is no such model, ConfigError for one that
    does not divide among the ranks.
    """
    # Imported here: the auto classes take seconds, and only a rank that loads needs them.
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    attention.register()
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise EngineError(f"{directory}: no config.json there, so no model to load")
    check_directory(path, ranks, directory)
    try:
        sharding = tensor_parallel.sharding_arguments(path, ranks)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if state is not None and device.type == "cpu" and ranks == 1:
            module = _made_of(config, dtype, quantization, state, like and like.bare)
            if module is not None:
                return LoadedModel(module, path, ranks, quantization, dtype)
        narrow = device.type == "cpu" and ranks == 1 and quantization == "none"
        read_as = _read_as(config, dtype, state) if narrow else dtype
        if state is None:
            model_class, given = AutoModelForCausalLM, {}
        else:
            model_class, given = _class_of(config), {"state_dict": dict(state)}
        module = model_class.from_pretrained(
            None if state else path,
            config=config,
            dtype=read_as,
            trust_remote_code=False,
            use_safetensors=True,
            **given,
            **sharding,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngineError(f"{directory} cannot be loaded as a causal decoder: {error}") from error
    module.to(device).eval().requires_grad_(False)
    return LoadedModel(module, path, ranks, quantization, dtype)


def bare_model(
    directory: str, dtype: torch.dtype, quantization: Quantization = "none"
) -> LoadedModel | None:
    """Return a model without weights, to be prepared with what another rank made of them.

    None where the native kernels do not compute the whole of it: its layers want to be read.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    stored = _read_as(config, dtype, None) if quantization == "none" else dtype
    module = _bare(config, stored)
    return module and LoadedModel(module, Path(directory), 1, quantization, dtype)


def _bare(config: Any, dtype: torch.dtype) -> Any | None:
    """Return transformers' module without memory for its weights, if our kernels know it."""
    if config.model_type not in FAMILY or build.library() is None:
        return None
    with torch.device("meta"):
        module = _class_of(config)._from_config(config, dtype=dtype)
    # its angles follow from the configuration, and are in no file
    module.model.rotary_emb = type(module.model.rotary_emb)(config)
    return None if unsupported(module) else module.eval().requires_grad_(False)


def _made_of(
    config: Any,
    dtype: torch.dtype,
    quantization: Quantization,
    state: Mapping[str, torch.Tensor],
    bare: Any | None = None,
) -> Any | None:
    """Return a module whose parameters are the tensors of ``state``, until they are packed.

    ``bare`` is one that has none yet. None where it takes transformers to read them: other names,
    shapes or types, other models.
    """
    read_as = _read_as(config, dtype, state) if quantization == "none" else dtype
    if {tensor.dtype for tensor in state.values()} != {read_as}:
        return None
    module = bare if bare is not None and bare.dtype == read_as else _bare(config, read_as)
    if module is None:
        return None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set[str]()
    shapes = {name: one.shape for name, one in module.named_parameters() if name not in tied}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        return None
    module.load_state_dict(state, strict=False, assign=True)
    if tied:
        module.lm_head.weight = module.get_input_embeddings().weight
    return module.requires_grad_(False)


def _class_of(config: Any) -> Any:
    """Return the class that the auto classes choose: they themselves insist on a path."""
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is no causal decoder")
    return _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING)


def _read_as(
    config: Any, dtype: torch.dtype, state: Mapping[str, torch.Tensor] | None
) -> torch.dtype:
    """Return bfloat16 where the weights are stored so and our kernels widen them as they go."""
    stored = next(iter(state.values())).dtype if state else config.get_text_config().dtype
    if stored == torch.bfloat16 and config.model_type in FAMILY and build.library():
        return torch.bfloat16
    return dtype

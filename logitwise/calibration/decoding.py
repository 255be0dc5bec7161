"""One token after another: the key-value cache, and the step that reads a token of each answer.

A small model's step is bound by launches, so on a GPU it is recorded as a CUDA graph and replayed (`Decoder`).
"""

import inspect
import math
from dataclasses import dataclass
from typing import cast
from weakref import WeakSet

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from logitwise.errors import CalibrationError
from logitwise.recording import recording


@dataclass(frozen=True)
class _Recording:
    """A recorded step: the tensors it reads, and the one it writes."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    logits: Tensor

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


CACHE_STEP = 64  # positions by which the cache grows; copying it costs about one forward of the batch
LIVE_SHARE = 0.75  # below this share of unfinished answers the cache is compacted
RECORDED_CACHE_STEP, RECORDED_LIVE_SHARE = 256, 0.5  # the same where each change of shape is recorded again


UNRECORDED: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose step could not be recorded: it is not tried again."""


class Decoder:
    """A model with its key-value cache.

    Attention reads the whole cache at every step, so the cache is kept small and grows in steps.

    Every layer keeps all positions, those with sliding windows too: their masks hide what they are not to see.

    On a GPU a step of one token a row is recorded once, after the first of its shape, and replayed; where the model's
    forward waits for the GPU it is not.

    Args:
        model: in evaluation mode.
        tokens: how many the prompts have, padded.
        most: how many there will be at the most.

    Errors: CalibrationError where a layer keeps something else than keys and values (a state space, shared keys).
    """

    def __init__(self, model: PreTrainedModel, tokens: int, most: int) -> None:
        self.model, self.most = model, most
        self.records = model.device.type == "cuda" and model not in UNRECORDED
        self.live_share = RECORDED_LIVE_SHARE if self.records else LIVE_SHARE
        self.capacity = self._room_for(tokens)
        self._layers = [StaticLayer(self.capacity) for _ in range(_layers(model.config))]
        self._cache = Cache(layers=[*self._layers])
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._warm = False
        self._recording: _Recording | None = None

    def _room_for(self, tokens: int) -> int:
        step = RECORDED_CACHE_STEP if self.records else CACHE_STEP
        return min(math.ceil(tokens / step) * step, self.most)

    def __call__(
        self,
        ids: Int64[Tensor, "batch tokens"],
        mask: Int64[Tensor, "batch capacity"],
        positions: Int64[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch vocabulary"]:
        """The logits after the last of the tokens; they are overwritten by the next step.

        Args:
            ids: the tokens that follow those that the cache has.
            mask: 0 where a prompt is padded; the same tensor at every step until `resize`.
            positions: of the tokens in their own rows.
        """
        if ids.shape[1] > 1 or not self.records or not self._warm:
            self._warm = ids.shape[1] == 1  # kernels are chosen and loaded before they are recorded
            return self._run(ids, mask, positions)
        if self._recording is None:
            self._recording = self._record(ids, mask, positions)
        return self._run(ids, mask, positions) if self._recording is None else self._recording(ids, positions)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        return cast(Tensor, output.logits[:, -1])

    def _record(self, ids: Tensor, mask: Tensor, positions: Tensor) -> _Recording | None:
        """The step as a graph; recording runs nothing. None, and no more tries, where the model does not allow it."""
        graph, ids, positions = torch.cuda.CUDAGraph(), ids.clone(), positions.clone()
        try:
            with recording(ids.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._run(ids, mask, positions)
        except RuntimeError:
            self.records = False
            UNRECORDED.add(self.model)
            return None
        return _Recording(graph, ids, positions, logits)

    def resize(self, kept: Int64[Tensor, " kept"], tokens: int) -> None:
        """Keep some rows, and make room for `tokens` tokens of each, or some more."""
        self._warm, self._recording = False, None
        before, self.capacity = self.capacity, self._room_for(tokens)
        for layer in self._layers:
            keys, values = (cast(Tensor, part).index_select(0, kept) for part in (layer.keys, layer.values))
            layer.keys, layer.values = (pad(part, (0, 0, 0, self.capacity - before)) for part in (keys, values))
            layer.batch_size, layer.max_cache_len = len(kept), self.capacity


def _layers(config: PreTrainedConfig) -> int:
    """How many layers keep keys and values.

    Errors: CalibrationError where one keeps something else.
    """
    layers = StaticCache(config, 1).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise CalibrationError(
                "this model cannot write its own calibration text",
                f"layer {index} keeps a {type(layer).__name__} where keys and values were expected",
                "give text with --calibration text:FILE or jsonl:FILE",
            )
    return len(layers)

"""A model without its weights: blocks, slots, embedding, head, and the proof that replaying them is the model.

transformers' own modules are built with empty parameters. How a block wants to be called (masks, rotary tables,
per-layer types) is not written down for each family but recorded: the model's own forward runs with every block
replaced by a stub that notes its arguments. What follows the last block is recorded the same way. `Skeleton.prove`
compares the replay with the model's own forward; a family is supported when that difference is nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from logitwise.activations import Streams
from logitwise.attention import ordered_attention
from logitwise.carrying import through
from logitwise.errors import CalibrationError, SourceError
from logitwise.head import Head
from logitwise.memory import ran_out
from logitwise.source.base import Source

PROOF_BLOCKS = 8
PROOF_TOKENS = 48
PROOF_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Slot:
    """A weight that can be quantized.

    Args:
        name: its parameter's name in the model (`model.layers.0.mlp.up_proj.weight`).
        key: the same inside its block (`mlp.up_proj.weight`).
        block: the block it is in.
        out_features, in_features: its shape as quantizers see it, [out, in].
        transposed: the parameter is stored [in, out] (GPT-2's Conv1D).
    """

    name: str
    key: str
    block: int
    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def module(self) -> str:
        """The name of the module that holds it (`model.layers.0.mlp.up_proj`)."""
        return self.name.removesuffix(".weight")

    def get(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "out in"]:
        """The slot's weight, [out, in], out of its block's parameters."""
        parameter = weights[self.key]
        return parameter.T.contiguous() if self.transposed else parameter

    def put(self, weight: Float[Tensor, "out in"]) -> Tensor:
        """`weight` [out, in] in the shape of the parameter."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Call:
    """How the model calls one block, hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """Raised by a stub to leave the model's forward once what it was run for is known."""


class _Stand(nn.Module):
    """Stands in a block's place inside the model and calls `act` in its stead."""

    def __init__(self, block: nn.Module, act: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        # Hidden from nn.Module, so that the block's empty parameters are not this module's.
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "act", act)

    def __getattr__(self, name: str) -> Any:
        # A model's forward may read attributes off its blocks (their layer type, say).
        return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "act")(hidden, Call(args, kwargs))


TOKENS_AT_ONCE = 1 << 14
"""Tokens that go through a block together on a GPU where no gradient is wanted."""


class Skeleton:
    """The modules of a source's model, its blocks in order, and how to run them.

    Args:
        source: where the weights come from.
        device: where everything is computed.
        dtype: the type it is computed in.

    Errors: SourceError where the model cannot be taken apart into blocks.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        config = deepcopy(source.config)
        config.use_cache = False
        # PyTorch's fused attention has no soft-cap.
        attention = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **attention)
        self.model.eval().requires_grad_(False)
        self.model.tie_weights()
        self.blocks_name, self.blocks = _find_blocks(self.model)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._wraps_output = False

    def __len__(self) -> int:
        return len(self.blocks)

    # ---- slots and weights

    def slots(self, block: int) -> list[Slot]:
        """Every weight of a block that can be quantized, in the model's order.

        Errors: SourceError where the block holds stacked weights (a mixture of experts), not supported yet.
        """
        found: list[Slot] = []
        for path, module in self.blocks[block].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                transposed = isinstance(module, Conv1D)
                rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
                key = f"{path}.weight"
                found.append(Slot(f"{self.blocks_name}.{block}.{key}", key, block, rows, columns, transposed))
        keys = {slot.key for slot in found}
        for key, parameter in self.blocks[block].named_parameters():
            if parameter.dim() > 2 or (parameter.dim() == 2 and key not in keys):
                raise SourceError(
                    f"{self.blocks_name}.{block}.{key} has shape {tuple(parameter.shape)}",
                    "only the weights of dense linear layers can be quantized yet, not stacked experts",
                    "choose a dense model",
                )
        return found

    def linear_modules(self) -> list[str]:
        """The name of every linear module of the model, inside blocks and outside."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def load_block(
        self, block: int, source: Source | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """A block's parameters by their names in the block, on the device, in the computing type unless told."""
        source = source or self.source
        prefix = f"{self.blocks_name}.{block}."
        return {key: self._load(source, prefix + key, dtype) for key, _ in self.blocks[block].named_parameters()}

    def _load(self, source: Source, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return source.read(name).to(self.device).to(dtype or self.dtype)  # a GPU converts faster than a CPU

    @contextmanager
    def outside(self, source: Source | None = None) -> Iterator[None]:
        """The parameters outside the blocks (embedding, final norm, head) are in their modules, inside this context."""
        source = source or self.source
        filled = []
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(self.blocks_name + ".") and not self._is_untied_output(parameter):
                filled.append((name, parameter))
                self._set(name, self._load(source, name))
        try:
            yield
        finally:
            for name, parameter in filled:
                self._set(name, parameter)

    def _is_untied_output(self, parameter: Tensor) -> bool:
        """Whether this is a vocabulary projection of its own, which only the head needs."""
        tied = self.model.config.get_text_config().tie_word_embeddings
        return not tied and parameter is self.model.get_output_embeddings().weight

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        self.model.get_submodule(path)._parameters[leaf] = parameter

    # ---- running

    def run(
        self, block: int, weights: Mapping[str, Tensor], hidden: Float[Tensor, "rows tokens d"], call: Call
    ) -> Float[Tensor, "rows tokens d"]:
        """One block's output on `hidden` states, with the given parameters."""
        with ordered_attention():
            output = functional_call(self.blocks[block], dict(weights), (hidden, *call.args), call.kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def run_seen(
        self, block: int, weights: Mapping[str, Tensor], hidden: Float[Tensor, "rows tokens d"], call: Call
    ) -> tuple[Float[Tensor, "rows tokens d"], dict[str, Tensor]]:
        """One block's output, and what each of its slots reads, by the slot's key: [..., in]."""
        seen: dict[str, Tensor] = {}

        def see(key: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[key] = inputs[0]

        hooks = []
        for slot in self.slots(block):
            module = self.blocks[block].get_submodule(slot.key.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(partial(see, slot.key)))
        try:
            return self.run(block, weights, hidden, call), seen
        finally:
            for hook in hooks:
                hook.remove()

    def rows_at_once(self, batch: int, tokens: int) -> int:
        """How many rows of `tokens` tokens go through a block together without a gradient: a GPU wants many."""
        return max(batch, TOKENS_AT_ONCE // tokens) if self.device.type == "cuda" else batch

    def advance(
        self,
        block: int,
        weights: Mapping[str, Tensor],
        hidden: Float[Tensor, "rows tokens d"],
        call: Call,
        batch: int,
    ) -> None:
        """`hidden` in place becomes one block's output, `batch` rows at a time."""
        through(hidden, lambda part: self.run(block, weights, part, call), batch, self.device)

    def embed(
        self,
        ids: Int64[Tensor, "rows tokens"],
        source: Source | None = None,
        batch: int = 8,
        streams: Streams | None = None,
    ) -> Float[Tensor, "rows tokens d"]:
        """The hidden states that enter the first block; on the device where no other place is given."""
        self.check_positions(ids.shape[1])
        place = streams or Streams.on(self.device)
        made: list[Tensor] = []
        done = 0

        def stop(hidden: Tensor, call: Call) -> None:
            nonlocal done
            if not made:
                made.append(place.empty((len(ids), *hidden.shape[1:]), hidden.dtype))
            made[0][done : done + len(hidden)] = hidden
            done += len(hidden)
            raise _Reached

        with self.outside(source), self._standing(lambda block: stop), torch.no_grad():
            for rows in ids.to(self.device).split(batch):
                self._run_base(rows)
        return made[0]

    def check_positions(self, tokens: int) -> None:
        """Refuses rows that are longer than a model reads whose positions are learned; others read on.

        Errors: CalibrationError.
        """
        room: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        words = self.model.get_input_embeddings()
        others = [m for m in self.model.base_model.modules() if isinstance(m, nn.Embedding) and m is not words]
        learned = any(m.num_embeddings - getattr(m, "offset", 0) == room for m in others)
        if learned and tokens > room:
            raise CalibrationError(
                f"rows of {tokens} tokens are longer than {self.source.name} reads",
                f"it has learned {room} positions",
                f"choose --row-tokens {room} or fewer",
            )

    def calls(self, tokens: int) -> list[Call]:
        """How each block is called on rows of `tokens` tokens; arguments fit any number of rows."""
        calls: dict[int, Call] = {}
        entered: list[Tensor] = []

        def note(block: int) -> Callable[[Tensor, Call], Any]:
            def act(hidden: Tensor, call: Call) -> Any:
                if entered and hidden is not entered[0]:
                    raise _WrongOutput
                entered.append(hidden)
                calls[block] = call
                return (hidden,) if self._wraps_output else hidden

            return act

        self.check_positions(tokens)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        with self.outside(), torch.no_grad():
            for self._wraps_output in (False, True):
                calls.clear()
                entered.clear()
                try:
                    with self._standing(note):
                        self._run_base(ids)
                    break
                except (_WrongOutput, IndexError):
                    continue
        if len(calls) != len(self):
            raise SourceError(
                f"{self.source.name} called {len(calls)} of its {len(self)} blocks",
                "its forward does not pass one hidden state through every block in turn",
                "this architecture is not supported",
            )
        return [calls[block] for block in range(len(self))]

    def head(self, source: Source | None = None) -> Head:
        """What follows the last block, with its weights."""
        source = source or self.source
        called: list[nn.Module] = []
        last = len(self) - 1

        def act_of(block: int) -> Callable[[Tensor, Call], Any]:
            def act(hidden: Tensor, call: Call) -> Any:
                if block == last:
                    called.clear()
                return (hidden,) if self._wraps_output else hidden

            return act

        inside = {id(module) for module in self.blocks.modules()}
        leaves = [m for m in self.model.base_model.modules() if not list(m.children()) and id(m) not in inside]
        hooks = [leaf.register_forward_pre_hook(lambda module, _: called.append(module)) for leaf in leaves]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self.outside(source), torch.no_grad():
            try:
                with self._standing(act_of):
                    self._run_base(ids)
            finally:
                for hook in hooks:
                    hook.remove()
            names = {id(module): name for name, module in self.model.named_modules()}
            after = {names[id(module)]: deepcopy(module) for module in called}
        # A CPU has no product of 16-bit factors that keeps more bits than they have: logits would lose theirs.
        dtype = torch.promote_types(self.dtype, torch.float32) if self.device.type == "cpu" else self.dtype
        weight, bias = self._vocabulary_projection(source, dtype)
        config = self.model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return Head(after, weight, bias, scale, getattr(config, "final_logit_softcapping", None))

    def _vocabulary_projection(self, source: Source, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        output = self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        tied = self.model.config.get_text_config().tie_word_embeddings
        weight = names[id(self.model.get_input_embeddings() if tied else output)] + ".weight"
        if getattr(output, "bias", None) is None:
            return self._load(source, weight, dtype), None
        return self._load(source, weight, dtype), self._load(source, names[id(output)] + ".bias", dtype)

    @contextmanager
    def _projecting(self, source: Source) -> Iterator[None]:
        """The model's vocabulary projection has its weights, inside this context."""
        output = self.model.get_output_embeddings()
        empty = dict(output._parameters)
        weight, bias = self._vocabulary_projection(source)
        output._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            output._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        try:
            yield
        finally:
            output._parameters.update(empty)

    def _run_base(self, ids: Tensor) -> None:
        with suppress(_Reached):
            self.model.base_model(input_ids=ids, use_cache=False)

    @contextmanager
    def _standing(self, act_of: Callable[[int], Callable[[Tensor, Call], Any]]) -> Iterator[None]:
        """The model has stand-ins for its blocks, inside this context."""
        parent, _, leaf = self.blocks_name.rpartition(".")
        stands = nn.ModuleList(_Stand(block, act_of(index)) for index, block in enumerate(self.blocks))
        self.model.get_submodule(parent)._modules[leaf] = stands
        try:
            yield
        finally:
            self.model.get_submodule(parent)._modules[leaf] = self.blocks

    # ---- proof

    def prove(self) -> float:
        """The largest difference between replayed logits and those of the model's own forward, on random tokens.

        Both run the same blocks in float32 on two rows of random tokens: all of them, or of a deep model eight spread
        evenly (the others pass their input through on both sides). Nothing but one block is in memory at a time.

        Errors: SourceError with the difference where it exceeds 1e-5 of the largest logit.
        """
        dtype, self.dtype = self.dtype, torch.float32
        try:
            own, replayed = self.proof_logits()
        except SourceError:
            raise
        except Exception as error:  # the model's own code, called in a way it may not expect
            if ran_out(error):
                raise
            raise SourceError(
                f"{self.source.name} cannot be replayed block by block",
                f"its forward stopped with {type(error).__name__}: {error}",
                "this architecture is not supported; please report it with its config.json",
            ) from error
        finally:
            self.dtype = dtype
        difference = float((own - replayed).abs().max())
        if not difference <= PROOF_TOLERANCE * max(1.0, float(own.abs().max())):
            raise SourceError(
                f"{self.source.name} cannot be replayed block by block",
                f"streamed logits differ from the model's own by up to {difference:.3g} on random tokens",
                "this architecture is not supported; please report it with its config.json",
            )
        return difference

    def proof_logits(self) -> tuple[Tensor, Tensor]:
        """Logits of the model's own forward and of its replay, on the tokens and blocks of the proof."""
        picked = {round(i * (len(self) - 1) / (PROOF_BLOCKS - 1)) for i in range(PROOF_BLOCKS)}
        generator = torch.Generator().manual_seed(0)
        vocabulary: int = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (2, PROOF_TOKENS), generator=generator).to(self.device)
        own = self._own_logits(ids, picked)
        hidden = self.embed(ids)
        with torch.no_grad():
            for block, call in enumerate(self.calls(PROOF_TOKENS)):
                if block in picked:
                    hidden = self.run(block, self.load_block(block), hidden, call)
            head = self.head()
            return own, head.logits(head.hidden(hidden))

    def _own_logits(self, ids: Tensor, picked: set[int]) -> Tensor:
        """Logits of the model's own forward, each block's weights read when its turn comes."""

        def act_of(block: int) -> Callable[[Tensor, Call], Any]:
            def act(hidden: Tensor, call: Call) -> Any:
                if block not in picked:
                    return (hidden,) if self._wraps_output else hidden
                weights = self.load_block(block)
                return functional_call(self.blocks[block], weights, (hidden, *call.args), call.kwargs)

            return act

        self.calls(ids.shape[1])
        with self.outside(), self._projecting(self.source), self._standing(act_of), torch.no_grad():
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()


class _WrongOutput(Exception):
    """The model did not hand one stub's output to the next as it came."""


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks and its name: of the lists as long as the model is deep, the heaviest."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise SourceError(
            f"{type(model).__name__} has no list of {depth} blocks",
            "its layers are not kept in one list as long as config.num_hidden_layers",
            "this architecture is not supported",
        )
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    return name, blocks


def load_whole(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model in memory, for what needs it so: writing text token by token."""
    skeleton = Skeleton(source, device, dtype)
    model, output = skeleton.model, skeleton.model.get_output_embeddings()
    projection = next(name for name, module in model.named_modules() if module is output)
    for name, _ in list(model.named_parameters()):
        if name.rpartition(".")[0] != projection:
            skeleton._set(name, skeleton._load(source, name))
    if model.config.get_text_config().tie_word_embeddings:
        output._parameters["weight"] = model.get_input_embeddings().weight
        _, bias = skeleton._vocabulary_projection(source)
    else:
        weight, bias = skeleton._vocabulary_projection(source)
        output._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        output._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    model.config.use_cache = True
    for file in source.extra_files():
        if file.name == "generation_config.json":
            model.generation_config = GenerationConfig.from_pretrained(file.parent)
    return model

"""What a model of a given config consists of, asked from transformers' own modules on the meta device."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from logitwise.errors import SourceError


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of a model.

    Args:
        model: the model on the meta device, without weights.
        shapes: every parameter and saved buffer by transformers' name; of tied tensors only the one that is stored.
        tied: names that share the tensor of another, with that other name.
    """

    model: PreTrainedModel
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]

    def match(self, stored: Iterable[str], where: str) -> dict[str, str]:
        """The name in the files for each name of the model.

        Files saved from the base model lack its prefix (`h.0...` for `transformer.h.0...`), others have one too many.

        Errors: SourceError, naming the tensors that are missing.
        """
        prefix = f"{self.model.base_model_prefix}."
        places: dict[str, str] = {}
        for name in stored:
            for candidate in (name, prefix + name, name.removeprefix(prefix)):
                if candidate in self.shapes or candidate in self.tied:
                    places.setdefault(candidate, name)
                    break
        for name, owner in self.tied.items():
            if owner not in places and name in places:
                places[owner] = places[name]
        missing = [name for name in self.shapes if name not in places]
        if missing:
            raise SourceError(
                f"{len(missing)} tensors of the model are missing, the first is {missing[0]}",
                f"{where} does not hold {'it' if len(missing) == 1 else 'them'}, and the config asks for "
                f"{len(self.shapes)} tensors ({type(self.model).__name__})",
                "fetch the model again; if it was converted, check that config.json is the one of these weights",
            )
        return places

    def check_shape(self, name: str, found: tuple[int, ...], where: str) -> None:
        """Errors: SourceError where a tensor does not have the shape that the config asks for."""
        if found != self.shapes[name]:
            raise SourceError(
                f"tensor {name} has the wrong shape",
                f"{where} holds {list(found)}, the config asks for {list(self.shapes[name])}",
                "fetch the model again; check that config.json is the one of these weights",
            )


def layout_of(config: PretrainedConfig, stored: int, where: str) -> Layout:
    """The layout of the causal language model that `config` describes.

    Args:
        config: the model's config.
        stored: how many tensors its files hold; a config that asks for more blocks is refused before it is built.
        where: the folder or file, for the message.

    Errors: SourceError where it describes something else, or transformers cannot build it.
    """
    _check_causal(config, where)
    blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(blocks, int) and blocks > stored:
        raise SourceError(
            f"{where} is incomplete, or its config is not its own",
            f"the config asks for {blocks} blocks, the files hold {stored} tensors",
            "fetch the model again",
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config from outside may fail in any way inside transformers' constructors
        raise SourceError(
            f"the config of {where} describes no model that can be built",
            f"{config.model_type}: {type(error).__name__}: {error}",
            "check config.json, or fetch the model again",
        ) from error
    tied = dict(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return Layout(model, shapes, tied)


def _check_causal(config: PretrainedConfig, where: str) -> None:
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    classes = [known] if isinstance(known, str) else list(known or [])
    architectures = config.architectures or classes
    if not set(classes) & set(architectures):
        raise SourceError(
            f"{where} is not a causal language model",
            f"its config is {config.model_type}, architecture {', '.join(architectures) or 'not named'}; "
            f"transformers' causal model for that type: {', '.join(classes) or 'none'}",
            "give a decoder that predicts the next token (one that AutoModelForCausalLM loads)",
        )

"""The models that are compared: opened, named apart and found to belong together before any work."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logitwise.errors import SourceError
from logitwise.pair import check_shapes, check_vocabulary
from logitwise.source import QuantizedSource, Source, check_tokenizer, check_weights, open_source, open_stored
from logitwise.watch import Watcher


@dataclass(frozen=True)
class Candidate:
    """A model with its name in the report and the fingerprint of its weights."""

    name: str
    source: Source
    digest: str


def open_candidates(
    original: str | Path, quantized: Sequence[str | Path], revision: str | None, watcher: Watcher
) -> list[Candidate]:
    """The full-precision model first, then the others in the order given.

    Errors: SourceError where the first is quantized, or another has not its tensors, shapes and tokenizer.
    """
    reference = open_source(original, revision)
    if isinstance(reference, QuantizedSource):
        raise SourceError(f"{original} is quantized", "its weights are codes", "give the model in full precision first")
    if not quantized:
        raise SourceError("no quantized model was given", "there is nothing to compare", "give one or more after FP")
    check_tokenizer(reference)
    sources = [reference, *map(open_stored, quantized)]
    for source in sources[1:]:
        check_shapes(source, reference)
        check_vocabulary(source, reference)
    with watcher.stage("Reading the models", sum(len(source.names()) for source in sources)) as stage:
        digests = [check_weights(source, lambda done, total: stage.advance()) for source in sources]
    return [Candidate(*parts) for parts in zip(names([original, *quantized], sources), sources, digests, strict=True)]


def names(given: Sequence[str | Path], sources: Sequence[Source]) -> list[str]:
    """Each model's own name; where two share one, what was given; where that is shared too, numbered."""
    found = [source.name for source in sources]
    alike = Counter(found)
    found = [str(path) if alike[name] > 1 else name for path, name in zip(given, found, strict=True)]
    alike = Counter(found)
    return [f"{name} ({place})" if alike[name] > 1 else name for place, name in enumerate(found, start=1)]

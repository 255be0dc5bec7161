"""The models that are compared: opened, named apart and found to belong together before any work."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from logitwise.comparison.served import Served, open_served
from logitwise.errors import SourceError
from logitwise.machine import versions
from logitwise.pair import check_shapes, check_vocabulary
from logitwise.runfolder import chain
from logitwise.source import (
    QuantizedSource,
    Source,
    check_tokenizer,
    check_weights,
    fingerprint,
    open_source,
    open_stored,
)
from logitwise.watch import Watcher


@dataclass(frozen=True)
class Candidate:
    """A model with its name in the report and a hash of all that decides its answers, versions included."""

    name: str
    source: Source
    digest: str


def open_candidates(
    original: str | Path,
    quantized: Sequence[str | Path],
    servers: Sequence[str],
    revision: str | None,
    watcher: Watcher,
) -> tuple[Candidate, list[Candidate | Served]]:
    """The full-precision model, and the others in the order given, those of servers last.

    Errors: SourceError where the first is quantized, or another has not its tensors, shapes and tokenizer, or a server
    cannot be asked; CalibrationError where none answers.
    """
    reference = open_source(original, revision)
    if isinstance(reference, QuantizedSource):
        raise SourceError(f"{original} is quantized", "its weights are codes", "give the model in full precision first")
    if not quantized and not servers:
        remedy = "give one or more after FP, or the --server that serves one"
        raise SourceError("no quantized model was given", "there is nothing to compare", remedy)
    check_tokenizer(reference)
    sources = [reference, *map(open_stored, quantized)]
    for source in sources[1:]:
        check_shapes(source, reference)
        check_vocabulary(source, reference)
    served = [open_served(server, reference.tokenizer(), watcher) for server in servers]
    with watcher.stage("Reading the models", sum(len(source.names()) for source in sources)) as stage:
        weights = [check_weights(source, lambda done, total: stage.advance()) for source in sources]
    by = versions()
    digests = [chain(fingerprint(source, found), versions=by) for source, found in zip(sources, weights, strict=True)]
    own_names = names([original, *quantized, *(f"{one.name} at {one.address}" for one in served)], [*sources, *served])
    stored = [Candidate(*parts) for parts in zip(own_names, sources, digests, strict=False)]
    renamed = [replace(one, name=name) for one, name in zip(served, own_names[len(sources) :], strict=True)]
    return stored[0], [*stored[1:], *renamed]


def names(given: Sequence[str | Path], sources: Sequence[Source | Served]) -> list[str]:
    """Each model's own name; where two share one, what was given; where that is shared too, numbered."""
    found = [source.name for source in sources]
    alike = Counter(found)
    found = [str(path) if alike[name] > 1 else name for path, name in zip(given, found, strict=True)]
    alike = Counter(found)
    return [f"{name} ({place})" if alike[name] > 1 else name for place, name in enumerate(found, start=1)]

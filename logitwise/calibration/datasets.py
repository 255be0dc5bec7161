"""Calibration from a data set of the `datasets` package: a hub name or a local folder."""

from importlib.util import find_spec

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.jsonl import document_of
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError


def check_installed() -> None:
    """Errors: CalibrationError where the `datasets` package is not installed."""
    if find_spec("datasets") is None:
        raise CalibrationError(
            "hf: calibration needs the datasets package", "it is not installed", "pip install datasets"
        )


def read_datasets(name: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Document]:
    """The first documents of a data set, until `limit` tokens are there; columns are named as in JSON lines.

    Args:
        name: NAME or NAME:CONFIG; its split `train` is read, or its first where it has none of that name.
        limit: tokens that are enough. Only what is read is fetched. Rows with an empty text are passed over.

    Errors: CalibrationError where the package or the data set is missing, or a row has no known columns.
    """
    check_installed()
    import datasets

    path, _, config = name.partition(":")
    documents: list[Document] = []
    tokens = 0
    try:
        splits = datasets.load_dataset(path, config or None, streaming=True)
        split = "train" if "train" in splits else next(iter(splits))
        for number, record in enumerate(splits[split], start=1):
            # Columns that other rows of the set use are there too, without a value.
            filled = {key: value for key, value in record.items() if value is not None}
            document = document_of(filled, f"data set {name}, {split} row {number}", tokenizer)
            if document.ids:
                documents.append(document)
                tokens += len(document.ids)
            if tokens >= limit:
                break
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"data set {name} cannot be read",
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            "check the name (hf:NAME or hf:NAME:CONFIG) and the network, or give a file with jsonl:FILE",
        ) from error
    return documents

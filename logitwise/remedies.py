"""What helps where a run does not fit into memory, by what of it does not."""

from logitwise.recipe import Recipe

WHY = "only writing its own needs the whole model"


def other_text(recipe: Recipe) -> str:
    """Where the whole model does not fit, which writing its own text needs."""
    server = "--calibration server:URL, a server that writes it"
    if recipe.writes_on:
        return f"{server}, or given text without fresh_last and polish_fresh: {WHY}"
    return f"give text, --calibration text:FILE or jsonl:FILE, or {server}: {WHY}"


def smaller_fit(recipe: Recipe) -> str:
    """Where a fit does not."""
    rows, batch = (
        " and ".join([option, *(f"--set {key}" for key in keys if getattr(recipe, key) is not None)])
        for option, keys in (("--rows", ("rows_last", "polish_rows")), ("--batch", ("batch_last", "polish_batch")))
    )
    also = ", or fewer --final-blocks" if recipe.final_blocks != 1 else ""
    return f"fewer {rows}, shorter --row-tokens, or a smaller {batch}{also}"


def more_memory(on_gpu: bool) -> str:
    """Where nothing that is asked for would take less."""
    return "--device cpu, or a GPU with more memory" if on_gpu else "a machine with more memory"

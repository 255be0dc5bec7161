"""The page beside a checkpoint: how the run went, from the figures that are in logitwise.json."""

from typing import Any

from logitwise import pages

LEFT_OUT = ("audit", "allocation")
"""Parts of a run's report that the page does not show."""


def run_page(report: dict[str, Any]) -> str:
    """The page of a run's report."""
    shown = {name: value for name, value in report.items() if name not in LEFT_OUT}
    title = f"{report['model']['name']} at {report['bits_per_weight']:.2f} bits a weight"
    return pages.page_of("logitwise quantize", title, sentences(report), shown, "run.js")


def sentences(report: dict[str, Any]) -> list[str]:
    """What the run came to: size, the verdict, where the error is, the time, and what was not met."""
    told = [
        f"The checkpoint takes {report['size_bytes'] / 1e6:.1f} MB, {report['bits_per_weight']:.2f} bits a quantized "
        f"weight; {report['loading']}."
    ]
    told += _verdict(report)
    if left := _left(report["windows"]):
        most, share = max(left.items(), key=lambda found: found[1])
        told.append(f"The fit of block {most + 1} left most of its error, {100 * share:.0f} % of that at its start.")
    told.append(_time(report))
    return told + [f"Not met: {reason}." for reason in report["unmet"]]


def _verdict(report: dict[str, Any]) -> list[str]:
    """Which fit of the final blocks was kept, and what the polish added."""
    kl, found = dict(report["held_out_kl"]), []
    polished = kl.pop("polish", None)
    by, squares = report["fitted_by"], kl.get("mse")
    if squares is not None and len(kl) > 1:
        (other,) = (name for name in kl if name != "mse")
        less = 1 - kl[other] / squares
        share = f"{100 * abs(less):.1f} % {'less' if less > 0 else 'more'}"
        found.append(
            f"On held-out rows KL to full precision is {squares:.4f} nats a token with the final blocks fitted by "
            f"squared error, and {kl[other]:.4f} by {other} ({share}): the latter "
            f"{'was kept' if by == other else 'was not kept'}."
        )
    elif squares is not None:
        found.append(f"On held-out rows KL to full precision is {squares:.4f} nats a token.")
    if polished is not None:
        found.append(f"After the polish it is {polished:.4f}.")
    return found


def _left(windows: list[dict[str, Any]]) -> dict[int, float]:
    """By block, the share of its squared error on held-out rows that its last fit left."""
    found = {}
    for window in windows:
        if window["objective"] == "mse" and window.get("held_out"):
            measures = dict(window["held_out"])
            if window["kept"] in measures and measures[0] > 0:
                found[window["blocks"][1]] = measures[window["kept"]] / measures[0]
    return found


def _time(report: dict[str, Any]) -> str:
    """How long it all took, and the longest part of it."""
    text = report["calibration"].get("seconds", 0)
    fits = sum(window.get("seconds", 0) for window in report["windows"])
    what, most = max([("writing or reading text", text), ("fitting", fits)], key=lambda part: part[1])
    longest = f", {_clock(most)} of it {what}" if most else ""
    return f"The run took {_clock(report['seconds'])}{longest}."


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

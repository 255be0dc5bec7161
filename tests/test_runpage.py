"""The page beside a checkpoint: what it says, nothing fetched, no markup of others; in a browser if there is one."""

import re
from pathlib import Path
from typing import Any

import pytest
from report.test_page import BROWSER

from logitwise.runpage import run_page, sentences


def report(**changes: Any) -> dict[str, Any]:
    """A run of two blocks whose second was fitted by both, and polished."""
    fits = [
        {"blocks": [0, 0], "held_out": [[0, 2.0], [5, 1.0], [10, 1.5]], "kept": 5, "seconds": 30.0, "objective": "mse"},
        {"blocks": [1, 1], "held_out": [[0, 4.0], [10, 3.6]], "kept": 10, "seconds": 31.0, "objective": "mse"},
        {"blocks": [1, 1], "held_out": [[0, 0.5], [10, 0.45]], "kept": 10, "seconds": 20.0, "objective": "lfq"},
    ]
    return {
        "model": {"name": "m", "sha256": "0", "dtype": "bfloat16"},
        "recipe": {"bits": 3, "calibration": "self", "layers": {}, "start": None},
        "choices": {"device": {"value": "cpu", "why": "no GPU was found"}},
        "calibration": {"rows": 64, "counted_tokens": 9000, "held_out_rows": 16, "seconds": 12, "first": "<b>"},
        "windows": [{**fit, "losses": [1.0] * 10, "held_out_kl": 0.5} for fit in fits],
        "polish": {"held_out": [[0, 0.45], [10, 0.4]], "losses": [1.0] * 10, "kept": 10},
        "fitted_by": "lfq",
        "held_out_kl": {"mse": 0.5, "lfq": 0.45, "polish": 0.4},
        "unmet": [],
        "versions": {"torch": "2"},
        "seconds": 100.2,
        "grids": {"3 bits": 14},
        "loading": "an engine loads it",
        "bits_per_weight": 3.25,
        "bits_per_parameter": 5.0,
        "size_bytes": 2_000_000,
        "audit": [{"tensor": "hidden in the page", "fate": "kept", "why": ""}],
        "allocation": None,
        **changes,
    }


def test_sentences() -> None:
    assert sentences(report()) == [
        "The checkpoint takes 2.0 MB, 3.25 bits a quantized weight; an engine loads it.",
        "On held-out rows KL to full precision is 0.5000 nats a token with the final blocks fitted by squared error, "
        "and 0.4500 by lfq (10.0 % less): the latter was kept.",
        "After the polish it is 0.4000.",
        "The fit of block 2 left most of its error, 90 % of that at its start.",
        "The run took 1 min 40 s, 1 min 21 s of it fitting.",
    ]


def test_sentences_of_a_fit_that_was_not_kept_and_of_a_run_without_fits() -> None:
    told = sentences(report(fitted_by="mse", held_out_kl={"mse": 0.5, "lfq": 0.51}, unmet=["it gained nothing"]))
    assert "0.5100 by lfq (2.0 % more): the latter was not kept." in told[1]
    assert told[-1] == "Not met: it gained nothing."
    rounded = report(windows=[{"objective": "none"}], held_out_kl={}, polish=None, calibration={}, seconds=3.0)
    assert sentences(rounded)[1:] == ["The run took 3 s."]
    assert "KL to full precision is 0.5000 nats a token." in sentences(report(held_out_kl={"mse": 0.5}))[1]


def test_nothing_is_fetched_and_no_text_is_markup() -> None:
    page = run_page(report(model={"name": "<img onerror=alert(1)>", "sha256": "0", "dtype": "x"}))
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\s*\(""", page)
    assert "<img" not in page
    assert "<b>" not in page
    assert "hidden in the page" not in page
    assert page.count("</script>") == 2


@pytest.mark.parametrize("fitted", [True, False])
def test_in_a_browser(fitted: bool, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    rounded = {"windows": [{"objective": "none"}], "held_out_kl": {}, "polish": None, "calibration": {}}
    page = tmp_path / "report.html"
    page.write_text(run_page(report(**({} if fitted else rounded))), encoding="utf-8")
    said: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 360, "height": 740})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(page.as_uri())
        assert tab.locator("figure").count() == (5 if fitted else 0)
        assert tab.locator("tbody tr").count() == (3 if fitted else 0)
        assert "no GPU was found" in tab.locator("footer").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        browser.close()
    assert said == []

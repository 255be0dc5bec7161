"""The page: whole, escaped, without a request; and in a browser, where there is one."""

import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_findings import findings, served_model, with_standard

from logitwise.errors import MachineError
from logitwise.pages import embedded
from logitwise.report.files import write_report
from logitwise.report.page import page_of

SCHEMA = json.loads(files("logitwise.report").joinpath("compare.schema.json").read_text("utf-8"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_nothing_is_fetched() -> None:
    page = page_of(findings())
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\s*\(""", page)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of a language, which nothing asks for"


def test_what_models_write_is_no_markup() -> None:
    made = findings()
    made["answers"][0]["prompt"] = "</script><script>alert(1)</script>"
    made["models"][1]["name"] = made["sentences"][0] = "<img onerror=alert(1)>"
    made["sentences"][4] = "Try `logitwise <x>`."
    page = page_of(made)
    assert "Try <code>logitwise &lt;x&gt;</code>." in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert json.loads(embedded(made)) == made


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    write_report(page, findings())
    before = page.read_text("utf-8")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match="no space left"):
        write_report(page, {**findings(), "sentences": ["x"] * 5})
    assert page.read_text("utf-8") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path) -> Any:
    """A page, with what its console says and what it asks for."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.said, tab.asked = [], []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(path.as_uri())
    return tab


@pytest.fixture(scope="module")
def tab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page in a headless browser."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    made = findings()
    made["answers"][0]["models"][0]["rest"] = "<script>document.title = 'taken'</script>"
    write_report(path, made)
    return opened(browser, path)


def test_the_browser_has_nothing_to_say(tab: Any) -> None:
    assert tab.said == []
    assert [address.partition(":")[0] for address in tab.asked] == ["file"], "the page and nothing else"
    assert tab.title() == "w4 and w2 beside model"
    assert tab.locator("ol.sentences li").count() == 5
    assert tab.locator("svg path").count() >= 10


def test_columns_sort_both_ways(tab: Any) -> None:
    rows = tab.locator("section").first.locator("tbody tr")
    button = tab.get_by_role("button", name="KL", exact=True).first
    button.click()
    assert [text.split("\t")[0] for text in rows.all_inner_texts()] == [
        "bfloat16 noise",
        "w4",
        "w2",
        "model",
    ]
    button.press("Enter")
    assert [text.split("\t")[0] for text in rows.all_inner_texts()] == [
        "w2",
        "w4",
        "bfloat16 noise",
        "model",
    ]


def test_charts_are_read_by_pointer_and_by_keys(tab: Any) -> None:
    plot = tab.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.locator("svg").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = plot.locator(".tip")
    assert tip.is_visible()
    assert re.search(r"tokens \d+ to \d+", tip.inner_text())
    assert "w2: " in tip.inner_text()
    tab.mouse.move(0, 0)
    assert not tip.is_visible()
    plot.locator("svg").focus()
    tab.keyboard.press("ArrowRight")
    first = tip.inner_text()
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    tab.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_phone_is_not_scrolled_sideways(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.wait_for_timeout(100)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.set_viewport_size({"width": 1200, "height": 900})


def test_served_models_show_bounds_and_dashes(browser: Any, tmp_path: Path) -> None:
    made = findings()
    made["models"][1:2] = [served_model("behind", 0.05), served_model("silent", None)]
    made["answers"][0]["models"] += made["answers"][0]["models"][:1]
    write_report(tmp_path / "served.html", made)
    tab = opened(browser, tmp_path / "served.html")
    assert tab.said == []
    rows = [text.split("\t") for text in tab.locator("section").first.locator("tbody tr").all_inner_texts()]
    assert rows[1][:4] == ["behind", "–", "–", "≥ 0.05 ± 0.005"]
    assert rows[2] == ["silent"] + ["–"] * (len(rows[2]) - 1)
    note = tab.locator("section p.note").first.inner_text()
    assert "≥: a lower bound, since a server names only its likeliest tokens (behind: 20)" in note
    assert "not known of silent" in note
    assert "behind, by http://localhost:8000/v1; prompts sent as token ids" in tab.locator("footer").inner_text()
    tab.close()


def test_standard_tasks_have_a_table(browser: Any, tmp_path: Path) -> None:
    made = with_standard(findings())
    jsonschema.validate(made, SCHEMA)
    made["models"][2] = served_model("behind", 0.05)
    made["models"][1]["lm_eval"][0]["task"] = made["models"][0]["lm_eval"][0]["task"] = "<b>arc</b>"
    write_report(tmp_path / "standard.html", made)
    tab = opened(browser, tmp_path / "standard.html")
    assert tab.said == []
    part = tab.locator("section").filter(has=tab.get_by_role("heading", name="Standard tasks"))
    rows = [text.split("\t") for text in part.locator("tbody tr").all_inner_texts()]
    assert rows[1] == ["w4", "<b>arc</b>", "acc ↑", "1,319", "0.51 ± 0.02", "-0.1", "-0.2 to -0.05"]
    assert rows[2] == ["behind", "<b>arc</b>", "acc ↑", "1,319", "–", "–", "–"]
    assert rows[4][2:6] == ["word_perplexity, strict-match ↓", "1,319", "917.3", "+900"]
    note = part.locator("p.note").inner_text()
    assert "on the first 1,319 documents of each task" in note
    assert "(arc_easy 0, wikitext as its tasks have them (from mine.yaml))" in note
    assert "not run on behind, which a server has" in note
    assert "arc_easy version 1.0, 2,376 documents" in tab.locator("footer").inner_text()
    tab.close()


def test_a_page_of_answers_alone(browser: Any, tmp_path: Path) -> None:
    made = findings()
    made["models"][1:] = [served_model("silent", None)]
    made["answers"][0]["models"] = made["answers"][0]["models"][:1]
    write_report(tmp_path / "served.html", made)
    tab = opened(browser, tmp_path / "served.html")
    assert tab.said == []
    titles = tab.locator("section h2").all_inner_texts()
    assert titles == ["The models", "Their answers", "Along an answer", "Answers side by side"]
    assert tab.locator("figure").count() == 1
    tab.close()

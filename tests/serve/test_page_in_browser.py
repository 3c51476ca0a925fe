"""The page in a real browser: sends, streams, stops, rates, exports. Needs Chromium, which is not a Python package."""

import json
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from cogumi.serve.api_keys import KeyFile
from support.page import RatedScripted, paged
from support.waiting import PATIENCE, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
BOX = "#question textarea"


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as made:
        opened = made.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture
def engine():
    return RatedScripted()


@pytest.fixture
def tab(browser, engine):
    """The page of a server over `engine`; it may ask nobody else."""
    with paged(lambda: engine) as port:
        yield from opened(browser, port)


def opened(browser, port, size=(1280, 800)):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
    context.set_default_timeout(PATIENCE * 1000)
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/ui")
    expect(page.locator(BOX)).to_be_editable()
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:"))]


def ask(page, text):
    page.fill(BOX, text)
    page.press(BOX, "Enter")


def answers(page):
    return page.locator("#chat .message.bot")


def test_question_is_answered_with_how_sure_it_is(tab, engine):
    ask(tab, "echo **bold** <b>x</b>")
    expect(answers(tab)).to_contain_text("sure: base, 90%, 80% needed")
    expect(answers(tab).locator("strong")).to_have_text("bold")
    expect(tab.locator(BOX)).to_have_value("")
    reason = answers(tab).get_by_text("✓ base: 0.90 >= 0.80")
    expect(reason).to_be_hidden()
    answers(tab).get_by_text("sure: base, 90%").click()
    expect(reason).to_be_visible()
    ask(tab, "echo second")
    expect(answers(tab)).to_have_count(2)
    expect(answers(tab).nth(1)).to_contain_text("second")
    until(lambda: len(engine.requests) == 2)
    assert [message.role for message in engine.requests[1].messages] == ["user", "assistant", "user"]
    assert engine.requests[1].messages[1].content == "**bold** <b>x</b>"


def test_answer_streams_and_can_be_stopped(tab, engine):
    ask(tab, "slow")
    expect(answers(tab)).to_contain_text("zzz")
    tab.keyboard.press("Escape")
    until(lambda: engine.running == 0)
    expect(tab.locator("#history label")).to_have_text("slow")
    ask(tab, "echo next")
    expect(answers(tab).nth(1)).to_contain_text("next")


def test_leaving_a_running_answer_ends_it_and_keeps_what_came(tab, engine):
    ask(tab, "slow")
    expect(answers(tab)).to_contain_text("zzz")
    tab.click("#new")
    until(lambda: engine.running == 0)
    expect(tab.locator("#chat .message")).to_have_count(0)
    ask(tab, "echo other")
    expect(tab.locator("#history label")).to_have_text(["echo other", "slow"])
    tab.locator("#history label", has_text="slow").click()
    expect(answers(tab)).to_contain_text("zzz")


def test_refused_question_returns_to_its_box(tab):
    ask(tab, "long question")
    expect(tab.locator(".toast-body")).to_contain_text("the prompt has 600 tokens")
    expect(tab.locator(BOX)).to_have_value("long question")
    expect(tab.locator("#chat .message")).to_have_count(0)


def test_broken_answer_keeps_what_came(tab):
    ask(tab, "late abc")
    expect(tab.locator(".toast-body")).to_contain_text("the context is full")
    expect(answers(tab)).to_contain_text("abc")


def test_thumb_is_sent_as_feedback(tab, engine):
    ask(tab, "echo one")
    expect(answers(tab)).to_contain_text("sure")
    tab.get_by_label("Dislike").click()
    until(lambda: engine.rated)
    (rated,) = engine.rated
    assert rated == (engine.requests[0].id, False, engine.requests[0].user)
    tab.click("#new")
    ask(tab, "echo two")
    expect(answers(tab)).to_contain_text("sure")


def test_conversations_stay_in_the_browser(tab):
    ask(tab, "echo first")
    expect(answers(tab)).to_contain_text("sure")
    tab.click("#new")
    expect(answers(tab)).to_have_count(0)
    ask(tab, "echo other")
    expect(tab.locator("#history label")).to_have_text(["echo other", "echo first"])
    tab.reload()
    expect(tab.locator("#history label")).to_have_text(["echo other", "echo first"])
    second = tab.context.new_page()
    second.goto(tab.url)
    expect(second.locator("#history label")).to_have_count(2)
    ask(second, "echo of another tab")
    expect(second.locator("#history label")).to_have_count(3)
    tab.locator("#history label", has_text="echo first").click()
    expect(answers(tab)).to_contain_text("first")
    ask(tab, "echo more")
    expect(tab.locator("#history label")).to_have_text(["echo first", "echo of another tab", "echo other"])
    for _ in range(2):  # a conversation can be opened, left and opened again
        tab.click("#new")
        expect(tab.locator("#chat .message")).to_have_count(0)
        tab.locator("#history label", has_text="echo other").click()
        expect(answers(tab)).to_contain_text("other")
    tab.click("#forget")
    expect(tab.locator("#history label")).to_have_count(0)
    assert tab.evaluate("localStorage.getItem('cogumi.conversations')") is None


def test_damaged_or_full_storage_loses_no_question(tab):
    tab.evaluate(
        "localStorage.setItem('cogumi.conversations', JSON.stringify([{id: 'a', title: 'damaged', turns: [5]}]))"
    )
    tab.reload()
    tab.locator("#history label", has_text="damaged").click()
    expect(tab.locator(".toast-body")).to_contain_text("the stored conversation cannot be read")
    ask(tab, "echo one")
    expect(answers(tab)).to_contain_text("one")
    tab.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 1500))")
    for number in range(4):
        tab.click("#new")
        ask(tab, f"echo {number} " + "long " * 40)
        expect(answers(tab)).to_contain_text("sure")


def test_ten_conversations_are_kept(tab):
    for number in range(12):
        tab.keyboard.press("Alt+n")
        expect(answers(tab)).to_have_count(0)
        ask(tab, f"echo {number}")
        expect(tab.locator("#history label").first).to_have_text(f"echo {number}")
    expect(tab.locator("#history label")).to_have_text([f"echo {number}" for number in range(11, 1, -1)])


def test_conversation_is_saved_as_markdown_and_json(tab):
    ask(tab, "echo one")
    expect(answers(tab)).to_contain_text("sure")
    with tab.expect_download() as markdown:
        tab.click("#markdown")
    assert markdown.value.suggested_filename == "conversation.md"
    text = markdown.value.path().read_text()
    assert "**You**\n\necho one\n\n**Answer**\n\none\n\n> sure: base, 90%, 80% needed" in text
    with tab.expect_download() as saved:
        tab.click("#json")
    turns = json.loads(saved.value.path().read_text())["turns"]
    assert [turn["content"] for turn in turns] == ["echo one", "one"]
    assert turns[1]["cogumi"]["p_correct"] == 0.9


def test_settings_apply_to_the_next_question(tab, engine, tmp_path):
    tab.locator(".sidebar .toggle-button").last.click()
    for name, choice in (("#mode", "fast"), ("#modifier", "code")):
        tab.locator(f"{name} input").click()
        tab.get_by_role("option", name=choice).click()
    tab.check("#decline input")
    tab.fill("#system textarea", "Be short.")
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text('{"question": "a"}\n')
    good.write_text('{"question": "a", "answer": "b"}\n')
    tab.set_input_files("#examples input[type=file]", bad)
    expect(tab.locator(".toast-body")).to_contain_text("bad.jsonl: line 1 is not an example")
    tab.set_input_files("#examples input[type=file]", good)
    expect(tab.locator("#examples")).to_contain_text("Examples in use: 1")
    tab.uncheck("#reasons input")
    ask(tab, "echo one")
    expect(answers(tab)).to_contain_text("one")
    until(lambda: engine.requests)
    (asked,) = engine.requests
    assert (asked.mode, asked.adapter, asked.abstain, asked.examples) == ("fast", "code", True, (("a", "b"),))
    assert asked.messages[0].content == "Be short."
    expect(answers(tab).get_by_text("sure: base, 90%")).to_be_hidden()
    tab.check("#reasons input")
    expect(answers(tab).get_by_text("sure: base, 90%")).to_be_visible()


def test_open_page_works_after_a_restart_of_the_server(browser):
    first, second = RatedScripted(), RatedScripted()
    with paged(lambda: first) as port:
        pages = opened(browser, port)
        page = next(pages)
        ask(page, "echo one")
        expect(answers(page)).to_contain_text("sure")
    with paged(lambda: second, port=port):
        ask(page, "echo two")
        expect(answers(page).nth(1)).to_contain_text("two")
        assert [message.content for message in second.requests[0].messages] == ["echo one", "one", "echo two"]
        assert not list(pages)


def test_person_signs_in_with_a_key_until_it_is_revoked(browser, engine, tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("anna")
    with paged(lambda: engine, keys=keys) as port:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"http://127.0.0.1:{port}/ui")
        for key in ("wrong", secret):
            page.locator("input, textarea").first.fill("anna")
            page.fill("input[type=password]", key)
            page.get_by_role("button", name="Login").click()
            if key == "wrong":
                expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
        expect(page.locator(BOX)).to_be_editable()
        ask(page, "echo one")
        expect(answers(page)).to_contain_text("sure")
        assert engine.requests[0].user.startswith("anna/page-")
        keys.revoke("anna")
        ask(page, "echo two")
        expect(page.locator(".toast-body")).to_contain_text("this API key is not valid, or was revoked")
        expect(page.locator(BOX)).to_have_value("echo two")
        page.close()


def test_page_fits_a_phone(browser, engine):
    with paged(lambda: engine) as port:
        for page in opened(browser, port, (390, 844)):
            page.click(BOX)  # nothing covers it
            ask(page, "echo " + "long " * 40)
            expect(answers(page)).to_contain_text("sure")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            box = page.locator(BOX).bounding_box()
            assert box["y"] + box["height"] <= 844

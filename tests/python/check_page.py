"""Uses the page of a server in a browser, by keyboard: check_page.py CHROMIUM ADDRESS TOKEN PICTURE. Fails at what is not there."""

import sys

from playwright.sync_api import expect, sync_playwright

chromium, address, token, picture = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=chromium,
        args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
    )
    page = browser.new_page(viewport={"width": 1100, "height": 1250})
    wrong, outside = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else outside.append(request.url))
    page.on("dialog", lambda dialog: dialog.accept())

    # Without a token it asks for one, and says when it is the wrong one.
    page.goto(address)
    page.get_by_label("Token that the server").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The token is not the right one.")
    page.get_by_label("Token that the server").fill(token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("meter")).to_have_count(3)
    expect(page.get_by_role("alert")).to_be_hidden()

    # From the prompt by Tab and Enter to its tokens, and along them with the arrow keys.
    page.get_by_label("Prompt", exact=True).fill("fn main() {\n    let count = 12 + 7;")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    tokens = page.get_by_role("toolbar").get_by_role("button")
    expect(tokens.first).to_have_attribute("aria-pressed", "true")
    assert tokens.count() > 24 and page.locator("#tokens .written").count() == 24
    rows = page.locator("#detail tr")
    assert rows.count() == 7, rows.count()
    page.keyboard.press("Tab")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#detail caption")).to_contain_text("Token 2 of")
    page.get_by_label("Layer").select_option("3")
    page.locator("summary").click()
    expect(page.locator("#heat tr")).to_have_count(7)

    # Back to the first generation, where there is another.
    back = page.get_by_role("button", name="Go back to 0")
    expect(back).to_be_visible()
    back.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("the model of generation 0")
    page.screenshot(path=picture, full_page=True)
    browser.close()
assert not wrong, wrong
assert not outside, outside

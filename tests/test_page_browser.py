"""The search page in a real browser, and the requests that its server accepts."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluations import QUIET
from PIL import Image
from runs import environment
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sets import png_of, texture, write_folders

ROOT = Path(__file__).parents[1]
LANDMARKS, VIEWS = 6, 4
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,943"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Start the page for a folder of textures as a user does; it extracts their descriptors first."""
    folder = tmp_path_factory.mktemp("page")
    photos = write_folders(folder / "photos", LANDMARKS, VIEWS)
    (folder / "secret.jpg").write_bytes((photos / "label0" / "0.jpg").read_bytes())
    words = ["dataset=folder", f"dataset.database={photos}", "backbone=efficientnet_lite0", "scales=1", "page.port=0"]
    words += ["page.max_upload=1", "page.results=20", "rerank.K=3", f"paths.outputs={folder}", *QUIET]
    command = [sys.executable, "-m", "superglobal", "serve", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    temporary = folder / "temporary"
    temporary.mkdir()
    server = subprocess.Popen(command, cwd=ROOT, env=environment(TMPDIR=str(temporary)), **pipes)
    assert server.stdout is not None
    lines: list[str] = []
    for line in server.stdout:
        lines.append(line)
        if line.startswith("Open http"):
            break
    match = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
    assert match, "".join(lines)
    yield SimpleNamespace(address=match[0], folder=folder, photos=photos, log="".join(lines), server=server)
    # An open page holds such a connection.
    with urllib.request.urlopen(f"{match[0]}/gradio_api/heartbeat/x", timeout=10):
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    rest, _ = server.communicate(timeout=30)
    assert server.returncode == 0, rest
    assert "The search page has stopped." in rest
    assert "Traceback" not in rest
    assert not list(temporary.glob("superglobal-page-*/*")), "uploads are left behind"


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """Start Chromium without a window."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("Chromium is not installed: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def visit(page, browser) -> webdriver.Chrome:
    """Open the page without a query."""
    browser.get(page.address)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".sg-drop input[type=file]"))
    return browser


def wait(browser: webdriver.Chrome, condition: Any) -> Any:
    """Wait until a condition is true and return its value."""
    return WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def shown(browser: webdriver.Chrome) -> str:
    """Return the text of the results; empty before the first search."""
    return browser.execute_script("return document.querySelector('.sg-results')?.innerText ?? ''")


def wait_for_change(browser: webdriver.Chrome, action: Any) -> None:
    """Run an action and wait until the results have changed."""
    before = shown(browser)
    action()
    wait(browser, lambda: shown(browser) not in ("", before))


def upload(browser: webdriver.Chrome, path: Path) -> None:
    """Upload an image and wait for its results."""
    wait_for_change(browser, lambda: send(browser, path))


def send(browser: webdriver.Chrome, path: Path) -> None:
    """Choose a file for upload."""
    browser.find_element(By.CSS_SELECTOR, "#sg-viewer input[type=file]").send_keys(str(path))


def names(browser: webdriver.Chrome) -> list[str]:
    """Return the names of the results."""
    return [e.get_attribute("title") or "" for e in browser.find_elements(By.CSS_SELECTOR, ".sg-name")]


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Return the texts of all elements of a CSS selector."""
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, selector)]


def show_all(browser: webdriver.Chrome) -> None:
    """Show the results that do not fit on the first page, which must not change those on it."""
    before = names(browser)
    browser.find_element(By.CSS_SELECTOR, ".sg-more").click()
    wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".sg-more"))
    assert names(browser)[: len(before)] == before


def message(browser: webdriver.Chrome) -> str:
    """Wait for an error message and return it."""
    return wait(browser, lambda: texts(browser, "#sg-message [role=alert]"))[0]


def draw(browser: webdriver.Chrome, x1: float, y1: float, x2: float, y2: float) -> None:
    """Draw a box on the query image; coordinates are fractions of its sides."""
    photo = browser.find_element(By.CSS_SELECTOR, ".sg-photo")
    width, height = photo.size["width"], photo.size["height"]
    points = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in ((x1, y1), (x2, y2))]
    actions = ActionChains(browser, 50).move_to_element_with_offset(photo, *points[0]).click_and_hold()
    actions.move_to_element_with_offset(photo, *points[1]).release().perform()


@pytest.fixture(scope="module")
def other_view(tmp_path_factory) -> Path:
    """Save an image of landmark 4 that is not in the database."""
    path = tmp_path_factory.mktemp("queries") / "view.jpg"
    texture(4, VIEWS + 3).save(path)
    return path


def test_missing_descriptors_are_extracted_first_and_progress_is_printed(page):
    assert "24 images, 0 in store, 24 to extract" in page.log


def test_the_page_shows_the_dataset_and_its_size(visit):
    assert visit.title == "Search by photo: photos"
    header = visit.find_element(By.CSS_SELECTOR, ".sg-header").text
    assert "photos" in header
    assert "24 photos" in header
    assert len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 12
    assert shown(visit) == ""


def test_an_upload_finds_the_expected_image_first(visit, other_view):
    upload(visit, other_view)
    assert names(visit)[0].startswith("label4/")
    assert {name.split("/")[0] for name in names(visit)[:VIEWS]} == {"label4"}
    assert len(names(visit)) == 20
    show_all(visit)
    assert len(names(visit)) == LANDMARKS * VIEWS
    assert names(visit)[20] in visit.switch_to.active_element.get_attribute("title")
    assert texts(visit, ".sg-rank") == [str(rank) for rank in range(1, 25)]
    assert all(re.fullmatch(r"-?\d\.\d{3}", score) for score in texts(visit, ".sg-score"))
    assert len(texts(visit, "[data-stage]")) == 4
    wait(visit, lambda: visit.execute_script("return document.querySelector('.sg-hit img').naturalWidth") == 120)


def test_reranking_can_be_toggled_and_shows_rank_changes(visit, other_view):
    upload(visit, other_view)
    show_all(visit)
    reranked, moves = names(visit), texts(visit, ".sg-move")
    assert len(moves) == 24
    assert any("▲" in move for move in moves)
    wait_for_change(visit, visit.find_element(By.CSS_SELECTOR, "#sg-rerank input").click)
    show_all(visit)
    plain = names(visit)
    assert texts(visit, ".sg-move") == []
    assert "rerank" not in texts(visit, "#sg-times")[0]
    for rank, (name, move) in enumerate(zip(reranked, moves, strict=True), 1):
        before = plain.index(name) + 1
        assert move == "=" if before == rank else move.startswith(f"{before} → {rank}")
    wait_for_change(visit, visit.find_element(By.CSS_SELECTOR, "#sg-rerank input").click)
    assert names(visit) == reranked[:20]


def test_sliders_are_limited_by_the_database_and_search_again(visit, other_view):
    upload(visit, other_view)
    sliders = {name: visit.find_element(By.CSS_SELECTOR, f"#sg-{name} input[type=range]") for name in "mk"}
    assert {name: slider.get_attribute("max") for name, slider in sliders.items()} == {"m": "24", "k": "23"}
    number = visit.find_element(By.CSS_SELECTOR, "#sg-m input[type=number]")
    wait_for_change(visit, lambda: (number.clear(), number.send_keys("5\t")))
    wait(visit, lambda: texts(visit, ".sg-score").count("\N{EN DASH}") == 15)
    wait_for_change(visit, lambda: sliders["k"].send_keys("\ue012" * 8))  # arrow left
    assert visit.find_element(By.CSS_SELECTOR, "#sg-k input[type=number]").get_attribute("value") == "1"


def test_a_box_restricts_the_query_and_is_shown_on_the_image(visit, tmp_path):
    both = Image.new("RGB", (260, 96), "grey")
    both.paste(texture(1, VIEWS + 1), (0, 0))
    both.paste(texture(4, VIEWS + 1), (140, 0))
    both.save(tmp_path / "both.png")
    upload(visit, tmp_path / "both.png")
    for box, label in (((0.02, 0.03, 0.46, 0.97), "label1/"), ((0.54, 0.03, 0.98, 0.97), "label4/")):
        wait_for_change(visit, lambda box=box: draw(visit, *box))
        assert names(visit)[0].startswith(label)
        frame, photo = (visit.find_element(By.CSS_SELECTOR, s).rect for s in (".sg-box", ".sg-photo"))
        assert abs((frame["x"] - photo["x"]) / photo["width"] - box[0]) < 0.02
        assert abs(frame["width"] / photo["width"] - (box[2] - box[0])) < 0.03
    assert "the box, 1" in visit.find_element(By.CSS_SELECTOR, ".sg-about").text
    wait_for_change(visit, visit.find_element(By.CSS_SELECTOR, "[data-whole]").click)
    assert not visit.find_element(By.CSS_SELECTOR, ".sg-box").is_displayed()
    assert "the whole photo" in visit.find_element(By.CSS_SELECTOR, ".sg-about").text


def test_a_database_image_can_be_found_by_name_and_used_as_query(visit):
    text = visit.find_element(By.CSS_SELECTOR, "#sg-choose textarea, #sg-choose input")
    text.send_keys("label3/2")
    wait(visit, lambda: len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 1)
    wait_for_change(visit, visit.find_element(By.CSS_SELECTOR, ".sg-samples button").click)
    text.send_keys("\ue003" * 8)  # backspace
    wait(visit, lambda: len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 12)
    result_names = names(visit)
    assert {name.split("/")[0] for name in result_names[: VIEWS - 1]} == {"label3"}
    assert "label3/2.jpg" not in result_names
    assert "extract" not in texts(visit, "#sg-times")[0]
    wait_for_change(visit, visit.find_element(By.CSS_SELECTOR, '.sg-hit[data-rank="5"] button').click)
    assert visit.find_element(By.CSS_SELECTOR, ".sg-about b").text == result_names[4]


def test_an_invalid_upload_shows_a_message_and_the_page_still_works(visit, other_view, tmp_path):
    (tmp_path / "bad.jpg").write_text("this is no photo")
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "big.jpg").write_bytes(b"\xff" * 1_200_000)
    for name, reason in (("bad.jpg", "not an image"), ("bomb.png", "60000 x 60000"), ("big.jpg", "at most 1 MB")):
        send(visit, tmp_path / name)
        wait(visit, lambda name=name: message(visit).startswith(name))
        assert reason in message(visit)
        assert "Traceback" not in visit.page_source
    upload(visit, other_view)
    assert names(visit)[0].startswith("label4/")
    assert texts(visit, "#sg-message [role=alert]") == []


def test_a_filter_without_matches_does_not_change_the_width_of_the_page(visit):
    columns = visit.find_element(By.ID, "sg-columns")
    width = columns.size["width"]
    visit.find_element(By.CSS_SELECTOR, "#sg-choose textarea, #sg-choose input").send_keys("nothing")
    wait(visit, lambda: texts(visit, "#sg-samples .sg-hint"))
    assert columns.size["width"] == width


def test_a_box_can_be_entered_with_the_keyboard(visit, other_view):
    upload(visit, other_view)
    visit.find_element(By.CSS_SELECTOR, ".sg-numbers summary").send_keys("\n")
    fields = {e.get_attribute("name"): e for e in visit.find_elements(By.CSS_SELECTOR, ".sg-numbers input")}
    assert {name: e.get_attribute("value") for name, e in fields.items()} == {
        "left": "0",
        "top": "0",
        "width": "120",
        "height": "96",
    }
    assert [e.accessible_name for e in fields.values()] == ["left", "top", "width", "height"]
    for name, value in {"left": "13", "top": "7", "width": "90", "height": "71"}.items():
        fields[name].clear()
        fields[name].send_keys(value)
    frame, photo = (visit.find_element(By.CSS_SELECTOR, s).rect for s in (".sg-box", ".sg-photo"))
    assert abs(frame["width"] / photo["width"] - 90 / 120) < 0.02
    fields["height"].send_keys("\n")
    wait(visit, lambda: "the box, 90" in texts(visit, ".sg-about")[0])
    wait(visit, lambda: visit.switch_to.active_element.text == "Search box")
    width = visit.find_element(By.CSS_SELECTOR, ".sg-numbers input[name=width]")
    width.clear()
    width.send_keys("119\n")
    wait(visit, lambda: width.get_property("value") == "107")


def test_the_page_fits_on_the_screen_of_a_phone(visit, other_view):
    metrics = {"width": 375, "height": 812, "deviceScaleFactor": 1, "mobile": True}
    visit.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        upload(visit, other_view)
        assert visit.execute_script("return document.documentElement.scrollWidth") <= 375
        assert visit.find_element(By.ID, "sg-found").rect["y"] < 700
        settings = visit.find_element(By.ID, "sg-settings")
        assert not settings.is_displayed()
        visit.find_element(By.CSS_SELECTOR, ".sg-toggle summary").click()
        assert settings.is_displayed()
    finally:
        visit.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_browser_sends_no_external_requests_and_logs_no_errors(visit, page, other_view):
    """The logs cover everything that the tests above have done in this browser."""
    upload(visit, other_view)
    events = [json.loads(entry["message"])["message"] for entry in visit.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 20
    assert [url for url in urls if not url.startswith((f"{page.address}/", "data:", "blob:", "chrome:"))] == []
    assert [entry for entry in visit.get_log("browser") if entry["level"] == "SEVERE"] == []


def request_page(address: str, **headers: str) -> tuple[int, bytes]:
    """Send a request; return its status and its body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_only_thumbnails_of_the_dataset_are_served(page):
    for path in ("/etc/passwd", page.folder / "secret.jpg", page.photos / "label0" / "0.jpg", ROOT / "README.md"):
        for route in (
            f"gradio_api/file={path}",
            f"gradio_api/file/{path}",
            f"file={path}",
            f"static/../../../../{path}",
        ):
            assert request_page(f"{page.address}/{route}")[0] in (403, 404), route
    status, content = request_page(f"{page.address}/photos/x/database/small/0.jpg")
    assert status == 200
    assert Image.open(io.BytesIO(content)).size == (120, 96)
    for wrong in ("database/small/24", "queries/small/0", "database/small/-1", "database/huge/0"):
        assert request_page(f"{page.address}/photos/x/{wrong}.jpg")[0] == 404
    for wrong in ("database/small/..%2f..%2fsecret", "database/small/%2e%2e", "../../secret"):
        assert request_page(f"{page.address}/photos/x/{wrong}.jpg")[0] in (404, 422)


def test_unused_routes_of_gradio_are_disabled(page):
    routes = [
        "proxy=https://example.org",
        "file=https://example.org",
        "info",
        "openapi.json",
        "runs",
        "vibe-code",
        "call/x",
    ]
    for route in [
        *(f"gradio_api/{route}" for route in routes),
        "monitoring",
        "monitoring/summary",
        "docs",
        "openapi.json",
    ]:
        assert request_page(f"{page.address}/{route}") == (404, b""), route
    assert request_page(page.address, Host="evil.example")[0] == 400
    assert request_page(page.address, Origin="http://evil.example")[0] == 403
    assert request_page(page.address, Origin=page.address.rstrip("/"))[0] == 200


def test_the_server_limits_the_size_of_uploads(page):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        + b"a" * 1_100_000
        + b"\r\n--x--"
    )
    request = urllib.request.Request(f"{page.address}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 413


def test_the_page_only_listens_on_this_machine(page):
    port = int(page.address.rsplit(":", 1)[1])
    listening_at = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert [address.split(":")[0] for address in listening_at] == ["0100007F"]

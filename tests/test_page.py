"""The search page in a real browser, and at its doors."""

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
    """A page over photos of textures, started as a user starts it, which describes them first."""
    place = tmp_path_factory.mktemp("page")
    photos = write_folders(place / "photos", LANDMARKS, VIEWS)
    (place / "secret.jpg").write_bytes((photos / "label0" / "0.jpg").read_bytes())
    words = ["dataset=folder", f"dataset.database={photos}", "backbone=efficientnet_lite0", "scales=1", "page.port=0"]
    words += ["page.max_upload=1", "rerank.K=3", f"paths.outputs={place}", *QUIET]
    command = [sys.executable, "-m", "superglobal", "serve", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    temporary = place / "temporary"
    temporary.mkdir()
    server = subprocess.Popen(command, cwd=ROOT, env=environment(TMPDIR=str(temporary)), **pipes)
    assert server.stdout is not None
    told: list[str] = []
    for line in server.stdout:
        told.append(line)
        if line.startswith("Open http"):
            break
    found = re.search(r"http://127\.0\.0\.1:\d+", "".join(told))
    assert found, "".join(told)
    yield SimpleNamespace(address=found[0], place=place, photos=photos, told="".join(told), server=server)
    # As an open page holds one.
    with urllib.request.urlopen(f"{found[0]}/gradio_api/heartbeat/x", timeout=10):
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    rest, _ = server.communicate(timeout=30)
    assert server.returncode == 0, rest
    assert "The search page has stopped." in rest
    assert "Traceback" not in rest
    assert not list(temporary.glob("superglobal-page-*")), "uploads are left behind"


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("no Chromium here: apt-get install -y chromium chromium-driver")
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
    """The page as it is before anything is chosen."""
    browser.get(page.address)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".sg-drop input[type=file]"))
    return browser


def wait(browser: webdriver.Chrome, condition: Any) -> Any:
    return WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def shown(browser: webdriver.Chrome) -> str:
    """The results as text; empty before there are any."""
    return browser.execute_script("return document.querySelector('.sg-results')?.innerText ?? ''")


def changed(browser: webdriver.Chrome, action: Any) -> None:
    """Do something and wait until the results have changed."""
    before = shown(browser)
    action()
    wait(browser, lambda: shown(browser) not in ("", before))


def upload(browser: webdriver.Chrome, path: Path) -> None:
    changed(browser, lambda: send(browser, path))


def send(browser: webdriver.Chrome, path: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "#sg-viewer input[type=file]").send_keys(str(path))


def names(browser: webdriver.Chrome) -> list[str]:
    return [e.get_attribute("title") or "" for e in browser.find_elements(By.CSS_SELECTOR, ".sg-name")]


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, selector)]


def message(browser: webdriver.Chrome) -> str:
    return wait(browser, lambda: texts(browser, "#sg-message [role=alert]"))[0]


def draw(browser: webdriver.Chrome, x1: float, y1: float, x2: float, y2: float) -> None:
    """A box, in shares of the photo's sides."""
    photo = browser.find_element(By.CSS_SELECTOR, ".sg-photo")
    width, height = photo.size["width"], photo.size["height"]
    points = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in ((x1, y1), (x2, y2))]
    actions = ActionChains(browser, 50).move_to_element_with_offset(photo, *points[0]).click_and_hold()
    actions.move_to_element_with_offset(photo, *points[1]).release().perform()


@pytest.fixture(scope="module")
def other_view(tmp_path_factory) -> Path:
    """A photo of landmark 4 that the database has not."""
    path = tmp_path_factory.mktemp("queries") / "view.jpg"
    texture(4, VIEWS + 3).save(path)
    return path


def test_missing_photos_were_described_first_with_the_news_in_the_terminal(page):
    assert "24 images, 0 in store, 24 to extract" in page.told


def test_the_page_names_the_data_set_and_its_size(visit):
    assert visit.title == "Search by photo: photos"
    header = visit.find_element(By.CSS_SELECTOR, ".sg-header").text
    assert "photos" in header
    assert "24 photos" in header
    assert len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 12
    assert shown(visit) == ""


def test_an_upload_gives_the_expected_photo_first(visit, other_view):
    upload(visit, other_view)
    assert names(visit)[0].startswith("label4/")
    assert {name.split("/")[0] for name in names(visit)[:VIEWS]} == {"label4"}
    assert len(names(visit)) == LANDMARKS * VIEWS
    assert texts(visit, ".sg-rank") == [str(rank) for rank in range(1, 25)]
    assert all(re.fullmatch(r"-?\d\.\d{3}", score) for score in texts(visit, ".sg-score"))
    assert len(texts(visit, "[data-stage]")) == 4
    wait(visit, lambda: visit.execute_script("return document.querySelector('.sg-hit img').naturalWidth") == 120)


def test_reranking_can_be_switched_off_and_on_and_shows_what_moved(visit, other_view):
    upload(visit, other_view)
    reranked, moves = names(visit), texts(visit, ".sg-move")
    assert len(moves) == 24
    assert any("▲" in move for move in moves)
    changed(visit, visit.find_element(By.CSS_SELECTOR, "#sg-rerank input").click)
    plain = names(visit)
    assert texts(visit, ".sg-move") == []
    assert "rerank" not in texts(visit, "#sg-times")[0]
    for place, (name, move) in enumerate(zip(reranked, moves, strict=True), 1):
        before = plain.index(name) + 1
        assert move == "=" if before == place else move.startswith(f"{before} → {place}")
    changed(visit, visit.find_element(By.CSS_SELECTOR, "#sg-rerank input").click)
    assert names(visit) == reranked


def test_sliders_end_where_the_database_does_and_search_again(visit, other_view):
    upload(visit, other_view)
    sliders = {name: visit.find_element(By.CSS_SELECTOR, f"#sg-{name} input[type=range]") for name in "mk"}
    assert {name: slider.get_attribute("max") for name, slider in sliders.items()} == {"m": "24", "k": "23"}
    number = visit.find_element(By.CSS_SELECTOR, "#sg-m input[type=number]")
    changed(visit, lambda: (number.clear(), number.send_keys("5\t")))
    wait(visit, lambda: texts(visit, ".sg-score").count("\N{EN DASH}") == 19)
    changed(visit, lambda: sliders["k"].send_keys("\ue012" * 8))  # arrow left
    assert visit.find_element(By.CSS_SELECTOR, "#sg-k input[type=number]").get_attribute("value") == "1"


def test_a_box_searches_for_a_part_and_is_shown_on_the_whole_photo(visit, tmp_path):
    both = Image.new("RGB", (260, 96), "grey")
    both.paste(texture(1, VIEWS + 1), (0, 0))
    both.paste(texture(4, VIEWS + 1), (140, 0))
    both.save(tmp_path / "both.png")
    upload(visit, tmp_path / "both.png")
    for box, label in (((0.02, 0.03, 0.46, 0.97), "label1/"), ((0.54, 0.03, 0.98, 0.97), "label4/")):
        changed(visit, lambda box=box: draw(visit, *box))
        assert names(visit)[0].startswith(label)
        frame, photo = (visit.find_element(By.CSS_SELECTOR, s).rect for s in (".sg-box", ".sg-photo"))
        assert abs((frame["x"] - photo["x"]) / photo["width"] - box[0]) < 0.02
        assert abs(frame["width"] / photo["width"] - (box[2] - box[0])) < 0.03
    assert "the box, 1" in visit.find_element(By.CSS_SELECTOR, ".sg-about").text
    changed(visit, visit.find_element(By.CSS_SELECTOR, "[data-whole]").click)
    assert not visit.find_element(By.CSS_SELECTOR, ".sg-box").is_displayed()
    assert "all of it" in visit.find_element(By.CSS_SELECTOR, ".sg-about").text


def test_a_photo_of_the_data_set_can_be_found_by_name_and_searched_with(visit):
    text = visit.find_element(By.CSS_SELECTOR, "#sg-choose textarea, #sg-choose input")
    text.send_keys("label3/2")
    wait(visit, lambda: len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 1)
    changed(visit, visit.find_element(By.CSS_SELECTOR, ".sg-samples button").click)
    text.send_keys("\ue003" * 8)  # backspace
    wait(visit, lambda: len(visit.find_elements(By.CSS_SELECTOR, ".sg-samples button")) == 12)
    found = names(visit)
    assert {name.split("/")[0] for name in found[: VIEWS - 1]} == {"label3"}
    assert "label3/2.jpg" not in found
    assert len(found) == 23
    changed(visit, visit.find_element(By.CSS_SELECTOR, '.sg-hit[data-rank="5"] button').click)
    assert visit.find_element(By.CSS_SELECTOR, ".sg-about b").text == found[4]


def test_a_bad_file_gives_a_message_and_the_page_goes_on(visit, other_view, tmp_path):
    (tmp_path / "bad.jpg").write_text("this is no photo")
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "big.jpg").write_bytes(b"\xff" * 1_200_000)
    for name, reason in (("bad.jpg", "not an image"), ("bomb.png", "60000 x 60000"), ("big.jpg", "1 MB allowed")):
        send(visit, tmp_path / name)
        wait(visit, lambda name=name: message(visit).startswith(name))
        assert reason in message(visit)
        assert "Traceback" not in visit.page_source
    upload(visit, other_view)
    assert names(visit)[0].startswith("label4/")
    assert texts(visit, "#sg-message [role=alert]") == []


def test_nothing_is_wider_than_a_phone(visit, other_view):
    upload(visit, other_view)
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    visit.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert visit.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        visit.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_this_machine_and_no_error_is_logged(visit, page, other_view):
    """Of everything that the tests above have done in this browser."""
    upload(visit, other_view)
    events = [json.loads(entry["message"])["message"] for entry in visit.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((f"{page.address}/", "data:", "blob:", "chrome:"))] == []
    assert [entry for entry in visit.get_log("browser") if entry["level"] == "SEVERE"] == []


def asked(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_is_served_but_small_pictures_of_the_data_set(page):
    for path in ("/etc/passwd", page.place / "secret.jpg", page.photos / "label0" / "0.jpg", ROOT / "README.md"):
        for way in (f"gradio_api/file={path}", f"gradio_api/file/{path}", f"file={path}", f"static/../../../../{path}"):
            assert asked(f"{page.address}/{way}")[0] in (403, 404), way
    status, picture = asked(f"{page.address}/photos/x/database/small/0.jpg")
    assert status == 200
    assert Image.open(io.BytesIO(picture)).size == (120, 96)
    for wrong in ("database/small/24", "queries/small/0", "database/small/-1", "database/huge/0"):
        assert asked(f"{page.address}/photos/x/{wrong}.jpg")[0] == 404
    for wrong in ("database/small/..%2f..%2fsecret", "database/small/%2e%2e", "../../secret"):
        assert asked(f"{page.address}/photos/x/{wrong}.jpg")[0] in (404, 422)


def test_what_the_page_does_not_use_of_gradio_is_not_there(page):
    ways = [
        "proxy=https://example.org",
        "file=https://example.org",
        "info",
        "openapi.json",
        "runs",
        "vibe-code",
        "call/x",
    ]
    for way in [*(f"gradio_api/{way}" for way in ways), "monitoring", "monitoring/summary", "docs", "openapi.json"]:
        assert asked(f"{page.address}/{way}") == (404, b""), way
    assert asked(page.address, Host="evil.example")[0] == 400
    assert asked(page.address, Origin="http://evil.example")[0] == 403
    assert asked(page.address, Origin=page.address.rstrip("/"))[0] == 200


def test_an_upload_is_limited_whatever_the_browser_says(page):
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


def test_the_page_is_for_this_machine_alone(page):
    port = int(page.address.rsplit(":", 1)[1])
    listening_at = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert [place.split(":")[0] for place in listening_at] == ["0100007F"]

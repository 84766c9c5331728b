"""The gallery in a browser: its slider, filters and counts against those of filter_clipscore.py."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter

import pytest
from PIL import Image

import filter_clipscore
import report
from reporting import gallery
from runtime.cli import UserError
from spectrum import edits
from spectrum.tables import read_scores

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromium-driver installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def write_page(tmp_path, rows, scores, threshold=0.25, dropped=()):
    """A gallery of one-coloured pictures."""
    real = (Image.new("RGB", (8, 8), "blue") for _ in iter(int, 1))
    return gallery.write_gallery(
        rows, scores, dict(dropped), threshold, lambda names: (next(real) for _ in names),
        lambda _: Image.new("RGB", (8, 8), "red"), "about", "python filter_clipscore.py", tmp_path,
    )  # fmt: skip


def row(source, label, level, **more):
    return {"file_name": f"shard-0/{source}_{level}.png", "source": source, "label": label,
            "class_name": f"</script> {label}", "level": level, "seed": 0, "prompt": "a photo", **more}  # fmt: skip


def entry(text, kept, reason=""):
    return {"text_score": text, "image_score": 0.5, "kept": kept, "reason": reason}


def set_value(browser, name, value):
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
        name, value,
    )  # fmt: skip
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def table(browser):
    """The page's counts: (label, column) -> "kept/made"."""
    return browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('td')].map(c => [c.dataset.key, c.textContent]))"
    )


@pytest.mark.slow
def test_counts_are_the_filters_own_at_any_threshold(road, tmp_path, browser):
    spectrum = tmp_path / "spectrum"
    shutil.copytree(road.spectrum, spectrum)
    assert report.main(["--spectrum", str(spectrum), "--gallery", "--out", str(tmp_path / "out")]) == 0
    browser.get((tmp_path / "out/gallery/index.html").as_uri())
    with (spectrum / "scores.csv").open() as file:
        scores = sorted(float(line["text_score"]) for line in csv.DictReader(file))
    for wanted in (scores[len(scores) // 4], scores[len(scores) // 2], scores[-3]):
        set_value(browser, "threshold", wanted)
        command = text(browser, "command")
        threshold = re.search(r"--threshold (\S+)$", command)[1]
        inputs = ["--spectrum", str(spectrum), "--prompts", str(road.prompts), "--threshold", threshold]
        assert filter_clipscore.main(inputs) == 0
        kept, made = Counter(), Counter()
        rows = {line["file_name"]: line for line in report.spectrum_folder.read_made(spectrum)}
        for name, score in read_scores(spectrum / "scores.csv").items():
            key = f"{rows[name]['label']}", sorted({r["level"] for r in rows.values()}).index(rows[name]["level"])
            made[key] += 1
            kept[key] += score["kept"]
        shown = table(browser)
        assert {key: shown[",".join(map(str, key))] for key in made} == {k: f"{kept[k]}/{made[k]}" for k in made}
        assert shown["all,all"] == f"{sum(kept.values())}/{sum(made.values())}" and 0 < sum(kept.values()) < len(rows)
    assert f"--spectrum {spectrum}" in command and "--dataset digits" in command


def test_slider_filters_and_order(tmp_path, browser):
    rows = [row("a", 0, 0), row("a", 0, 50), row("b", 1, 0), row("b", 1, 50)]
    scores = {r["file_name"]: e for r, e in zip(rows, [entry(0.1, False, "low text score"), entry(0.25, True),
              entry(0.4, True), entry(float("nan"), False, "unreadable")], strict=True)}  # fmt: skip
    browser.get(write_page(tmp_path, rows, scores).as_uri())

    def images():
        return browser.execute_script(
            "return [...document.querySelectorAll('[data-image]')].map(e => +e.dataset.image)"
        )

    assert images() == [0, 1, 2, 3] and text(browser, "total") == "2 of 4 kept"  # 0.25 is kept at 0.25
    assert browser.execute_script("return document.querySelector('h2').textContent") == "</script> 0 · a"
    for name, value, expected in [
        ("class", 1, [2, 3]), ("column", 1, [1, 3]), ("reason", "unreadable", [3]), ("low", 0.2, [1, 2]),
        ("high", 0.3, [0, 1]), ("state", "kept", [1, 2]), ("state", "out", [0, 3]), ("state", "now-in", []),
    ]:  # fmt: skip
        set_value(browser, name, value)
        assert images() == expected, name
        set_value(browser, name, "all" if name == "state" else "")
    set_value(browser, "sort", "text-down")
    assert images() == [2, 1, 0, 3]
    # At 0.1, the lowest, image 0 falls in; at 0.401 images 1 and 2 fall out.
    set_value(browser, "state", "now-in")
    set_value(browser, "threshold", 0.1)
    assert images() == [0] and text(browser, "total") == "3 of 4 kept" and "--threshold 0.1" in text(browser, "command")
    set_value(browser, "state", "now-out")
    set_value(browser, "threshold", 0.401)
    assert images() == [2, 1] and text(browser, "total") == "0 of 4 kept"
    browser.execute_script("document.querySelector('[data-image]').click()")
    detail = text(browser, "detail")
    assert "a photo" in detail and "text score0.4" in detail and "shard-0/b_0.png" in detail


def test_the_page_begins_at_the_very_threshold(tmp_path, browser):
    """As scores.csv has it, also between two steps of the slider: nothing is newly kept or rejected."""
    rows = [row("a", 0, 0), row("b", 1, 0), row("c", 1, 0)]
    scores = {r["file_name"]: entry(*e) for r, e in zip(rows, [(0.2504, False), (0.250512, True), (0.251, True)],
                                                        strict=True)}  # fmt: skip
    browser.get(write_page(tmp_path, rows, scores, 0.250512).as_uri())
    assert text(browser, "total") == "2 of 3 kept" and text(browser, "command").endswith("--threshold 0.250512")
    assert browser.execute_script("return document.querySelectorAll('[data-image] .moved').length") == 0
    set_value(browser, "threshold", 0.251)
    assert text(browser, "total") == "1 of 3 kept" and text(browser, "command").endswith("--threshold 0.251")
    set_value(browser, "class", 0)
    assert text(browser, "matching") == "1 image matches the filters"


def test_an_image_that_is_gone_is_kept_at_no_threshold(road, tmp_path):
    """As filter_clipscore.py, run again, has it."""
    spectrum = tmp_path / "spectrum"
    shutil.copytree(road.spectrum, spectrum)
    kept = [name for name, score in read_scores(spectrum / "scores.csv").items() if score["kept"]]
    (spectrum / kept[0]).unlink()
    assert report.main(["--spectrum", str(spectrum), "--gallery", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/gallery/index.html").read_text()
    images = json.loads(re.search(r'id="data">(.+?)</script>', page)[1])["images"]
    lost = dict(zip(images["file"], images["lost"], strict=True))
    assert lost[kept[0]] == "missing" and sum(images["kept"]) == len(kept) - 1
    threshold = str(json.loads((spectrum / "scores.json").read_text())["threshold"])
    words = ["--spectrum", str(spectrum), "--prompts", str(road.prompts), "--threshold", threshold]
    assert filter_clipscore.main(words) == 1
    again = read_scores(spectrum / "scores.csv")
    assert dict(zip(images["file"], images["kept"], strict=True)) == {name: e["kept"] for name, e in again.items()}


def test_an_image_drawn_since_the_edits_were_filtered_is_not_kept(road, tmp_path):
    """Training leaves it out."""
    spectrum = tmp_path / "spectrum"
    shutil.copytree(road.spectrum, spectrum)
    names = sorted(row["file_name"] for row in report.spectrum_folder.read_made(spectrum))
    verdict = ["0", *["1"] * (len(names) - 2)]
    edits.write_edits(spectrum / "edits.csv", {"file_name": names[:-1], "kept": verdict, "reason": ["x", *verdict[1:]]})
    (spectrum / "scores.json").unlink()
    (spectrum / "scores.csv").unlink()
    assert report.main(["--spectrum", str(spectrum), "--gallery", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/gallery/index.html").read_text()
    images = json.loads(re.search(r'id="data">(.+?)</script>', page)[1])["images"]
    lost = dict(zip(images["file"], images["lost"], strict=True))
    assert {name: why for name, why in lost.items() if why} == {names[0]: "x", names[-1]: "not in edits.csv"}
    used = report.spectrum_folder.kept_rows(spectrum, [0, 50, 90])
    assert {name for name, why in lost.items() if not why} == {row["file_name"] for row in used}


def test_a_kept_share_begins_at_the_lowest_score_kept(road, tmp_path):
    spectrum = tmp_path / "spectrum"
    shutil.copytree(road.spectrum, spectrum)
    words = ["--spectrum", str(spectrum), "--prompts", str(road.prompts), "--keep-share", "0.5"]
    assert filter_clipscore.main(words) == 0
    assert report.main(["--spectrum", str(spectrum), "--gallery", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/gallery/index.html").read_text()
    assert "(--keep-share 0.5), scored by the CLIP tiny_clip. The slider begins at the lowest score kept." in page


def test_many_images_of_one_source_are_one_strip(tmp_path):
    """A JPEG has at most 65,500 pixels a side: 700 thumbnails of 96 are more."""
    gallery.write_strip(Image.new("RGB", (96, 96)), [{"file_name": ""}] * 700, lambda _: Image.new("RGB", (4, 4)),
                        tmp_path / "0.jpg")  # fmt: skip
    assert Image.open(tmp_path / "0.jpg").size == (701 * 93, 93)


def test_classes_of_one_name_are_told_apart():
    images = [row("a", 0, 0, class_name="crane"), row("b", 1, 0, class_name="crane")]
    told = gallery.describe({name: [image] for name, image in zip("ab", images, strict=True)}, {}, {}, None, "", "")
    assert told["classes"] == {0: "crane (0)", 1: "crane (1)"}


def test_edits_stand_under_their_domains(tmp_path, browser):
    rows = [row("a", 0, 50, domain="snow"), row("a", 0, 50, domain="night") | {"file_name": "b"}]
    browser.get(write_page(tmp_path, rows, {r["file_name"]: entry(0.3, True) for r in rows}).as_uri())
    heads = browser.execute_script("return [...document.querySelectorAll('th')].slice(0, 4).map(e => e.textContent)")
    assert heads == ["class", "night", "snow", "all"]
    assert browser.execute_script("return getComputedStyle(document.getElementById('domains')).display") == "none"
    # In a spectrum of several levels the domain is a filter.
    rows.append(row("a", 0, 70, domain="snow"))
    browser.get(write_page(tmp_path / "b", rows, {r["file_name"]: entry(0.3, True) for r in rows}).as_uri())
    heads = browser.execute_script("return [...document.querySelectorAll('th')].slice(0, 4).map(e => e.textContent)")
    assert heads == ["class", "50", "70", "all"]
    set_value(browser, "domain", 1)
    assert text(browser, "matching").startswith("2 images")


def test_an_edit_filters_reason_holds_at_any_threshold(tmp_path, browser):
    rows = [row("a", 0, 50, domain=name) | {"file_name": name} for name in ("night", "rain", "snow")]
    dropped = {"night": "another class", "snow": "too easy"}

    def shown():
        tiles = "e => e.firstElementChild.classList.contains('kept') + ' ' + e.textContent"
        return browser.execute_script(f"return [...document.querySelectorAll('[data-image]')].map({tiles})")

    # Without scores there is nothing to slide: an edit is kept or has a reason.
    browser.get(write_page(tmp_path / "a", rows, {}, None, dropped).as_uri())
    assert text(browser, "total") == "1 of 3 kept" and table(browser)["0,1"] == "1/1"
    assert shown() == ["false night", "true rain", "false snow"]
    assert browser.execute_script("return getComputedStyle(document.querySelector('.wide')).display") == "none"
    options = browser.execute_script("return [...document.querySelectorAll('#reason option')].map(e => e.textContent)")
    assert options == ["all", "kept", "another class", "too easy"]
    set_value(browser, "reason", "too easy")
    assert shown() == ["false snow"]
    set_value(browser, "reason", "")
    set_value(browser, "sort", "reason")
    assert shown() == ["true rain", "false night", "false snow"]
    # With scores both decide: a high score does not bring a dropped edit back.
    scores = {name: entry(value, value >= 0.25) for name, value in (("night", 0.9), ("rain", 0.2), ("snow", 0.9))}
    browser.get(write_page(tmp_path / "b", rows, scores, 0.25, dropped).as_uri())
    assert text(browser, "total") == "0 of 3 kept"
    set_value(browser, "threshold", 0.2)
    assert text(browser, "total") == "1 of 3 kept" and shown()[1] == "true rain: 0.200"


@pytest.mark.slow
def test_fifty_thousand_images_are_fluid(tmp_path, browser):
    rows = [row(f"s{s}", s // 100, 10 * k) for s in range(6250) for k in range(8)]
    scores = {r["file_name"]: entry(n * 7919 % 50000 / 100000, False) for n, r in enumerate(rows)}
    path = write_page(tmp_path, rows, scores)
    browser.get(path.as_uri())
    assert path.stat().st_size < 8e6
    for name, value in (("threshold", 0.3), ("sort", "near"), ("sort", "class"), ("class", 3)):
        took = browser.execute_script(
            "const e = document.getElementById(arguments[0]), t = performance.now(); e.value = arguments[1];"
            "(arguments[0] === 'threshold' ? choose : arrange)(); draw(); return performance.now() - t",
            name, value,
        )  # fmt: skip
        print(f"{name} {value}: {took:.0f} ms")
        assert took < 1000, name
    set_value(browser, "class", "")
    worst = browser.execute_async_script(
        "const done = arguments[0], times = []; let k = 0;"
        "(function step() { const t = performance.now(); scrollTo(0, k * 9000); draw();"
        "times.push(performance.now() - t); k++ < 60 ? requestAnimationFrame(step) : done(Math.max(...times)); })()"
    )
    print(f"page {path.stat().st_size / 1e6:.1f} MB; slowest scroll step {worst:.0f} ms")
    assert worst < 300
    assert browser.execute_script("return document.querySelectorAll('*').length") < 4000


def test_a_gallery_needs_a_filtered_spectrum(tmp_path):
    with pytest.raises(UserError, match="--gallery: expected the --spectrum"):
        report.main(["--gallery", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="neither scores.json nor edits.csv; expected"):
        report.main(["--gallery", "--spectrum", str(tmp_path), "--out", str(tmp_path)])

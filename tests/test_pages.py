"""The documentation site: its code runs, its links work, its generated pages are complete, and it can be built."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import blocks
import gains
import reference
import tersor
from browser import CHROMIUM, chromium
from tersor.cli_output import Document
from tersor.data import load
from tersor.methods import names
from tersor.models import build
from tersor.recipe import parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
SELF_CONTAINED = [
    *("how-to/own-network.md", "how-to/vit.md", "how-to/deploy.md", "how-to/budget.md", "how-to/segmentation.md"),
    *("how-to/detection.md", "how-to/cpp.md"),
]
"""Pages whose Python blocks need only each other and run in seconds."""
OWN_METHOD = "how-to/own-method.md"
QUICK = ["how-to/resume.md", "agents.md", OWN_METHOD]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'pages'}",
    "NO_MKDOCS_2_WARNING": "1",
}


def network(width):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


@pytest.mark.parametrize("page", QUICK)
def test_the_blocks_of_a_quick_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks.run(page, {})


def test_the_function_on_the_data_page_has_separate_validation_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data.py").write_text(blocks.blocks("how-to/data.md", "python")[0])
    splits = load(name="data.py:images", validation=0.5)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [100, 20, 20]
    assert splits.validation.size == (32, 32)


def test_integer_coverage_lists_the_share_of_the_macs_as_documented():
    """Every page that mentions the list says that it contains the share of the MACs."""
    texts = [(ROOT / "README.md").read_text(), *((DOCS / page).read_text() for page in PAGES), tersor.quantize.__doc__]
    sentences = [
        found[0] for text in texts for found in re.finditer(r"integer_coverage(?:\([^)]*\))?`\s+lists[^.]*\.", text)
    ]
    assert len(sentences) == 4
    assert all("share of the MACs" in " ".join(sentence.split()) for sentence in sentences)
    example = torch.zeros(1, 3, 6, 6)
    covered = tersor.integer_coverage(network(4), example)
    assert [(each.name, each.macs, each.share) for each in covered.operators] == [
        ("0", 1728, 1728 / 1768),
        ("5", 40, 40 / 1768),
    ]


@pytest.mark.parametrize(("page", "files"), [("how-to/own-loop.md", ["model.onnx"]), ("how-to/tasks.md", [])])
def test_the_blocks_of_a_page_with_the_readers_networks_run(page, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))), 32)
    blocks.run(page, {"student": network(4), "teacher": network(8), "loader": loader})
    assert [path.name for path in tmp_path.iterdir()] == files


@pytest.mark.slow
def test_the_code_for_a_folder_of_images_runs(tmp_path, monkeypatch):
    (block,) = blocks.blocks("other-tools.md", "python")
    for text, smaller in {
        ".transforms()": ".transforms(crop_size=32, resize_size=36)",
        '"model.onnx", test)': '"model.onnx", test, seconds=0.1)',
    }.items():
        assert text in block
        block = block.replace(text, smaller)
    monkeypatch.chdir(tmp_path)
    for part, name in itertools.product(("train", "test"), ("ambulance", "bus")):
        folder = tmp_path / "cars" / part / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 44), "red" if name == "bus" else "white").save(folder / "1.jpg")
    torch.save(build("resnet18", 2).state_dict(), "cars.pth")
    exec(block, {})
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [*SELF_CONTAINED, "index.md"])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "how-to/deploy.md":
        pytest.importorskip("openvino")
    assert blocks.run(page, {})


@pytest.mark.slow
def test_the_blocks_of_the_tutorial_run():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    namespace = {}
    for page in blocks.TUTORIAL:

        def look(number, page=page):
            assert bool(plt.get_fignums()) == (blocks.figure_after(page, number) is not None)
            plt.close("all")

        blocks.run(page, namespace, look)


@pytest.mark.parametrize("page", [page for page in PAGES if page != OWN_METHOD and blocks.blocks(page, "yaml")])
def test_recipes_in_pages_are_valid(page):
    for text in blocks.blocks(page, "yaml"):
        assert parse(text, page).stages


def test_the_tutorial_shows_the_output_of_its_blocks():
    outputs = [text for page in blocks.TUTORIAL for text in blocks.blocks(page, "text")]
    assert len(outputs) > 8
    assert all(outputs)


def test_the_recipe_of_the_first_page_is_valid():
    (block,) = [text for text in blocks.blocks("index.md", "sh") if "tersor run" in text]
    assert parse(re.search(r"<<'END'\n(.*?)^END", block, re.MULTILINE | re.DOTALL)[1], "index.md").stages


@pytest.mark.slow
def test_the_commands_on_the_first_page_run_unchanged(tmp_path):
    (block,) = [text for text in blocks.blocks("index.md", "sh") if "tersor run" in text]
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=ENVIRONMENT, check=True)
    assert (tmp_path / "runs" / "int8" / "model.onnx").is_file()


@pytest.mark.parametrize("name", blocks.NOTEBOOKS)
def test_a_notebook_is_generated_from_its_pages(name):
    written = (DOCS / "notebooks" / f"{name}.ipynb").read_text()
    assert written == blocks.notebook(blocks.NOTEBOOKS[name]), "write it again: python pages/blocks.py notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", blocks.NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute(env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})


def test_every_method_has_an_entry_with_its_gain():
    listed = [name for family in gains.FAMILIES.values() for name in family]
    assert sorted(listed) == sorted(names())
    assert set(gains.GAINS) <= set(names())
    for gain in gains.GAINS.values():
        assert "points**" in gain.sentence()
    for family in gains.FAMILIES:
        assert len(gains.table(family).splitlines()) == 2 + len(gains.FAMILIES[family])


@pytest.mark.parametrize(
    ("method", "points", "distinguishable"),
    [("soft_targets", 3.6, True), ("crd", 0.5, False), ("psgd", 5.9, True), ("dcil", 1.9, True), ("dpf", 0.1, False)],
)
def test_gains_equal_those_in_the_tables_of_the_lecture(method, points, distinguishable):
    gain = gains.GAINS[method]
    assert (gain.points, gain.distinguishable) == (points, distinguishable)


def test_rows_that_do_not_exist_raise():
    with pytest.raises(LookupError, match="no row"):
        gains.matching("pruning", contender="nobody")


def slug(heading):
    """The anchor of a heading, as generated by Python-Markdown."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)|[`*]", r"\1", heading).lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_links_with_an_anchor_point_to_a_heading(document):
    path = ROOT / document
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", path.read_text()):
        linked = path if not target else path.parent / target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
        assert anchor in map(slug, headings), f"{target}#{anchor}"


def test_llms_txt_lists_the_pages():
    listed = set(re.findall(r"\]\(([^)]+)\)", (DOCS / "llms.txt").read_text()))
    assert not {page for page in listed if not (DOCS / page).is_file()} - reference.generated().keys()
    assert {page for page in PAGES if page.startswith(("how-to/", "tutorial/"))} - listed == {"how-to/index.md"}


def test_the_page_for_agents_names_every_schema_and_exit_code():
    text = (DOCS / "agents.md").read_text()
    assert set(re.findall(r"`tersor schema (\w+)`", text)) - {"NAME"} == set(Document.__args__)
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == ["0", "2", "130", "1"]


class Requests(HTMLParser):
    """The files that a page loads, its links, and its anchors."""

    def __init__(self):
        super().__init__()
        self.loaded, self.links, self.anchors = [], [], set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        if tag in {"script", "img", "iframe", "source"} or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded += [given[key] for key in ("src", "href") if given.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page of the site, parsed."""
    parsed = {page: Requests() for page in site.rglob("*.html")}
    for page, parser in parsed.items():
        parser.feed(page.read_text())
    return parsed


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_servers(pages):
    assert len(pages) > 80
    for page, parser in pages.items():
        assert not [address for address in parser.loaded if re.match(r"(https?:)?//", address)], page


@pytest.mark.slow
def test_links_in_the_site_point_to_a_file_and_an_anchor(site, pages):
    for page, parser in pages.items():
        for link in parser.links + parser.loaded:
            if re.match(r"[a-z]+:|//", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            if page.name == "404.html":  # a server sends it for any address, so its links start at the root
                path = path.removeprefix("/")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)} links {link}"
            assert not anchor or target not in pages or anchor in pages[target].anchors, f"{page}: {link}"


@pytest.mark.slow
def test_links_in_llms_txt_point_to_pages_of_the_site(site):
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())
    assert len(links) > 20
    assert not [link for link in links if not link.endswith(".html") or not (site / link).is_file()]


@pytest.mark.slow
def test_the_site_contains_the_notebooks(site, pages):
    linked = {(page.parent / link).resolve() for page, parser in pages.items() for link in parser.links}
    assert {site / "notebooks" / f"{name}.ipynb" for name in blocks.NOTEBOOKS} <= linked


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen_without_errors(site, width, scheme):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with chromium() as browser:
        for page in ("index", "tutorial/pruning", "which-method", "methods/dcil", "reference/recipe", "lecture"):
            browser.open(site / f"{page}.html", width, scheme)
            assert browser.value("document.scrollingElement.scrollWidth") <= width, page
        assert not browser.complaints
        assert not [address for address in browser.requests if address.startswith("http")]


@pytest.mark.slow
def test_the_openvino_program_compiles_and_runs(tmp_path):
    openvino = pytest.importorskip("openvino")
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("cmake or g++ is not installed")
    (first,) = blocks.blocks("how-to/cpp.md", "python")
    with contextlib.chdir(tmp_path):
        exec(first, {})
    _, source = blocks.blocks("how-to/cpp.md", "cpp")
    (project,) = blocks.blocks("how-to/cpp.md", "cmake")
    (tmp_path / "openvino.cpp").write_text(source)
    (tmp_path / "CMakeLists.txt").write_text(project)
    commands = blocks.blocks("how-to/cpp.md", "sh")[1]
    libraries = Path(openvino.__file__).parent / "libs"
    environment = ENVIRONMENT | {"LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 <= int(done.stdout.split()[-1]) < 10


@pytest.mark.slow
def test_the_onnxruntime_program_compiles_and_runs(tmp_path):
    if "ONNXRUNTIME" not in os.environ:
        pytest.skip("ONNXRUNTIME does not name an unpacked release of ONNX Runtime, which has the headers")
    (first,) = blocks.blocks("how-to/cpp.md", "python")
    with contextlib.chdir(tmp_path):
        exec(first, {})
    source, _ = blocks.blocks("how-to/cpp.md", "cpp")
    (tmp_path / "onnxruntime.cpp").write_text(source)
    commands = blocks.blocks("how-to/cpp.md", "sh")[0]
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert 0 <= int(done.stdout.split()[-1]) < 10


def test_the_output_of_a_block_replaces_the_text_after_it():
    page = "```python\nprint(1)\n```\n\n```text\nold\n```\n\n```python\nx = 2\n```\n\n```\nformula\n```\n"
    assert blocks.with_outputs(page, ["1\n", ""]) == page.replace("old", "1")


def test_a_notebook_contains_the_prose_and_the_code(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(
        "# Title\n\n[Link](a.md) text. [A\nnotebook](a.ipynb) has it.\n\n```python\nx = 1\n```\n\n```text\n1\n```\n\n"
        "![Figure](a.svg)\n\nThe end.\n"
    )
    monkeypatch.setattr(blocks, "DOCS", tmp_path)
    cells = json.loads(blocks.notebook(["page.md"]))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        ("markdown", "# Title\n\nLink text."),
        ("code", "x = 1"),
        ("markdown", "The end."),
    ]

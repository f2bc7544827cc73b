"""Screenshots of the page for the docs, with invented titles: BIGDSSM_PICTURES=docs/images updates them.

With BIGDSSM_TEXTS=FOLDER also that of docs/text_search.md: FOLDER/model, FOLDER/index are those of configs/tldr.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.training.stages import pretrain
from tests.conftest import TinyDataset
from tests.e2e.browser import Page, browser_path, browsing
from tests.e2e.test_page import started
from tests.unit.conftest import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def address(tiny_interactions: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of two models trained on transitions, the second one for longer."""
    folder, dataset = tmp_path_factory.mktemp("pictures"), Dataset.open(tiny_interactions.dir)
    for place, epochs in ((folder, 2), (folder / "other", 12)):
        overrides = [*(f"model.{override}" for override in SMALL), f"run.dir={place / 'run'}"]
        stage = {"rows_global": 64, "epochs": epochs, "optimizer.lr": 0.01, "optimizer.warmup_steps": 5}
        overrides += [f"pretrain.{key}={value}" for key, value in stage.items()]
        trained = pretrain(load_config(tiny_interactions.config, overrides))
        model = load_model_folder(trained.best)
        write_vectors(place / "vectors", tower_encoders(model.model, dataset), dataset, model.checksum)
        build_index(place / "vectors", place / "index")
        (place / "model").symlink_to(trained.best)
    with started(folder, "--second", folder / "other/model", folder / "other/index") as (url, _):
        yield url


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    browser = browser_path()
    if browser is None:
        pytest.skip("needs a browser")
    with browsing(browser, tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_pictures_of_the_page_are_taken_as_a_user_sees_it(address: str, page: Page, tmp_path: Path) -> None:
    folder = Path(os.environ.get("BIGDSSM_PICTURES", tmp_path))
    asked = f"{address}/?user=u7&one:genres=Comedy&one:genres=Drama&least:year=1965"
    page.screen(1100, 820).open(asked)
    page.press("ArrowDown", "ArrowDown", "Enter").wait_until_idle()
    page.picture(folder / "serving_page.png")
    page.screen(390, 780, dark=True, scale=1.5).open(f"{address}/?user=u7")
    page.js("document.querySelector('td.do button').click()")
    page.wait_until_idle()
    page.js("document.getElementById('history').scrollIntoView()")
    page.picture(folder / "serving_page_phone.png")
    for name in ("serving_page.png", "serving_page_phone.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and 10_000 < len(content) <= MOST_BYTES


@pytest.mark.skipif("BIGDSSM_TEXTS" not in os.environ, reason="pictures a trained model alone")
def test_picture_of_a_search_of_texts(page: Page, tmp_path: Path) -> None:
    folder = Path(os.environ.get("BIGDSSM_PICTURES", tmp_path))
    with started(Path(os.environ["BIGDSSM_TEXTS"])) as (url, _):
        page.screen(1100, 620).open(f"{url}/?intent=which process listens on a port")
        page.press("ArrowDown", "Enter").wait_until_idle()
        page.picture(folder / "search_page.png")

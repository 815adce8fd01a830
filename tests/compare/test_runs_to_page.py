"""Real runs, compared by the command and looked at in a browser: ``compare`` and ``ui`` from end to end."""

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from helpers.tiny_experiment import write_tiny_experiment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``mlflow.db`` and ``runs/``: three rules, trained as one sweep."""
    folder = tmp_path_factory.mktemp("runs")
    rules = ("token_choice", "expert_threshold_no_warmup")
    sweep = {
        "config": [write_tiny_experiment(folder, max_steps=6, val_check_interval=3)],
        "space": {"routing": {"choices": {rule: {"include": [f"routing/{rule}"]} for rule in rules}}},
        "objectives": {"val/loss": "minimize"},
        "sampler": {"name": "BruteForceSampler"},
        "budget": {"trials": 2},
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump(sweep))
    assert "Sweep rules: 2 complete" in run(folder, "sweep", "rules.yaml")
    return folder


def environment(folder: Path) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "RANK")}
    return outside | {"LIGHTNING_MOE_CACHE": str(folder / "cache"), "LIGHTNING_MOE_RUN": ""}


def run(folder: Path, *args: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "lightning_moe", *args]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_compare_reads_mlflow_and_writes_its_page_there(store: Path) -> None:
    options = ("--filter=tags.sweep = 'rules'", "--baseline=token_choice")
    out = run(store, "compare", "--experiment_name=lightning_moe", *options, "--output_dir=from_mlflow")
    rows = re.findall(r"^\| (token_choice|expert_threshold) +\| 1 +\| (\d\.\d{4}) +\|.*$", out, flags=re.MULTILINE)
    assert {label for label, _ in rows} == {"token_choice", "expert_threshold"}
    run(store, "compare", "runs/rules", "--baseline=token_choice", "--output_dir=from_folders", "--no_mlflow")
    csvs = [
        sorted((store / name / "comparison.csv").read_text().splitlines()) for name in ("from_mlflow", "from_folders")
    ]
    assert csvs[0] == csvs[1]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    beside = client.get_experiment_by_name("lightning_moe: comparisons")
    assert beside
    (found,) = client.search_runs([beside.experiment_id])
    assert found.data.tags["kind"] == "comparison"
    assert found.data.tags["mlflow.note.content"] == (store / "from_mlflow/comparison.md").read_text()
    artifacts = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"comparison.md", "comparison.csv", "comparison.png"} <= artifacts
    assert "no such experiment (it has " in run(store, "compare", "--experiment_name=lightning", code=2)
    assert "error: " in run(store, "compare", "--experiment_name=lightning_moe", "--filter=colour is red", code=2)


@pytest.fixture(scope="module")
def pages(store: Path) -> Iterator[dict[str, str]]:
    """The addresses that ``ui`` prints, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lightning_moe", "ui", "--port", str(port)]
    with (store / "ui.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=store, env=environment(store), stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C ends it" not in (store / "ui.log").read_text():
            assert server.poll() is None, (store / "ui.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()  # what is printed can be opened
        printed = re.findall(r"^(\S+, \w+): (http://127\.0\.0\.1\S+)$", (store / "ui.log").read_text(), re.MULTILINE)
        yield dict(printed)
    finally:
        server.terminate()  # the page's own process, as a service manager does
        code = server.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    assert code == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # and the server is gone


def browse(address: str, folder: Path, screenshot: str) -> str:
    """The page's text as a browser has it when all is drawn."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "needs Chromium: apt-get install chromium"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--window-size=1900,1000", "--virtual-time-budget=30000", "--hide-scrollbars"]
    image = folder / screenshot
    shown = subprocess.run(
        [browser, *options, f"--screenshot={image}", "--dump-dom", address], capture_output=True, text=True, timeout=300
    )
    assert image.stat().st_size > 20_000
    return html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", shown.stdout, flags=re.DOTALL))


def test_the_table_shows_our_columns_for_every_run(pages: dict[str, str], store: Path) -> None:
    text = browse(pages["lightning_moe, table"], store, "table.png")
    for column in (
        "val/loss",
        "val/bits_per_byte",
        "val_routing/max_load",
        "throughput/tokens_per_second",
        "routing",
        "sampled",
    ):
        assert column in text
    for name in ("trial-0000-s1", "trial-0001-s1", "token_choice", "expert_threshold"):
        assert name in text


def test_the_charts_show_several_runs(pages: dict[str, str], store: Path) -> None:
    text = browse(pages["lightning_moe, charts"], store, "charts.png")
    assert "trial-0000-s1 (routing/max_load)" in text
    assert "trial-0001-s1 (routing/max_load)" in text
    assert "Error" not in text


def test_ui_refuses_what_it_cannot_show(store: Path, tmp_path: Path) -> None:
    assert "no such store" in run(tmp_path, "ui", code=2)
    assert "is a server already" in run(tmp_path, "ui", "--tracking_uri=http://127.0.0.1:1", code=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: " in run(store, "ui", "--port", port, code=2)

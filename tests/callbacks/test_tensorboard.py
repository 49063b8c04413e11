"""A browser shows every dashboard of a monitored run's logs."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_fanions.callbacks import SpectralMonitor
from tests.callbacks.nets import Net, fit

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

# Text of the page, also of what its components keep to themselves.
TEXT = """
const found = [];
function walk(node) {
  if (['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT'].includes(node.nodeName)) return;
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim())
    found.push(node.textContent.trim());
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
}
walk(document.body);
return found;
"""
SHOWN = {
    "scalars": ["spectral", "train"],
    "custom_scalars": [
        "The group's own norm",
        "Nuclear norm",
        "Spectral norm",
        "Momentum: dual norm of the group's ball (matrix)",
    ],
    "histograms": [
        "spectral/momentum_spectrum/down.weight",
        "spectral/momentum_spectrum/conv.weight",
    ],
    "images": ["spectral/stable_rank", "spectral/singular_values"],
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """TensorBoard over the logs of a short run."""
    logs = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(logs, name="", version="run")
    net = Net({"matrix": {"algorithm": "muon", "lr": 0.05}})
    fit(logs, net, SpectralMonitor(1), logger=logger, validate=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: urllib.request.urlopen(f"{url}/data/runs", timeout=5).read() != b"[]\n")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.5)


@pytest.mark.parametrize("page", SHOWN)
def test_page(page, address, browser):
    browser.get("about:blank")
    browser.get(f"{address}/#{page}")
    missing = list(SHOWN[page])

    def complete():
        text = browser.execute_script(TEXT)
        missing[:] = [wanted for wanted in SHOWN[page] if wanted not in text]
        return not missing

    try:
        wait(complete)
    except AssertionError:
        pytest.fail(f"{page}: {missing} not shown: {browser.execute_script(TEXT)}")
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not [line for line in errors if "favicon" not in line["message"]]

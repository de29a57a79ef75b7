"""JupyterLab in a headless Chromium, driven by Playwright: what the browser tests share.

    @pytest.fixture(scope="module")
    def lab(tmp_path_factory):
        with jupyterlab(tmp_path_factory.mktemp("lab"), "02_traces.ipynb") as lab:
            yield lab

Module scope, not session: while Playwright's loop is open no other test of the process can run its own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
from helpers import ROOT, checkout_environment

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
QUIET = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    # All cells stand in the page, also those out of sight.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


def chromium():
    """Path of an installed Chromium (COVRL_LAB_CHROMIUM names another), or None."""
    names = (os.environ.get("COVRL_LAB_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextmanager
def browser():
    """A headless Chromium; skips the test where none is installed."""
    if chromium() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set COVRL_LAB_CHROMIUM)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package (tests extra)")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield instance
        instance.close()


@contextmanager
def jupyterlab(folder, *notebooks, width=1400, height=1000):
    """Serve ``folder`` with copies, without outputs, of ``notebooks`` (in notebooks/); yields a ``Lab``."""
    for name in notebooks:
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / name)
    with browser() as chrome, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        settings = folder / ".settings"
        environment = checkout_environment(JUPYTERLAB_SETTINGS_DIR=str(settings), JUPYTER_PREFER_ENV_PATH="1")
        for plugin, values in QUIET.items():
            _write_settings(settings, plugin, values)
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
        command += [f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
        command += [
            "--IdentityProvider.token=",
            "--ServerApp.password=",
            "--ServerApp.disable_check_xsrf=True",
        ]
        with (folder / ".server.log").open("w") as log:
            server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/kernelspecs", server, folder / ".server.log")
            page = chrome.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(90_000)  # the machine may be busy
            yield Lab(page, f"http://127.0.0.1:{port}", folder, settings)
        finally:
            server.terminate()
            server.wait(120)


def _write_settings(folder, plugin, values):
    package, name = plugin.split(":")
    path = folder / package / f"{name}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def _wait_for(url, server, log, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


class Lab:
    """One page on a running JupyterLab.

    ``errors`` collects what the console and the page report as errors, ``requests`` every address asked for
    outside the server, ``dialogs`` the messages of alert(), confirm() and prompt().
    """

    def __init__(self, page, url, folder, settings):
        self.page, self.url, self.folder, self.settings = page, url, folder, settings
        self.errors, self.requests, self.dialogs = [], [], []
        page.on("console", self._log)
        page.on("pageerror", self._fail)
        page.on("dialog", self._answer)
        page.on("request", lambda r: self.requests.append(r.url) if self._outside(r.url) else None)

    def _log(self, message):
        if message.type == "error":
            self._fail(" ".join([message.text, *map(str, message.args[1:])]))

    def _fail(self, error):
        # JupyterLab's own trouble with a kernel that starts slowly or is gone is not the notebook's.
        own = ["Could not restore the debugger state", "/api/kernels/", "Failed to load resource"]
        own += ["Canceled future for create_subshell_request"]
        # anywidget gives a model two seconds, however busy the machine; a panel that does not come fails elsewhere.
        own += ["[anywidget] Failed to initialize model"]
        if not any(text in str(error) for text in own):
            self.errors.append(str(error))

    def _answer(self, dialog):
        if dialog.type == "beforeunload":  # leaving a changed notebook
            return dialog.accept()
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _outside(self, url):
        return url.startswith(("http", "ws")) and self.url.split("//")[1] not in url

    def write(self, name, *cells):
        """A new notebook of code ``cells`` in the served folder."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in cells],
            # Without a kernel's name a dialog asks for one.
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        nbformat.write(notebook, self.folder / name)

    def open(self, name, theme="light"):
        """Open a notebook of the served folder in a fresh workspace, side bar hidden."""
        values = {"theme": THEMES[theme], "adaptive-theme": False}
        _write_settings(self.settings, "@jupyterlab/apputils-extension:themes", values)
        self.page.goto("about:blank")
        for session in json.load(urllib.request.urlopen(f"{self.url}/api/sessions")):  # a kernel of its own
            request = urllib.request.Request(f"{self.url}/api/sessions/{session['id']}", method="DELETE")
            urllib.request.urlopen(request).close()
        self.page.goto(f"{self.url}/lab/tree/{name}?reset")
        self._wait_for_kernel()
        if self.page.locator("#jp-left-stack:visible").count():
            self.page.keyboard.press("Control+b")

    def _wait_for_kernel(self):
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        # Cells run before the kernel is there would be lost.
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)

    def run_all(self, seconds=180):
        """Run > Run All Cells, and wait until every code cell has its number."""
        deadline = time.monotonic() + seconds
        while not (prompts := self._prompts()) or not all(prompt[1:-2].isdigit() for prompt in prompts):
            assert time.monotonic() < deadline, f"still running: {prompts}"
            # A kernel that has just started may drop the order, and a slow server have the page ask for one.
            dialog = self.page.locator("dialog.jp-Dialog")
            if dialog.filter(has_text="Select Kernel").count():
                dialog.locator("button.jp-mod-accept").click()
                # Else the page may send a click to a subshell of the kernel before, and it is lost.
                self._wait_for_kernel()
                self.page.reload()
                self._wait_for_kernel()
            elif "[*]:" not in prompts:
                self.page.get_by_role("menuitem", name="Run", exact=True).click()
                self.page.get_by_text("Run All Cells", exact=True).click()
                self.page.wait_for_timeout(1500)
            self.page.wait_for_timeout(200)

    def _prompts(self):
        """The prompts of the code cells that hold something, such as "[3]:"."""
        return self.page.evaluate(
            """[...document.querySelectorAll('.jp-CodeCell')]
                .filter(cell => cell.querySelector('.cm-content').textContent.trim())
                .map(cell => cell.querySelector('.jp-InputPrompt').textContent.trim())"""
        )

    def cell_errors(self):
        """Tracebacks shown in the notebook."""
        return self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()

    def drag(self, handle, pixels, steps=10):
        """Move the handle of a slider (a locator of .noUi-handle) by ``pixels`` to the right."""
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + pixels, y, steps=steps)
        self.page.mouse.up()

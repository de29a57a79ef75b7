"""What must not be committed in a notebook, one line each; standard library only.

The commit hook runs it as ``python tests/notebook_noise.py NOTEBOOK...``, the tests import ``noise``.
"""

import json
import re
import sys
from pathlib import Path

MOST_BYTES = 1_000_000
MOST_BYTES_OF_HTML = 200_000  # more than that in one output is a bundled script, plotly.js above all
ABSOLUTE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|mnt|var)/[\w.~-]+|[A-Za-z]:\\+Users\\+\w+")
METADATA = ("widgets", "papermill")


def noise(text: str) -> list[str]:
    """Complaints about a notebook's text, each with the cell it is in; empty if it may be committed."""
    notebook = json.loads(text)
    found = [f"metadata.{key}" for key in METADATA if key in notebook["metadata"]]
    if len(text.encode()) > MOST_BYTES:
        found.append(f"{len(text.encode()):,} bytes, more than {MOST_BYTES:,}")
    if not notebook["metadata"].get("kernelspec", {}).get("name") == "python3":
        found.append("no kernelspec named python3: JupyterLab would ask for a kernel")
    for i, cell in enumerate(notebook["cells"]):
        place = f"cell {i}: "
        found += [f"{place}metadata.{key}" for key in ("execution", *METADATA) if key in cell["metadata"]]
        if "injected-parameters" in cell["metadata"].get("tags", []):
            found.append(f"{place}parameters that papermill injected")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                found.append(f"{place}an error, {output['ename']}")
            html = "".join(output.get("data", {}).get("text/html", ""))
            if len(html) > MOST_BYTES_OF_HTML:
                found.append(f"{place}{len(html):,} bytes of HTML: a bundled script")
        if path := ABSOLUTE_PATH.search(json.dumps(cell, ensure_ascii=False)):
            found.append(f"{place}an absolute path, {path[0]}")
    return found


if __name__ == "__main__":
    complaints = [f"{p}: {line}" for p in sys.argv[1:] for line in noise(Path(p).read_text(encoding="utf-8"))]
    sys.exit("\n".join(complaints) or 0)

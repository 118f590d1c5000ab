"""examples/first_steps.ipynb runs, and what is stored in it is what a run gives.

python -m tests.test_notebook --update (make notebook) runs it again and stores the outputs, after a change that was
meant.

nbclient runs it: Jupyter's own client, which pytest's plugins for notebooks use too. The kernel is that of this
interpreter, whatever kernels the user has registered.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

from tests.test_golden import printed_differences
from tests.test_imports import PRIVATE

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
UPDATE = "run make notebook if the change was meant"
SECONDS = 300  # for one cell, on a busy machine


def stored() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def executed(notebook: dict, folder: Path) -> str:
    """The notebook as a file, with the outputs of a run in `folder` and without what differs from run to run."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from traitlets import default

    class Kernel(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _kernel_spec_manager_default(self):
            return KernelSpecManager(kernel_dirs=[])

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = {"timeout": SECONDS, "record_timing": False, "coalesce_streams": True, "kernel_manager_class": Kernel}
    options["extra_arguments"] = ["--log-level=ERROR"]  # it warns that the loopback interface is not encrypted
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm prefers to draw its bars with ipywidgets
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        NotebookClient(node, resources={"metadata": {"path": str(folder)}}, **options).execute()
    node.metadata.language_info = {"name": "python"}  # not the release that ran it
    nbformat.validate(node)
    return nbformat.writes(node) + "\n"


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def complaints(notebook: dict) -> list[str]:
    """What a reader of the stored notebook should not find; an empty list if there is nothing."""
    cells, text = code(notebook), json.dumps(notebook)
    said = [f"it mentions {word.decode()}" for word in PRIVATE if word.decode() in text]
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        said.append("its cells were not executed once each, in order")
    for cell in cells:
        name, outputs = f"cell {cell['id']}", cell["outputs"]
        said += [f"{name} ends in an error" for output in outputs if output["output_type"] == "error"]
        said += [f"{name} writes to stderr" for output in outputs if output.get("name") == "stderr"]
        pictures = any("image/png" in output.get("data", {}) for output in outputs)
        if ("plt.show()" in "".join(cell["source"])) != pictures:
            said.append(f"{name} has a picture without plt.show(), or none with it")
    return said


def test_the_stored_notebook_is_whole_and_names_no_machine():
    assert complaints(stored()) == [], UPDATE
    assert len(stored()["cells"]) <= 25 and NOTEBOOK.stat().st_size < 400_000


FAULTS = {
    "it mentions": lambda cell: cell["outputs"].append({"output_type": "stream", "text": [PRIVATE[0].decode()]}),
    "not executed once each, in order": lambda cell: cell.update(execution_count=1 + cell["execution_count"]),
    "ends in an error": lambda cell: cell["outputs"].append({"output_type": "error", "ename": "ValueError"}),
    "writes to stderr": lambda cell: cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": []}),
    "has a picture without": lambda cell: cell["outputs"].clear(),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_planted_fault_is_seen(said):
    notebook = stored()
    FAULTS[said](next(cell for cell in code(notebook) if "plt.show()" in "".join(cell["source"])))
    (complaint,) = complaints(notebook)
    assert said in complaint


def test_its_links_lead_to_files():
    text = "\n".join("".join(cell["source"]) for cell in stored()["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and [target for target in targets if not (NOTEBOOK.parent / target).is_file()] == []


def output_differences(one: dict, other: dict):
    """Where the outputs of two runs differ, in sentences. Of pictures, only whether there is one."""
    for was, now in zip(code(one), code(other), strict=True):
        name = f"cell {was['id']}"
        kinds = [[(o["output_type"], *sorted(o.get("data", {}))) for o in cell["outputs"]] for cell in (was, now)]
        if kinds[0] != kinds[1]:
            yield f"{name} gives {kinds[1]}, gave {kinds[0]}"
            continue
        for before, after in zip(was["outputs"], now["outputs"], strict=True):
            for line in printed_differences(*("".join(output.get("text", "")) for output in (before, after))):
                yield f"{name}: {line}"


@pytest.mark.slow
def test_a_run_gives_what_is_stored(tmp_path):
    again = json.loads(executed(stored(), tmp_path))
    assert complaints(again) == []
    assert list(output_differences(stored(), again)) == [], UPDATE
    printed = [output for cell in code(again) for output in cell["outputs"] if "text" in output]
    printed[-1]["text"][0] = printed[-1]["text"][0].replace("nats", "bits")
    assert len(list(output_differences(stored(), again))) == 1, "the comparison can fail"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("error: python -m tests.test_notebook --update")
    with tempfile.TemporaryDirectory() as folder:
        NOTEBOOK.write_text(executed(stored(), Path(folder)), encoding="utf-8")
